"""Checks that this machine computes the authors' networks and training step, and how closely.

The package ships golden numbers. The authors' JAX code computed them in float64 on a CPU (deepmind-research nfnets/ at
f5de0ede), from synthetic parameters and images. `fill` and `image` make these inputs again.

Every check gives a verdict: the measured number and its bound. A check that the device cannot do gives a verdict too,
which never counts as passed.

Examples:
    >>> verdicts = run(device="cpu")  # an iterator: each check runs when its verdict is asked for
    >>> Verdict("logits of NFNet-F0", measured="2.7e-15", bound="1e-10", ok=True).ok
    True
"""

# timm's networks and optimizers have no types.
# pyright: standard, reportPrivateImportUsage=false

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import convert
from .._clip_defaults import CLIP_EPS, CLIP_FACTOR
from .._dtypes import dtype_name
from .._progress import Progress, silent
from .._relative_error import relative_error
from .._text import counted, reason
from ..inference.images import reader
from . import stock
from .golden import golden_model, image, load_golden

__all__ = ["FORWARD", "OURS", "STEPS", "STOCK", "Verdict", "run"]

_logger = logging.getLogger(__name__)

FORWARD = {
    "nfnet_f0": "nfnet_F0_1x64x64",
    "dm_nf_resnet50": "nf_resnet_ResNet50_1x64x64",
    "dm_nf_regnet_b0": "nf_regnet_B0_1x64x64",
}
"""The golden file of each network whose logits `run` compares."""
STEPS = "sgd_agc_nfnet_F0_2x32x32"
"""The golden file of the optimizer steps."""
OURS = "nfnet_f0.dm_in1k"
"""Our network with published weights that `run` compares."""
STOCK = "dm_nfnet_f0.dm_in1k"  # the same weights on the Hub
"""timm's network with the same weights."""

# A small network with every type of parameter, for checks that do not depend on values.
_TINY = {"depths": (1, 1, 1, 1), "channels": (32, 32, 64, 64), "group_size": 16, "num_classes": 10}


@dataclass(frozen=True)
class Verdict:
    """The result of one check.

    Attributes:
        name: What was checked, in words.
        measured: What was measured, as text.
        bound: What it was compared with, as text.
        ok: Whether the check passed; None if this machine cannot do it.
    """

    name: str
    measured: str
    bound: str
    ok: bool | None


def run(
    device: str = "cpu",
    pretrained: bool = False,
    image_file: str | Path | None = None,
    imagenet_val: str | Path | None = None,
    weights: str | Path | None = None,
    use_ema: bool = False,
    track: Progress = silent,
) -> Iterator[Verdict]:
    """Run all checks and yield their verdicts. If a check raises, its verdict is a failure and the others go on.

    Args:
        device: Where to run, as torch names it.
        pretrained: Also download the authors' weights, and compare our network with timm's on them.
        image_file: A picture for that comparison. By default it is noise.
        imagenet_val: A folder of validation pictures, one subfolder per class. Accuracies are compared on it.
        weights: A file of weights that were trained as one of timm's dm_nfnet_f*. If given, they are compared on
            `imagenet_val`, and the authors' are not.
        use_ema: Whether to take the averaged weights of that file.
        track: Shows progress.

    Raises:
        ValueError: before the first verdict, if `weights` cannot be read, belong to another network, or are given
            without `imagenet_val`.
    """
    if weights is not None and imagenet_val is None:
        raise ValueError("weights need pictures to compare the networks on: give imagenet_val")
    where = torch.device(device)
    torch.empty(1, device=where)  # raises here, before the first verdict, if there is no such device
    pair = None if weights is None else stock.load_pair(weights, use_ema)
    parts: list[tuple[str, Callable[[], Iterator[Verdict]]]] = [
        (name, lambda name=name: _forward_checks(name, where)) for name in FORWARD
    ]
    parts += [("three clipped steps", lambda: _step_checks(where)), ("no waiting", lambda: _waiting_checks(where))]
    if pair is not None and imagenet_val is not None:
        parts.append(("the checkpoint", lambda: _checkpoint_checks(pair, imagenet_val, where, track)))
    if pretrained or (imagenet_val is not None and pair is None):
        parts.append(("the authors' weights", lambda: _pretrained_checks(where, image_file, imagenet_val, track)))
    for name, part in track(parts, f"verifying on {device}"):
        try:
            # By default, NVIDIA GPUs round float32 convolutions to TF32.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield from part()
        except Exception as error:  # any exception: the other parts still run
            _logger.debug("%s stopped", name, exc_info=True)
            yield Verdict(f"{name}: stopped", reason(error), "no exception", False)


def _at_most(name: str, measured: float, bound: float) -> Verdict:
    return Verdict(name, f"{measured:.1e}", f"{bound:.0e}", measured <= bound)  # NaN fails


def _not_checked(name: str, why: str) -> Verdict:
    return Verdict(name, why, "", None)


def _has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS and some XPUs have none
        return False
    return True


def _outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    features = model.forward_features(x)
    return {"pool": model.forward_head(features, pre_logits=True), "logits": model.forward_head(features)}


@torch.no_grad()
def _forward_checks(name: str, device: torch.device) -> Iterator[Verdict]:
    golden = load_golden(FORWARD[name])
    model, x = golden_model(name), image(1, 64, 64)

    def error(model: nn.Module, x: Tensor) -> float:
        return max(relative_error(y, torch.from_numpy(golden[key])) for key, y in _outputs(model, x).items())

    if _has_float64(device):
        model, x = model.to(device), x.to(device)
        yield _at_most(f"{name}, float64, against the authors", error(model, x), 1e-11)
    else:
        yield _not_checked(f"{name}, float64, against the authors", f"{device.type} has no float64")
    model, x = model.float().to(device), x.float().to(device)
    yield _at_most(f"{name}, float32, against the authors", error(model, x), 1e-4)
    reference = model(x)

    label = f"{name}, bfloat16 autocast, against float32"
    if torch.amp.is_autocast_available(device.type):
        with torch.autocast(device.type, torch.bfloat16):
            yield _at_most(label, relative_error(model(x), reference), 5e-2)
    else:
        yield _not_checked(label, f"{device.type} has no autocast")
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    yield _at_most(f"{name}, channels_last, against contiguous", relative_error(model(x), reference), 1e-5)


def _step_checks(device: torch.device) -> Iterator[Verdict]:
    golden = load_golden(STEPS)
    dtype, bound = torch.float64, 1e-9
    if not _has_float64(device):
        dtype, bound = torch.float32, 1e-2  # deep layers have tiny gradients, which float32 rounds
    model = golden_model("nfnet_f0", num_classes=10).to(dtype).to(device).train()
    x, labels = image(2, 32, 32).to(dtype).to(device), (torch.arange(2) * 3 % 10).to(device)
    optimizer = create_optimizer_v2(
        model, "agcsgd", lr=0.02, momentum=0.9, weight_decay=2e-5, clip_factor=CLIP_FACTOR, clip_eps=CLIP_EPS
    )
    losses: list[Tensor] = []
    measured: dict[str, np.ndarray] = {}
    for step in range(3):
        loss = F.cross_entropy(model(x), labels)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            measured |= _summaries("grad0", gradients)
        optimizer.step()
    with torch.no_grad():
        losses.append(F.cross_entropy(model(x), labels))
    measured |= _summaries("param3", model.state_dict())
    label = f"agcsgd, {dtype_name(dtype)}"
    error = relative_error(torch.stack(losses), torch.from_numpy(golden["losses"]))
    yield _at_most(f"{label}, losses", error, bound)
    for prefix, what in (("grad0", "first gradient"), ("param3", "parameters after 3 steps")):
        keys = [key for key in golden if key.startswith(f"{prefix}|")]
        worst = max(relative_error(torch.from_numpy(measured[key]), torch.from_numpy(golden[key])) for key in keys)
        yield _at_most(f"{label}, {what}", worst, bound)


def _summaries(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Norm and first three entries of every tensor, in the authors' names and layout. Golden files hold the same."""
    summaries = {}
    for module, arrays in convert.timm_to_haiku(state_dict).items():
        for name, array in arrays.items():
            flat = array.astype(np.float64).ravel()
            summaries[f"{prefix}|{module}|{name}"] = np.r_[np.linalg.norm(flat), flat[:3]]
    return summaries


class _CountReads(TorchDispatchMode):
    """Counts the operations that give a tensor's value to Python. They return 0 instead."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
            return 0
        return func(*args, **(kwargs or {}))


def _tiny_optimizer(device: torch.device) -> torch.optim.Optimizer:
    """An `agcsgd` optimizer whose parameters have gradients."""
    model = timm.create_model("nfnet_f0", device=device, **_TINY)
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, momentum=0.9, weight_decay=2e-5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return optimizer


def _waiting_checks(device: torch.device) -> Iterator[Verdict]:
    # Meta tensors take the code path of accelerators. A value that is read there makes Python wait for the device.
    optimizer = _tiny_optimizer(torch.device("meta"))
    with _CountReads() as counter:
        optimizer.step()  # the first step makes the momentum buffers
        optimizer.step()
    yield Verdict("agcsgd, values read in two steps on the meta device", str(counter.reads), "0", counter.reads == 0)
    label = "agcsgd step, waits for the device"
    if device.type != "cuda":
        yield _not_checked(label, f"only CUDA reports this, not {device.type}")
        return
    optimizer = _tiny_optimizer(device)
    optimizer.step()  # CUDA's libraries may wait in their first calls
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        yield Verdict(label, " ".join(str(error).split())[:100], "none", False)
    else:
        yield Verdict(label, "none", "none", True)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@torch.no_grad()
def _pretrained_checks(
    device: torch.device,
    image_file: str | Path | None,
    imagenet_val: str | Path | None,
    track: Progress,
) -> Iterator[Verdict]:
    ours, theirs = (timm.create_model(n, pretrained=True).to(device).eval() for n in (OURS, STOCK))
    data = resolve_model_data_config(ours, use_test_size=True)
    if image_file is None:
        what, x = "noise", image(1, *data["input_size"][1:]).float()
    else:
        what = Path(image_file).name
        x = reader(ours)(image_file)[None]
    x = x.to(device)
    a, b = ours(x), theirs(x)
    # timm's formula differs by 1.8e-2 with synthetic parameters. A much larger error means another network.
    yield _at_most(f"{OURS} against timm's {STOCK}, {what}", relative_error(a, b), 3e-2)
    top1 = f"{a.argmax().item()} and {b.argmax().item()}"
    yield Verdict(f"the same, top-1 classes, {what}", top1, "equal", bool(a.argmax() == b.argmax()))
    if imagenet_val is None:
        return
    yield _accuracies(stock.compare(ours, theirs, imagenet_val, device, track))


def _checkpoint_checks(
    pair: stock.NetworkPair,
    folder: str | Path,
    device: torch.device,
    track: Progress,
) -> Iterator[Verdict]:
    seen = stock.compare(pair.ours.to(device), pair.stock.to(device), folder, device, track)
    label = f"{pair.origin} as {pair.name} against timm's dm_{pair.name}, logits of {counted(seen.images, 'image')}"
    yield _at_most(label, seen.error, 3e-2)
    yield _accuracies(seen)


def _accuracies(seen: stock.Agreement) -> Verdict:
    ours, theirs = seen.top1
    measured = f"{ours:.2f} % and {theirs:.2f} %"
    label = f"top-1 of {counted(seen.images, 'image')}, ours and timm's"
    return Verdict(label, measured, "within 0.5 %", abs(ours - theirs) <= 0.5)
