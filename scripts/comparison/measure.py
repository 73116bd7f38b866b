"""Makes the comparison's measurements: clipping, three training steps, times, networks."""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.models.nfnet as stock
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from benchmarks import differences  # first, because it needs stock timm's functions, which timm_nf replaces

# isort: split
import timm_nf
from scripts.comparison.peers import PEERS, PeerError
from scripts.comparison.probes import EPS, FACTOR
from timm_nf._relative_error import relative_error
from timm_nf.convert import timm_to_haiku
from timm_nf.verify.golden import golden_model, image

GOLDEN = Path(__file__).parents[2] / "timm_nf" / "verify" / "golden"
REPEATS = 11
PAUSE = 0.2  # seconds; without it the waiting threads of one process slow down the next
HARD = [("float16", 300.0), ("bfloat16", 1.0), ("float32", 1e25)]  # dtype of a gradient, and its entries
TYPES = ["convolutions", "squeeze-excite", "gains", "biases", "skip gains", "classifier"]

Arrays = dict[str, np.ndarray]
track = functools.partial(track, console=Console(stderr=True))


# -- one step of clipping ----------------------------------------------------------------------------------------------


def clip_reference(weight: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """The paper's clipping in float64: a unit is one output, or the whole of a vector, a gain or a scalar."""
    weight, grad = weight.astype(np.float64), grad.astype(np.float64)
    single = sum(n > 1 for n in weight.shape) <= 1
    axes = None if single else tuple(range(1, weight.ndim))

    def norm(x: np.ndarray) -> np.ndarray:
        return np.sqrt((x**2).sum(axes, keepdims=True))

    limit, size = FACTOR * np.maximum(norm(weight), EPS), norm(grad)
    return np.where(size > limit, grad * (limit / np.maximum(size, 1e-6)), grad)


def samples() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One parameter and gradient of every type, in float64. About half of their units are clipped."""
    rng = np.random.default_rng(0)
    shapes = {
        "convolution (64, 32, 3, 3)": (64, 32, 3, 3),
        "1x1 convolution (32, 64, 1, 1), squeeze-excite": (32, 64, 1, 1),
        "linear layer (48, 96)": (48, 96),
        "bias (64,)": (64,),
        "(64, 1, 1, 1), a gain": (64, 1, 1, 1),
        "(64,), a gain": (64,),
        "(), a skip gain": (),
    }
    found = {}
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape)
        spread = np.exp(rng.uniform(-2, 2, (*shape[:1], *[1] * (len(shape) - 1))))
        # a scalar is a single unit, which is clipped
        grad = rng.standard_normal(shape) * spread if shape else 3 * weight
        found[name] = (np.asarray(weight), np.asarray(FACTOR * grad))
    weight, grad = found["convolution (64, 32, 3, 3)"]
    found["convolution at zero, as some layers start"] = (np.zeros_like(weight), grad)
    return found


def clip(peer: Any, arrays: dict[str, tuple[np.ndarray, np.ndarray]], folder: Path, dtype: str | None = None) -> Arrays:
    """The gradients after the package has clipped them."""
    source, target = folder / "source.npz", folder / "target.npz"
    parameters = {f"p|{name}": weight for name, (weight, _) in arrays.items()}
    np.savez(source, **parameters, **{f"g|{name}": grad for name, (_, grad) in arrays.items()})
    peer.ask("clip", source=str(source), target=str(target), dtype=dtype)
    with np.load(target) as clipped:
        return dict(clipped)


def number(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"


def attempt(answer: Callable[[], str]) -> str:
    try:
        return answer()
    except PeerError as error:
        return str(error)


def clip_errors(peer: Any, folder: Path) -> list[str]:
    """Relative L2 errors against `clip_reference`, for every row of `samples` and then for the hard cases."""
    arrays = samples()
    try:
        clipped = clip(peer, arrays, folder)
        cells = [number(difference(clipped[name], clip_reference(*pair))) for name, pair in arrays.items()]
    except PeerError as error:
        cells = [str(error)] * len(arrays)
    weight, grad = (a.astype(np.float32) for a in arrays["convolution (64, 32, 3, 3)"])
    for dtype, scale in HARD:
        cells.append(attempt(functools.partial(_hard_case, peer, folder, dtype, weight, scale * np.sign(grad))))
    grad = grad.copy()
    grad[0, 0, 0, 0] = np.inf
    return [*cells, attempt(lambda: what_became(grad[0], clip(peer, {"x": (weight, grad)}, folder)["x"][0]))]


def clip_cases() -> list[str]:
    """The titles of the errors of `clip_errors`. For low precision they name the error of the rounded right answer."""
    arrays = samples()
    titles = [f"float64, {name}" for name in arrays]
    weight, grad = (a.astype(np.float32) for a in arrays["convolution (64, 32, 3, 3)"])
    for dtype, scale in HARD:
        exact = clip_reference(rounded(weight, dtype), rounded(scale * np.sign(grad), dtype))
        alone = number(difference(rounded(exact.astype(np.float32), dtype), exact))
        overflow = ", whose squares overflow" if scale > 1 else ""
        titles.append(f"{dtype}, convolution, entries of {scale:g}{overflow} (rounding alone: {alone})")
    return [*titles, "float32, a unit with an infinite entry"]


def _hard_case(peer: Any, folder: Path, dtype: str, weight: np.ndarray, grad: np.ndarray) -> str:
    weight, grad = rounded(weight, dtype), rounded(grad, dtype)
    clipped = clip(peer, {"x": (weight, grad)}, folder, dtype)["x"]
    return number(difference(clipped, clip_reference(weight, grad)))


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that the dtype can hold."""
    return torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()


def difference(value: np.ndarray, reference: np.ndarray) -> float:
    return relative_error(torch.from_numpy(np.asarray(value)), torch.from_numpy(np.asarray(reference)))


def what_became(before: np.ndarray, after: np.ndarray) -> str:
    """What happens to a unit with an infinite entry, in words. A loss scaler must see that it is not finite."""
    if np.array_equal(before, after):
        return "stays as it is"
    if np.isfinite(after).all():
        return "becomes finite"
    others = after[np.isfinite(before)]
    return f"{after[~np.isfinite(before)][0]}, its other entries {'0' if not others.any() else 'changed'}"


# -- three steps -------------------------------------------------------------------------------------------------------


def three_steps(peer: Any, folder: Path) -> list[str]:
    """Repeat the golden training of F0 with the package's clipping. The errors are those of the parameters' changes.

    The package clips all gradients except that of the classifier's weight.
    """
    golden = np.load(GOLDEN / "sgd_agc_nfnet_F0_2x32x32.npz")
    model = golden_model("nfnet_f0", num_classes=10).train()
    before = timm_to_haiku({name: p.detach().clone() for name, p in model.named_parameters()})
    groups = timm_nf.param_groups_agc(model, weight_decay=2e-5)
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    exempt = {id(p) for group in groups if "clip_factor" in group for p in group["params"]}
    clipped = {name: p for name, p in model.named_parameters() if id(p) not in exempt}
    x, labels = image(2, 32, 32), torch.arange(2) * 3 % 10
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        grads = clip(peer, {n: (p.detach().numpy(), p.grad.numpy()) for n, p in clipped.items()}, folder)
        for name, p in clipped.items():
            p.grad = torch.from_numpy(grads[name])
        optimizer.step()
    after = timm_to_haiku({name: p.detach() for name, p in model.named_parameters()})
    return [number(error) for error in change_errors(before, after, golden)]


def change_errors(before: dict[str, Arrays], after: dict[str, Arrays], golden: Any) -> list[float]:
    """Relative L2 error for each of `TYPES`, over the three entries of every tensor in the golden file."""
    squares = {name: np.zeros(2) for name in TYPES}
    for key in golden.files:
        if key.startswith("param3|"):
            _, module, name = key.split("|")
            start, end = (tree[module][name].ravel()[:3] for tree in (before, after))
            expected = golden[key][1:]
            squares[type_of(module, name)] += ((end - expected) ** 2).sum(), ((expected - start) ** 2).sum()
    return [float(np.sqrt(off / size)) for off, size in squares.values()]


def type_of(module: str, name: str) -> str:
    if "squeeze_excite" in module:
        return "squeeze-excite"
    if module.endswith("/linear"):
        return "classifier"
    return {"w": "convolutions", "gain": "gains", "bias": "biases", "skip_gain": "skip gains"}[name]


# -- times -------------------------------------------------------------------------------------------------------------


def clip_times(peers: dict[str, Any], folder: Path) -> list[list[str]]:
    """Milliseconds to clip F0's gradients in float32. The packages take turns, `REPEATS` times."""
    source = folder / "f0.npz"
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for name, p in timm.create_model("nfnet_f0").named_parameters():
        arrays |= {f"p|{name}": p.detach().numpy(), f"g|{name}": torch.randn(p.shape, generator=generator).numpy()}
    np.savez(source, **arrays)
    del arrays
    scales = {"every unit clipped": 1.0, "none clipped": 1e-9}
    times: dict[tuple[str, str], list[float]] = {}
    failed: dict[str, str] = {}
    for title, peer in track(peers.items(), "loading F0's gradients"):
        try:
            peer.ask("load", source=str(source))
        except PeerError as error:
            failed[title] = str(error)
    for repeat in track(range(REPEATS + 2), "timing"):
        for label, scale in scales.items():
            for title in [title for title in peers if title not in failed]:
                time.sleep(PAUSE)
                try:
                    seconds = peers[title].ask("time", scale=scale)
                except PeerError as error:
                    failed[title] = str(error)
                    continue
                if repeat >= 2:
                    times.setdefault((title, label), []).append(seconds)
    medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    table = []
    for title in peers:
        if title in failed:
            cells = [failed[title]] * len(scales)
        else:
            ratios = {label: medians[title, label] / medians["timm_nf", label] for label in scales}
            cells = [f"{medians[title, label]:.0f} ms ({ratio:.1f}x)" for label, ratio in ratios.items()]
        table.append([title, *cells, PEERS[title].clipping])
    return table


# -- networks ----------------------------------------------------------------------------------------------------------


def forward_rows(peers: dict[str, Any], folder: Path) -> list[list[str]]:
    def create(name: str) -> Callable[[], torch.nn.Module]:
        return lambda: timm.create_model(name)

    f0, how = "nfnet_F0_1x64x64.npz", "benchmarks/differences.py: the golden's parameters, loaded by name"
    return [
        ["timm_nf `nfnet_f0`", f0, f"{differences.logits_error(create('nfnet_f0')):.1e}", how],
        ["timm `dm_nfnet_f0`", f0, f"{differences.logits_error(create('dm_nfnet_f0')):.1e}", how],
        ["timm `nfnet_f0` (no skip gains)", f0, f"{differences.logits_error(stock.nfnet_f0):.1e}", how],
        *nfnets_pytorch_rows(peers["nfnets-pytorch"], folder),
        ["authors' code", "all", "0", "the goldens are its numbers"],
    ]


def nfnets_pytorch_rows(peer: Any, folder: Path) -> list[list[str]]:
    """Rows for two ways to load its NF-ResNet50, its only network with a golden file."""
    golden = np.load(GOLDEN / "nf_resnet_ResNet50_1x64x64.npz")
    model = golden_model("dm_nf_resnet50")
    x = image(1, 64, 64)
    table = []
    for given in ("golden", "common"):
        if given == "common":
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith((".bias", "skipinit_gain")) and not name.startswith("head."):
                        p.fill_(float(name.endswith("gain")))
            reference, label = model(x).detach().numpy(), "our `dm_nf_resnet50` with biases at 0, skip gains at 1"
        else:
            reference, label = golden["logits"], "nf_resnet_ResNet50_1x64x64.npz"
        np.savez(folder / "source.npz", x=x.numpy(), **torchvision_names(model.state_dict()))
        try:
            left = peer.ask("forward", source=str(folder / "source.npz"), target=str(folder / "target.npz"))
            error = f"{difference(np.load(folder / 'target.npz')['logits'], reference):.1e}"
            how = f"run; it has no place for {len(left)} tensors, biases of convolutions and skip gains"
        except PeerError as reason:
            error, how = str(reason), ""
        table.append(["nfnets-pytorch `nf_resnet50` (it has no NFNet)", label, error, how])
    return table


def torchvision_names(state_dict: dict[str, torch.Tensor]) -> Arrays:
    """Parameters of a dm_nf_resnet under the names that nfnets-pytorch took from torchvision."""
    renamed = {}
    for name, tensor in state_dict.items():
        pieces = name.split(".")
        if pieces[0] == "stages":
            pieces = [f"layer{int(pieces[1]) + 1}", *pieces[2:]]
        new = ".".join(pieces).replace("stem.conv.", "conv1.").replace("downsample.conv.", "downsample.0.")
        renamed[new.replace("head.fc.", "fc.")] = tensor.numpy()
    return renamed


def standardisation_rows(peers: dict[str, Any], folder: Path) -> list[list[str]]:
    """Rows for the applied weight of a 3x3 convolution, against (w - mean) gain / sqrt(max(N var, 1e-4)) in float64."""
    rng = np.random.default_rng(0)
    weight, gain = 0.1 + 0.05 * rng.standard_normal((64, 32, 3, 3)), 1 + 0.1 * rng.standard_normal(64)
    centred = weight - weight.mean((1, 2, 3), keepdims=True)
    scale = gain[:, None, None, None] / np.sqrt(np.maximum((centred**2).sum((1, 2, 3), keepdims=True), 1e-4))
    np.savez(folder / "source.npz", weight=weight, gain=gain)
    table = []
    for title in ("timm_nf", "timm", "nfnets-pytorch"):
        try:
            for layer in peers[title].ask(
                "standardized", source=str(folder / "source.npz"), target=str(folder / "target.npz")
            ):
                applied = np.load(folder / "target.npz")[layer]
                table.append([f"{title} {layer}", f"{difference(applied, centred * scale):.0e}"])
        except PeerError as error:
            table.append([title, str(error)])
    return table
