"""Answers the questions to a package that need no arrays. worker.py runs this file in the package's environment."""

import collections
import collections.abc
import platform
import runpy
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import answers

# optax's environment has no torch and no timm, so this file does not import timm_nf.
_DEFAULTS = runpy.run_path(str(Path(__file__).parents[2] / "timm_nf" / "_clip_defaults.py"))
FACTOR, EPS = _DEFAULTS["CLIP_FACTOR"], _DEFAULTS["CLIP_EPS"]
PACKAGES = {"composer": "mosaicml", "nfnets": "nfnets-pytorch"}  # packages whose distribution has another name


def versions(peer: str) -> dict[str, str]:
    name = PACKAGES.get(peer, peer)
    found = distribution(name)
    licence = found.metadata["License-Expression"] or found.metadata["License"]
    if not licence:
        files = [file for file in found.files or [] if file.name == "LICENSE"]
        stated = [c for c in found.metadata.get_all("Classifier") or [] if c.startswith("License")]
        stated += [line for file in files for line in file.read_text().splitlines() if line.strip()]
        licence = stated[0].rpartition(" :: ")[2].strip() if stated else "not stated"
    engine = "jax" if peer == "optax" else "torch"
    ran = f"{engine} {version(engine)}, Python {platform.python_version()}"
    return {"version": version(name), "licence": licence, "ran": ran}


def networks(peer: str) -> str:
    """The number of normalizer-free networks, and the number of those with weights."""
    if peer == "nfnets":
        from nfnets.models import resnet

        found = [name for name in dir(resnet) if name.startswith(("nf_resne", "nf_wide"))]
        return f"{len(found)} NF-ResNets ({found[0]} ... {found[-1]}), no NFNet, 0 with weights"
    import timm

    if peer == "timm_nf":
        import timm_nf  # noqa: F401
    found = timm.list_models(module="nfnets" if peer == "timm_nf" else "nfnet")
    weights = [name for name in timm.list_pretrained() if name.partition(".")[0] in found]
    return f"{len(found)}, {len(weights)} with weights"


def standardized(peer: str, source: str, target: str) -> list[str]:
    """The weights that the package's convolution applies. They are its outputs for unit impulses."""
    import torch

    with np.load(source) as arrays:
        weight, gain = (torch.from_numpy(arrays[key]) for key in ("weight", "gain"))
    out_chs, in_chs, kernel, _ = weight.shape
    layers: dict[str, Any]
    if peer == "timm_nf":
        from timm_nf.layers import ScaledStdConv2d

        layers = {"ScaledStdConv2d": ScaledStdConv2d(in_chs, out_chs, kernel)}
    elif peer == "timm":
        from timm.layers import ScaledStdConv2d

        layers = {"ScaledStdConv2d, eps as in `dm_nfnet_*`": ScaledStdConv2d(in_chs, out_chs, kernel, eps=1e-5)}
    else:
        import nfnets

        layers = {name: getattr(nfnets, name)(in_chs, out_chs, kernel) for name in ("WSConv2d", "ScaledStdConv2d")}
    impulses = torch.eye(weight[0].numel(), dtype=weight.dtype).view(-1, in_chs, kernel, kernel)
    applied = {}
    for name, layer in layers.items():
        state = {"weight": weight, "gain": gain.view(layer.gain.shape), "bias": torch.zeros(out_chs)}
        layer.double().load_state_dict(state)
        with torch.no_grad():
            answers = layer(impulses)  # with padding, the middle pixel gets every weight
            middle = answers[:, :, answers.shape[2] // 2, answers.shape[3] // 2]
            applied[name] = middle.T.reshape(weight.shape).numpy()
    np.savez(target, **applied)
    return list(applied)


def forward(peer: str, source: str, target: str) -> list[str]:
    """The logits of nfnets-pytorch's nf_resnet50 with these parameters, and the names of those that it lacks."""
    import torch
    from nfnets.models.resnet import nf_resnet50

    with np.load(source) as arrays:
        given = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    x = given.pop("x")
    model = nf_resnet50().double().eval()
    own = model.state_dict()
    model.load_state_dict({key: given[key].reshape(value.shape) for key, value in own.items()})
    with torch.no_grad():
        np.savez(target, logits=model(x).numpy())
    return sorted(given.keys() - own.keys())


def classifier(peer: str) -> str:
    """What happens to the classifier's weight and bias if the package is asked, in its own way, not to clip it."""
    if peer == "optax":
        import jax
        import optax

        params = {"fc": {"w": np.ones((4, 3)), "b": np.ones(3)}}
        mask = {"fc": {"w": False, "b": True}}
        grads = jax.tree.map(np.ones_like, params)
        clip = optax.masked(optax.adaptive_grad_clip(FACTOR, EPS), mask)
        clipped, _ = clip.update(grads, clip.init(params), params)
        return answers.clipped(*(bool((np.asarray(clipped["fc"][key]) != 1).any()) for key in "wb"))
    import torch

    model = torch.nn.Sequential(collections.OrderedDict(body=torch.nn.Linear(4, 4), fc=torch.nn.Linear(4, 3)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if peer == "nfnets":
        from nfnets.agc import AGC

        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        AGC(model.parameters(), sgd, FACTOR, EPS, model=model, ignore_agc=["fc"]).step()
    else:
        from composer.algorithms.gradient_clipping import apply_gradient_clipping

        apply_gradient_clipping(model, "adaptive", FACTOR, fsdp_enabled=False)
    return answers.clipped(*(bool((p.grad != 1).any()) for p in model.fc.parameters()))


def decayed_gains(peer: str) -> str:
    """The gains of timm's F0 that have weight decay in the groups which pytorch_optimizer makes."""
    import timm
    from pytorch_optimizer import get_optimizer_parameters

    model = timm.create_model("dm_nfnet_f0")
    groups = get_optimizer_parameters(model, 2e-5)
    return answers.decayed(groups, [p for name, p in model.named_parameters() if name.endswith("gain")])


def fused(peer: str) -> str:
    """The number of standardising convolutions in F0, before and after the package's conversion for inference."""
    import timm

    if peer == "timm_nf":
        import timm_nf

        name, fuse = "nfnet_f0", timm_nf.fuse
    else:
        from timm.utils import reparameterize_model as fuse

        name = "dm_nfnet_f0"
    model = timm.create_model(name)
    count = [sum("ScaledStd" in type(m).__name__ for m in net.modules()) for net in (model, fuse(model))]
    return f"{count[1]} of {count[0]} standardising convolutions left"


def authors_checkpoint(peer: str, file: str, overrides: dict[str, Any]) -> str:
    """Whether timm itself loads a file of the authors, here of a tiny network."""
    import timm

    if peer == "timm_nf":
        import timm_nf  # noqa: F401
    name = "nfnet_f0" if peer == "timm_nf" else "dm_nfnet_f0"
    timm.create_model(name, checkpoint_path=file, **overrides)
    return "loads"


def prepare(peer: str) -> None:
    """Make the package importable."""
    if peer == "nfnets":  # `from collections import Iterable`, gone since Python 3.10
        collections.Iterable = collections.abc.Iterable  # type: ignore[attr-defined]


def last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:200]
