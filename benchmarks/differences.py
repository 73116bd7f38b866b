"""Print the table of measured differences between timm_nf and stock timm, as Markdown.

    python -m benchmarks.differences

Everything is computed in one run, on a CPU. The reference values in tests/golden come from the authors' JAX code; its
README says how. Both networks get the same parameters.
"""

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import timm.models.nfnet as stock
import timm.utils.agc
import torch
from rich.console import Console
from rich.progress import track
from timm.models import model_parameters as train_py_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

# Taken before timm_nf puts its own in their place.
timm_clip = timm.utils.agc.adaptive_clip_grad

import timm_nf  # noqa: E402
from timm_nf._relative_error import relative_error  # noqa: E402
from timm_nf.env import machine  # noqa: E402
from timm_nf.verify.golden import golden_params, image  # noqa: E402

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
    """Of the logits for a grey image after converting a pretrained three-channel network to one channel."""
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
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    gains = [p for n, p in model.named_parameters() if n.endswith((".gain", ".skipinit_gain"))]
    return f"{sum(id(p) in decayed for p in gains)} of {len(gains)}"


def clip_units(clip: Callable[..., object]) -> int:
    """How many values the clipping factor takes over the gain of one convolution with 256 output channels."""
    gain = nn.Parameter(torch.ones(256, 1, 1, 1))
    grad = torch.linspace(1, 2, 256).view_as(gain)
    gain.grad = grad.clone()
    clip([gain], 0.01)
    return len((gain.grad / grad).flatten().mul(1e6).round().unique())


def bias_is_clipped(route: str) -> str:
    model = timm.create_model("dm_nfnet_f0", num_classes=10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if route == "timm":
        timm_clip(train_py_parameters(model, exclude_head=True), 0.01)
    else:
        create_optimizer_v2(model, "agcsgd", lr=0.0, momentum=0.0, nesterov=False).step()
    weight, bias = ((p.grad != 1).any().item() for p in model.head.fc.parameters())
    return f"weight {'clipped' if weight else 'not clipped'}, bias {'clipped' if bias else 'not clipped'}"


def survivors(name: str) -> str:
    """What stochastic depth at rate 0.5 multiplies surviving branches with."""
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
    """F0's parameters with gradients, to be clipped again and again."""

    def __init__(self, clip: Callable[..., object]) -> None:
        self.clip = clip
        self.parameters = list(timm.create_model("dm_nfnet_f0").parameters())
        self.grads = [torch.randn_like(p) for p in self.parameters]

    def reset(self) -> None:  # clipping twice is clipping once: without this the second run has nothing to do
        for p, grad in zip(self.parameters, self.grads, strict=True):
            p.grad = grad.clone()

    def __call__(self) -> None:
        self.clip(self.parameters, 0.01)


def forward_speed() -> str:
    models = [timm.create_model(name).eval() for name in ("nfnet_f0", "dm_nfnet_f0")]
    x = torch.randn(1, 3, 192, 192)

    def forward(model: nn.Module) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: model(x))

    return speed(*map(forward, models))


ROWS: dict[str, Callable[[], str]] = {
    "`nfnet_f0` logits against the authors' code, same parameters, float64: relative L2 error": lambda: (
        f"{logits_error(lambda: timm.create_model('nfnet_f0')):.1e} | "
        f"`dm_nfnet_f0` {logits_error(lambda: timm.create_model('dm_nfnet_f0')):.1e}, "
        f"`nfnet_f0` {logits_error(stock.nfnet_f0):.1e}"
    ),
    "Pretrained weights at `in_chans=1`, grey image: relative L2 error of the logits": lambda: (
        f"{grey_stem_error('nfnet_f0'):.1e} | {grey_stem_error('dm_nfnet_f0'):.1e}"
    ),
    "Gains that `create_optimizer_v2(model, ...)` decays": lambda: (
        f"{decayed_gains('agcsgd', 'nfnet_f0')} | {decayed_gains('sgd', 'dm_nfnet_f0')}"
    ),
    "Clipping units in a gain of 256 entries (the paper: 1)": lambda: (
        f"{clip_units(timm_nf.adaptive_clip_grad_)} | {clip_units(timm_clip)}"
    ),
    "Classifier under clipping (the paper: weight no, bias yes)": lambda: (
        f"`--opt agcsgd`: {bias_is_clipped('ours')} | `--clip-mode agc`: {bias_is_clipped('timm')}"
    ),
    "Survivors of stochastic depth (the authors: not rescaled)": lambda: (
        f"{survivors('nfnet_f0')} | {survivors('dm_nfnet_f0')}"
    ),
    "Adaptive clipping of F0's gradients, every unit clipped": lambda: speed(
        Clipping(timm_nf.adaptive_clip_grad_), Clipping(timm_clip)
    ),
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
    logging.disable(logging.WARNING)  # timm warns of the checkpoints' missing source
    print(table())


if __name__ == "__main__":
    main()
