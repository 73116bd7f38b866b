"""Adaptive gradient clipping with Hugging Face's accelerate, with accumulation, on the demo's digits.

accelerate launch -m examples.with_accelerate
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

from examples.plain_loop import PARTS, SETTINGS, network, parts


def main(steps: int = 20, name: str = "agcsgd", precision: str = "no", first: int = 0, folder: str = "state"):
    """Train, and save the state in the folder. After the `first` steps, continue from the state there."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=PARTS)
    model = network()
    optimizer = create_optimizer_v2(model, name, **SETTINGS)  # finds the classifier
    images, labels = map(torch.cat, zip(*parts(steps), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=len(images) // steps // PARTS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if first:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, first * PARTS)
    for images, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()  # clips when a batch is complete; no clip_grad_norm_()
            optimizer.zero_grad()
    accelerator.save_state(folder)
    return model, optimizer


if __name__ == "__main__":
    _, optimizer = main()
    for row in optimizer.optimizer.clip_stats():  # accelerate's optimizer holds ours
        print(f"{row['clipped_fraction']:.0%} of {row['units']} units clipped")
