"""Differentially private training with Opacus, on the demo's network and digits: pip install ".[dp]".

    python examples/dp_sgd.py [--epochs 10] [--images 5000] [--noise 1.0] [--max-grad-norm 1.0] [--lr 2.0]

DP-SGD clips the gradient of every single example. Opacus refuses batch normalisation, because there an example's output
depends on the other examples. In a normalizer-free network no layer has to be replaced. Before training, the script
compares Opacus' gradients of every example (functorch mode) with those of torch.func.
"""

import argparse
import sys
import warnings

import timm
import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from opacus.validators import ModuleValidator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import timm_nf
from timm_nf import demo

# Opacus says so at every start; for real secrets pass secure_mode=True, which needs another package.
warnings.filterwarnings("ignore", "Secure RNG turned off")
warnings.filterwarnings("ignore", "Full backward hook is firing")  # the images need no gradient


def network(name: str = demo.NETWORK, **config: object) -> nn.Module:
    return timm.create_model(name, in_chans=1, num_classes=10, **config)


def largest_difference(x: Tensor, y: Tensor) -> float:
    """The largest relative difference between Opacus' and torch.func's gradients of every example, in float64."""
    model, x = network(**demo.CONFIG).double(), x.double()
    for name, p in model.named_parameters():
        if name.endswith("skipinit_gain"):  # with the initial 0, most gradients are 0
            nn.init.constant_(p, 0.5)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (one[None],)), label[None])

    want = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    wrapped = GradSampleModule(model, loss_reduction="sum", force_functorch=True)
    F.cross_entropy(wrapped(x), y, reduction="sum").backward()
    got = {n: p.grad_sample for n, p in model.named_parameters()}
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in want)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument(
        "--batch-size", type=int, default=250, help="expected size; Poisson sampling draws more or less"
    )
    parser.add_argument("--noise", type=float, default=1.0, help="standard deviation, in units of --max-grad-norm")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=2.0)
    args = parser.parse_args()
    torch.manual_seed(0)

    pixels, labels = demo.load_digits()
    order = torch.randperm(len(labels))[: args.images]
    x, y = (pixels[order].float() / 255 - demo.MEAN) / demo.STD, labels[order]
    held_out = int(demo.HELD_OUT * len(y))
    train, (x_test, y_test) = TensorDataset(x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])

    console = Console()
    for name, model in (("batch normalisation", network("test_resnet")), (demo.NETWORK, network(**demo.CONFIG))):
        console.print(f"{name}: {len(ModuleValidator.validate(model))} layers that Opacus refuses")
    difference = largest_difference(x[:8], y[:8])
    console.print(f"gradients of 8 examples, Opacus against torch.func.vmap: {difference:.1e}")
    if difference > 1e-9:
        return 1

    model = network(**demo.CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(train, batch_size=args.batch_size),
        noise_multiplier=args.noise,
        max_grad_norm=args.max_grad_norm,
        grad_sample_mode="functorch",
    )
    delta = 1 / len(train)
    table = Table(title=f"timm_nf {timm_nf.__version__}, {len(train)} images, delta {delta:.1e}")
    for column in ("epoch", "epsilon", "loss", "held out %"):
        table.add_column(column, justify="right")
    for epoch in track(range(1, args.epochs + 1), "training", console=console):
        model.train()
        losses = []
        for images, classes in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), classes)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            accuracy = 100 * (model(x_test).argmax(1) == y_test).float().mean().item()
        row = (engine.get_epsilon(delta), sum(losses) / len(losses), accuracy)
        table.add_row(str(epoch), *(f"{value:.2f}" for value in row))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
