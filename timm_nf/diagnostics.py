"""Signal propagation of a network, block by block (arXiv:2101.08692, section 3), and what clipping would do to it.

timm's `extract_spp_stats` leaves its hooks on the model, runs it in training mode and does not see the residual
branch. These numbers equal those that the authors' code reports (nfnets/base.py, signal_metrics).
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from . import agc
from .blocks import NormFreeBlock


def _channel_stats(x: Tensor) -> tuple[float, float]:
    """Mean over channels of the squared mean and of the variance of (N, C, H, W), over N, H and W."""
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    return mean.square().mean().item(), var.mean().item()


@torch.no_grad()
def signal_stats(model: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Statistics of the signal after the stem and after every block, in evaluation mode.

    Args:
        model: A network of timm_nf; its mode is restored.
        x: (N, in_chans, H, W), on the model's device.

    Returns:
        One row for the stem and one for every block: `name`; `avg_sq_mean`, mean over channels of the squared channel
        mean; `avg_var`, mean channel variance; `res_avg_var`, that of the residual branch before stochastic depth and
        the skip gain, None for the stem; `expected_var`, 1 for the stem and 1 + k alpha^2 for the k-th block of a
        stage, which the variance follows where skip gains are 1.

    Raises:
        TypeError: if there is no normalizer-free block in the model.
    """
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, NormFreeBlock)]
    if not blocks:
        raise TypeError(f"expected a timm_nf network with normalizer-free blocks, got {type(model).__name__}")
    outputs: dict[nn.Module, Tensor] = {}
    rows: list[dict[str, Any]] = []

    def keep(module: nn.Module, _: Any, out: Tensor) -> None:
        outputs[module] = out

    def add_row(name: str, out: Tensor, res_avg_var: float | None, expected_var: float) -> None:
        avg_sq_mean, avg_var = _channel_stats(out)
        rows.append(
            {
                "name": name,
                "avg_sq_mean": avg_sq_mean,
                "avg_var": avg_var,
                "res_avg_var": res_avg_var,
                "expected_var": expected_var,
            }
        )

    def add_block(name: str, block: NormFreeBlock) -> Any:
        expected_var = 1 + (int(name.rpartition(".")[2]) + 1) * block.alpha**2

        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            branch = outputs.pop(block.conv3)
            if block.attn_last is not None:
                branch = 2 * outputs.pop(block.attn_last) * branch
            add_row(name, out, _channel_stats(branch)[1], expected_var)

        return hook

    def stem_hook(_: nn.Module, __: Any, out: Tensor) -> None:
        add_row("stem", out, None, 1.0)

    with ExitStack() as stack:
        for module in model.modules():  # each has a mode of its own: parts of a network may be frozen
            stack.callback(setattr, module, "training", module.training)
        stack.enter_context(model.get_submodule("stem").register_forward_hook(stem_hook))
        for name, block in blocks:
            for module in filter(None, (block.conv3, block.attn_last)):
                stack.enter_context(module.register_forward_hook(keep))
            stack.enter_context(block.register_forward_hook(add_block(name, block)))
        model.eval()(x)
    return rows


def agc_stats(model: nn.Module, clip_factor: float = 0.01, eps: float = 1e-3) -> list[dict[str, Any]]:
    """What adaptive clipping would do to the gradients that a backward pass has left; nothing is changed.

    Args:
        model: Any model, wrapped or not.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Weight norms below this count as this.

    Returns:
        One row for every parameter with a gradient: `name`; `units`; `zero_grad_units`, those with a gradient of
        exactly zero (at initialisation, with skip gains of 0, most of a normalizer-free network's);
        `clipped_fraction`, 0 for the classifier's weight, which is exempt; `ratio_quantiles` of gradient norm over
        weight norm.

    Raises:
        ValueError: A negative or NaN factor or eps, or a gradient that cannot be clipped.
    """
    agc.check_setting("clip_factor", clip_factor)
    agc.check_setting("eps", eps)
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    checked = agc.parameters_with_gradient(p for _, p in named)
    rows = agc.summaries(agc.measure(checked, clip_factor, eps), [[p] for _, p in named])
    exempt = {id(p) for p in agc.classifier_weights(model)}
    for (_, p), row in zip(named, rows, strict=True):
        row["clipped_fraction"] *= id(p) not in exempt
    return [{"name": name, **row} for (name, _), row in zip(named, rows, strict=True)]
