"""Print the table of measured differences between timm_nf and stock timm, as Markdown.

    python -m benchmarks.differences

All numbers come from one run on a CPU. The reference values come from the authors' JAX code; tests/golden/README.md
says how. Both networks get the same parameters.
"""

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import timm.models.nfnet as stock
import torch
from rich.console import Console
from rich.progress import track
from timm.models import model_parameters as train_py_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks import answers
from benchmarks.stock import timm_clip  # before timm_nf, which replaces it

# isort: split
import timm_nf
from timm_nf._clip_defaults import CLIP_FACTOR
from timm_nf._gain_names import is_gain
from timm_nf._relative_error import relative_error
from timm_nf.env import machine
from timm_nf.verify.golden import golden_params, image

GOLDEN = Path(__file__).parents[1] / "timm_nf" / "verify" / "golden"


def logits_error(create: Callable[[], nn.Module]) -> float:
    golden = np.load(GOLDEN / "nfnet_F0_1x64x64.npz")
    model = create().double().eval()
    state_dict = golden_params(timm.create_model("nfnet_f0").state_dict())
    own = model.state_dict()
    model.load_state_dict({k: v.reshape(own[k].shape) for k, v in state_dict.items() if k in own})
    with torch.no_grad():
        return relative_error(model(image(1, 64, 64)), torch.from_numpy(golden["logits"]))


def grey_stem_error(name: str) -> float:
    """Relative error of a grey image's logits, after a pretrained network was loaded with one input channel."""
    colour = timm.create_model(name).eval()
    nn.init.ones_(colour.stages[0][0].skipinit_gain)
    saved = {k: v.clone() for k, v in colour.state_dict().items()}
    for key in saved:
        if "skipinit_gain" in key:
            saved[key].fill_(0.7)
    colour.load_state_dict(saved)
    overlay = {"state_dict": saved, "hf_hub_id": None, "url": ""}
    grey = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1).eval()
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return relative_error(grey(x), colour(x.expand(-1, 3, -1, -1)))


def decayed_gains(optimizer: str, name: str) -> str:
    model = timm.create_model(name)
    groups = create_optimizer_v2(model, optimizer, lr=0.1, weight_decay=2e-5).param_groups
    return answers.decayed(groups, [p for n, p in model.named_parameters() if is_gain(n)])


def clip_units(clip: Callable[..., object]) -> int:
    """The number of units in the gain of a convolution with 256 output channels: gradients of a unit share a factor."""
    gain = nn.Parameter(torch.ones(256, 1, 1, 1))
    grad = torch.linspace(1, 2, 256).view_as(gain)
    gain.grad = grad.clone()
    clip([gain], CLIP_FACTOR)
    return len((gain.grad / grad).flatten().mul(1e6).round().unique())


def bias_is_clipped(route: str) -> str:
    model = timm.create_model("dm_nfnet_f0", num_classes=10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if route == "timm":
        timm_clip(train_py_parameters(model, exclude_head=True), CLIP_FACTOR)
    else:
        create_optimizer_v2(model, "agcsgd", lr=0.0, momentum=0.0, nesterov=False).step()
    weight, bias = ((p.grad != 1).any().item() for p in model.head.fc.parameters())
    return answers.clipped(weight, bias)


def survivors(name: str) -> str:
    """Whether stochastic depth rescales the branches that remain."""
    model = timm.create_model(name, drop_path_rate=0.5)
    return "rescaled" if getattr(model.stages[3][2].drop_path, "scale_by_keep", False) else "not rescaled"


def speed(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 11) -> str:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, into in zip((ours, theirs), times, strict=True):
            getattr(run, "reset", lambda: None)()
            start = time.perf_counter()
            run()
            into.append(time.perf_counter() - start)
    a, b = (1e3 * statistics.median(t) for t in times)
    return f"{a:.0f} ms | {b:.0f} ms ({b / a:.1f}x)"


class Clipping:
    """Clips F0's gradients. `reset` sets them again: gradients that were clipped do not change a second time."""

    def __init__(self, clip: Callable[..., object]) -> None:
        self.clip = clip
        self.parameters = list(timm.create_model("dm_nfnet_f0").parameters())
        self.grads = [torch.randn_like(p) for p in self.parameters]

    def reset(self) -> None:
        for p, grad in zip(self.parameters, self.grads, strict=True):
            p.grad = grad.clone()

    def __call__(self) -> None:
        self.clip(self.parameters, CLIP_FACTOR)


def forward_speed() -> str:
    models = [timm.create_model(name).eval() for name in ("nfnet_f0", "dm_nfnet_f0")]
    x = torch.randn(1, 3, 192, 192)

    def forward(model: nn.Module) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: model(x))

    return speed(*map(forward, models))


def logits() -> str:
    create = partial(timm.create_model, "nfnet_f0"), partial(timm.create_model, "dm_nfnet_f0"), stock.nfnet_f0
    ours, dm, plain = map(logits_error, create)
    return f"{ours:.1e} | `dm_nfnet_f0` {dm:.1e}, `nfnet_f0` {plain:.1e}"


def grey_stem() -> str:
    return f"{grey_stem_error('nfnet_f0'):.1e} | {grey_stem_error('dm_nfnet_f0'):.1e}"


def decay() -> str:
    return f"{decayed_gains('agcsgd', 'nfnet_f0')} | {decayed_gains('sgd', 'dm_nfnet_f0')}"


def units() -> str:
    return f"{clip_units(timm_nf.adaptive_clip_grad_)} | {clip_units(timm_clip)}"


def classifier() -> str:
    return f"`--opt agcsgd`: {bias_is_clipped('ours')} | `--clip-mode agc`: {bias_is_clipped('timm')}"


def stochastic_depth() -> str:
    return f"{survivors('nfnet_f0')} | {survivors('dm_nfnet_f0')}"


def clipping_speed() -> str:
    return speed(Clipping(timm_nf.adaptive_clip_grad_), Clipping(timm_clip))


# what is compared -> function that gives the cells of ours and of timm's
ROWS: dict[str, Callable[[], str]] = {
    "`nfnet_f0` logits against the authors' code, same parameters, float64: relative L2 error": logits,
    "Pretrained weights at `in_chans=1`, grey image: relative L2 error of the logits": grey_stem,
    "Gains that `create_optimizer_v2(model, ...)` decays": decay,
    "Clipping units in a gain of 256 entries (the paper: 1)": units,
    "Classifier under clipping (the paper: weight no, bias yes)": classifier,
    "Survivors of stochastic depth (the authors: not rescaled)": stochastic_depth,
    "Adaptive clipping of F0's gradients, every unit clipped": clipping_speed,
    "F0 forward, not fused, batch 1, 192 px, float32": forward_speed,
}


def table() -> str:
    """The rows, measured now, as Markdown with the machine below."""
    torch.manual_seed(0)
    lines = [
        f"| {what} | {row()} |"
        for what, row in track(ROWS.items(), "measuring", console=Console(stderr=True), transient=True)
    ]
    end = f"\nPrinted by `python -m benchmarks.differences`: {machine()}; times are medians of interleaved runs."
    return "\n".join(["| | timm_nf | timm |", "| --- | --- | --- |", *lines, end])


def main() -> None:
    logging.disable(logging.WARNING)  # timm warns that the checkpoints have no source
    print(table())


if __name__ == "__main__":
    main()
