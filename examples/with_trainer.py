"""Adaptive gradient clipping with transformers' Trainer, with accumulation, on the demo's digits.

python -m examples.with_trainer
"""

import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from transformers import Trainer, TrainingArguments

from examples.plain_loop import PARTS, SETTINGS, network, parts


class Digits(nn.Module):
    """What the Trainer expects: labels go in, the loss comes out."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def main(steps: int = 20, optimizer: str = "agcsgd", resume: str | None = None, callbacks=None, **options) -> Trainer:
    """Train; `options` are TrainingArguments, and `resume` is a checkpoint's folder."""
    rows = [(image, label) for images, labels in parts(steps) for image, label in zip(images, labels, strict=True)]
    data = [{"pixel_values": image, "labels": label} for image, label in rows]
    arguments = {
        "output_dir": "trainer_output",
        "num_train_epochs": 1,
        "per_device_train_batch_size": len(rows) // steps // PARTS,
        "gradient_accumulation_steps": PARTS,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # the optimizer clips
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    model = Digits()
    agc = create_optimizer_v2(model, optimizer, **SETTINGS)  # finds the classifier in model.net
    pair = (agc, None)  # None: the Trainer's own schedule
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=data, optimizers=pair, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    for row in main().optimizer.optimizer.clip_stats():  # of the optimizer inside accelerate's
        print(f"{row['clipped_fraction']:.0%} of {row['units']} units clipped")
