"""Adaptive gradient clipping in a LightningModule, with accumulation, on the demo's digits.

python -m examples.with_lightning
"""

import lightning
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

from examples.plain_loop import PARTS, SETTINGS, network, parts


class Digits(lightning.LightningModule):
    def __init__(self, optimizer: str = "agcsgd"):
        super().__init__()
        self.net, self.optimizer = network(), optimizer

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return create_optimizer_v2(self, self.optimizer, **SETTINGS)  # finds the classifier in self.net

    def on_train_end(self):
        for row in self.optimizers().clip_stats():
            print(f"{row['clipped_fraction']:.0%} of {row['units']} units clipped")


def main(steps: int = 20, module: lightning.LightningModule | None = None, resume: str | None = None, **options):
    """Train; `options` are those of Lightning's Trainer, and `resume` is a checkpoint of it."""
    # no gradient_clip_val: the optimizer clips
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "accumulate_grad_batches": PARTS,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    module = module or Digits()
    trainer.fit(module, DataLoader(list(parts(steps)), batch_size=None), ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    main()
