"""Adapters of PEFT on a fused network, on the demo's network and digits: pip install ".[peft]".

    python examples/peft_lora.py [--steps 60] [--images 2000] [--rank 8] [--dora] [--out FOLDER]

An adapter is added to the weight that convolves. A standardised convolution computes this weight from its parameters in
every call, so there is no weight to add an adapter to: fuse first. Here a small network learns the digits 0 to 4, is
fused, and gets LoRA adapters that learn 5 to 9. The adapter is saved, loaded onto the fused network again and merged.
The exit code is 1 if the merged network differs from the adapted one by more than 1e-6.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import timm_nf
from timm_nf import demo

MOST = 1e-6  # relative L2 error of logits: the merged weight is rounded once more than the sum of two convolutions
CONVOLUTIONS = r"stages\..*\.(conv1|conv2|conv3|downsample\.conv)"
CLASSIFIER = "head.fc"


def digits(count: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Normalised pictures (N, 1, 28, 28) and labels (N,) of the digits from first to last."""
    pixels, labels = demo.load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    order = order[(labels[order] >= first) & (labels[order] <= last)]
    return (pixels[order].float() / 255 - demo.MEAN) / demo.STD, labels[order]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, what: str) -> None:
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(steps), what, console=Console(stderr=True)):
        batch = torch.randint(len(y), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    return f"{100 * float((model(x).argmax(1) == y).float().mean()):.1f} %"


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Relative L2 error of the logits."""
    return float((model(x) - other(x)).norm() / other(x).norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each training, 64 pictures a step")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--out", type=Path, help="where the adapter is written, by default nowhere that stays")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x, y = digits(arguments.images, 0, 4)
    new_x, new_y = digits(arguments.images, 5, 9)

    model = timm.create_model(demo.NETWORK, in_chans=1, num_classes=10, **demo.CONFIG)
    optimizer = timm.optim.create_optimizer_v2(model, "agcsgd", lr=0.1, momentum=0.9, weight_decay=2e-5)
    train(model, optimizer, x, y, arguments.steps, "learning 0 to 4")
    fused = timm_nf.fuse(model)

    config = LoraConfig(
        r=arguments.rank, target_modules=CONVOLUTIONS, modules_to_save=[CLASSIFIER], use_dora=arguments.dora
    )
    adapted = get_peft_model(copy.deepcopy(fused), config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    train(adapted, torch.optim.AdamW(trained, lr=3e-3), new_x, new_y, arguments.steps, "adapting to 5 to 9")

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        adapted.save_pretrained(str(folder))
        size = (folder / "adapter_model.safetensors").stat().st_size
        loaded = PeftModel.from_pretrained(copy.deepcopy(fused), str(folder)).eval()
    merged = loaded.merge_and_unload()
    error = difference(merged, adapted, new_x)

    table = Table("", "digits 0 to 4", "digits 5 to 9", box=None)
    for label, network in (("before", fused), ("adapted", adapted), ("loaded and merged", merged)):
        table.add_row(label, accuracy(network, x, y), accuracy(network, new_x, new_y))
    console = Console()
    console.print(table)
    console.print(f"adapter of {size:,} bytes; the network has {4 * sum(p.numel() for p in fused.parameters()):,}")
    console.print(f"logits of the merged network: relative error {error:.0e}, at most {MOST:.0e}")
    return int(not error <= MOST)


if __name__ == "__main__":
    sys.exit(main())
