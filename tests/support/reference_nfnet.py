"""The normalizer-free networks in plain NumPy, float64, as literal and as slow as the papers' formulas.

What the tests compare the package with. It shares nothing with it: images are NHWC, convolutions HWIO, parameters have
the names of the authors' haiku trees, no constant is folded, and one function serves the three families.

Sources: arXiv:2101.08692, arXiv:2102.06171; checked against the authors' numbers in test_golden.py and their parameter
trees in test_variants.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Params = Mapping[str, Mapping[str, Array]]  # {module: {name: array}}


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


# name -> (function, gamma)
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], float]] = {
    "identity": (lambda x: x, 1.0),
    "celu": (_elu, 1.270926833152771),
    "elu": (_elu, 1.2716004848480225),
    "gelu": (lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), 1.7015043497085571),
    "leaky_relu": (lambda x: np.where(x >= 0, x, 0.01 * x), 1.70590341091156),
    "log_sigmoid": (lambda x: -np.logaddexp(-x, 0), 1.9193484783172607),
    "relu": (lambda x: np.maximum(x, 0), 1.7139588594436646),
    "relu6": (lambda x: np.clip(x, 0, 6), 1.7131484746932983),
    "selu": (
        lambda x: 1.0507009873554804934 * np.where(x > 0, x, 1.6732632423543772848 * np.expm1(np.minimum(x, 0))),
        1.0008515119552612,
    ),
    "sigmoid": (_sigmoid, 4.803835391998291),
    "silu": (lambda x: x * _sigmoid(x), 1.7881293296813965),
    "softplus": (lambda x: np.logaddexp(x, 0), 1.9203323125839233),
    "softsign": (lambda x: x / (1 + np.abs(x)), 2.338853120803833),
    "tanh": (np.tanh, 1.5939117670059204),
}


def activation(name: str, x: Array) -> Array:
    """gamma * act(x)."""
    function, gamma = ACTIVATIONS[name]
    return gamma * function(x)


def standardize(w: Array, gain: Array, eps: float = 1e-4) -> Array:
    """(..., O) with zero mean and norm `gain` over all axes but the last, (w - mean) * gain / sqrt(max(N var, eps))."""
    axes = tuple(range(w.ndim - 1))
    centred = w - w.mean(axes)
    centred = centred - centred.mean(axes)  # exact where the mean dwarfs the spread
    return centred * gain / np.sqrt(np.maximum((centred**2).sum(axes), eps))


def _windows(x: Array, kernel: int, stride: int, fill: float) -> Array:
    """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), C, kernel, kernel), the odd zero at the end."""
    pads = [(0, 0)]
    for size in x.shape[1:3]:
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (1, 2))[:, ::stride, ::stride]


def conv(x: Array, w: Array, bias: Array, stride: int = 1) -> Array:
    """SAME convolution with w (K, K, I, O) in C / I groups."""
    windows = _windows(x, w.shape[0], stride, 0.0)
    groups = x.shape[-1] // w.shape[2]
    pieces = zip(np.split(windows, groups, 3), np.split(w, groups, 3), strict=True)
    return np.concatenate([np.tensordot(a, b, ((3, 4, 5), (2, 0, 1))) for a, b in pieces], -1) + bias


def max_pool(x: Array, kernel: int, stride: int) -> Array:
    """SAME maximum, padding ignored."""
    return _windows(x, kernel, stride, -np.inf).max((-2, -1))


def avg_pool(x: Array, kernel: int, stride: int) -> Array:
    """SAME mean of what lies inside the image."""
    return np.nanmean(_windows(x, kernel, stride, np.nan), (-2, -1))


def ws_conv(x: Array, p: Mapping[str, Array], stride: int = 1) -> Array:
    """Convolution with a standardised weight."""
    return conv(x, standardize(p["w"], p["gain"]), p["bias"], stride)


def squeeze_excite(x: Array, fc1: Mapping[str, Array], fc2: Mapping[str, Array]) -> Array:
    """The gate (N, 1, 1, C)."""
    hidden = np.maximum(x.mean((1, 2)) @ fc1["w"] + fc1["b"], 0)
    return _sigmoid(hidden @ fc2["w"] + fc2["b"])[:, None, None]


def unitwise_norm(x: Array) -> Array:
    """L2 norm of every output unit, keepdims, of a haiku parameter; one unit if at most one axis is longer than 1."""
    one = x.squeeze().ndim <= 1
    return np.sqrt((x**2).sum(None if one else tuple(range(x.ndim - 1)), keepdims=True))


def stochastic_depth_rates(rate: float, blocks: int) -> list[float]:
    """Rate of every block."""
    return [rate * i / blocks for i in range(blocks)]


@dataclasses.dataclass(frozen=True)
class Net:
    """A network; the words are those of the package, the defaults the authors' for its family."""

    family: str  # NFNet, NF_ResNet or NF_RegNet
    depths: tuple[int, ...]
    channels: tuple[int, ...]
    num_classes: int = 1000
    in_chans: int = 3
    alpha: float = 0.2
    extra_conv: bool = True  # NFNet only
    num_features: int | None = None  # before width_factor
    stem_chs: int | None = None  # before width_factor
    # 0 and "" stand for the family's default
    act_layer: str = ""
    group_size: int | None = 0  # None for no groups
    bottle_ratio: float = 0
    width_factor: float = 0
    rd_ratio: float | None = 0  # None for no squeeze-excite

    def __post_init__(self) -> None:
        names = ("act_layer", "group_size", "bottle_ratio", "width_factor", "rd_ratio")
        defaults = {
            "NFNet": ("gelu", 128, 0.5, 1.0, 0.5),
            "NF_ResNet": ("relu", None, 0.25, 1.0, None),
            "NF_RegNet": ("silu", 8, 2.25, 0.75, 0.5),
        }[self.family]
        for name, default in zip(names, defaults, strict=True):
            if getattr(self, name) in (0, ""):
                object.__setattr__(self, name, default)

    @property
    def block_name(self) -> str:
        return "nf_res_block" if self.family == "NF_ResNet" else "nf_block"

    def stem(self) -> list[tuple[str, int, int, int]]:
        """(module, kernel, stride, output channels) of the stem's convolutions."""
        scaled = None if self.stem_chs is None else int(self.stem_chs * self.width_factor)
        first = int(self.channels[0] * self.width_factor)
        if self.family == "NF_ResNet":
            return [("initial_conv", 7, 2, scaled or first // 4)]
        if self.family == "NF_RegNet":
            return [("initial_conv", 3, 2, scaled or first)]
        last = scaled or self.channels[0] // 2
        return [(f"stem_conv{i}", 3, s, c) for i, (s, c) in enumerate(((2, 16), (1, 32), (1, 64), (2, last)))]

    def blocks(self) -> list[dict[str, Any]]:
        """in_chs, out_chs, mid_chs, stride, beta, shortcut (a convolution or not) of every block."""
        rows, in_chs, var = [], self.stem()[-1][-1], 1.0
        for stage, (depth, channels) in enumerate(zip(self.depths, self.channels, strict=True)):
            for index in range(depth):
                out_chs = int(channels * self.width_factor)
                ratio = 1 if self.family == "NF_RegNet" and not rows else self.bottle_ratio
                mid_chs = int((in_chs if self.family == "NF_RegNet" else out_chs) * ratio)
                mid_chs -= mid_chs % (self.group_size or 1)
                stride = 2 if index == 0 and (stage > 0 or self.family == "NF_RegNet") else 1
                shortcut = stride == 2 or in_chs != out_chs
                row = {"in_chs": in_chs, "out_chs": out_chs, "mid_chs": mid_chs, "stride": stride, "beta": var**0.5}
                rows.append(row | {"shortcut": shortcut})
                in_chs = out_chs
                var = (1.0 if index == 0 else var) + self.alpha**2
        return rows

    def final_chs(self) -> int:
        """Channels of the final convolution, 0 for none."""
        if self.num_features is not None:
            return int(self.num_features * self.width_factor)
        last = int(self.channels[-1] * self.width_factor)
        return {"NFNet": 2 * last, "NF_ResNet": 0, "NF_RegNet": 1280 * last // 440}[self.family]

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The haiku tree, {module: {name: shape}}."""
        tree: dict[str, dict[str, tuple[int, ...]]] = {}

        def add_conv(module: str, kernel: int, in_chs: int, out_chs: int) -> None:
            tree[module] = {"w": (kernel, kernel, in_chs, out_chs), "gain": (out_chs,), "bias": (out_chs,)}

        def add_linear(module: str, in_chs: int, out_chs: int) -> None:
            tree[module] = {"w": (in_chs, out_chs), "b": (out_chs,)}

        chs = self.in_chans
        for module, kernel, _, out_chs in self.stem():
            add_conv(f"{self.family}/~/{module}", kernel, chs, out_chs)
            chs = out_chs
        for number, row in enumerate(self.blocks()):
            block = self._block(number)
            mid, out = row["mid_chs"], row["out_chs"]
            per_group = self.group_size or mid
            tree[block] = {"skip_gain": ()}
            add_conv(f"{block}/~/conv0", 1, row["in_chs"], mid)
            add_conv(f"{block}/~/conv1", 3, per_group, mid)
            if self.family == "NFNet" and self.extra_conv:
                add_conv(f"{block}/~/conv1b", 3, per_group, mid)
            add_conv(f"{block}/~/conv2", 1, mid, out)
            if row["shortcut"]:
                add_conv(f"{block}/~/conv_shortcut", 1, row["in_chs"], out)
            if self.rd_ratio is not None:
                width = mid if self.family == "NF_RegNet" else out
                hidden = max(1, int(width * self.rd_ratio))
                add_linear(f"{block}/~/squeeze_excite/~/linear", width, hidden)
                add_linear(f"{block}/~/squeeze_excite/~/linear_1", hidden, width)
            chs = out
        if final := self.final_chs():
            add_conv(f"{self.family}/~/final_conv", 1, chs, final)
            chs = final
        add_linear(f"{self.family}/~/linear", chs, self.num_classes)
        return tree

    def _block(self, number: int) -> str:
        return f"{self.family}/~/{self.block_name}" + (f"_{number}" if number else "")

    def block(self, params: Params, number: int, x: Array) -> tuple[Array, float]:
        """Output of one block, and the mean channel variance of its branch before the skip gain."""
        row, name = self.blocks()[number], self._block(number)
        p = {module.removeprefix(f"{name}/~/"): entries for module, entries in params.items()}

        def gate(y: Array) -> Array:
            return 2 * squeeze_excite(y, p["squeeze_excite/~/linear"], p["squeeze_excite/~/linear_1"])

        out = activation(self.act_layer, x) / row["beta"]
        shortcut = x
        if row["shortcut"]:
            shortcut, stride = out, row["stride"]
            if stride == 2 and self.family != "NF_ResNet":
                shortcut, stride = avg_pool(out, 2, 2), 1
            shortcut = ws_conv(shortcut, p["conv_shortcut"], stride)
        out = ws_conv(out, p["conv0"])
        out = ws_conv(activation(self.act_layer, out), p["conv1"], row["stride"])
        if self.family == "NFNet" and self.extra_conv:
            out = ws_conv(activation(self.act_layer, out), p["conv1b"])
        if self.rd_ratio is not None and self.family == "NF_RegNet":
            out = gate(out) * out
        out = ws_conv(activation(self.act_layer, out), p["conv2"])
        if self.rd_ratio is not None and self.family != "NF_RegNet":
            out = gate(out) * out
        return shortcut + self.alpha * params[name]["skip_gain"] * out, out.var((0, 1, 2)).mean()

    def forward(self, params: Params, x: Array) -> dict[str, Any]:
        """Evaluation: logits, pool, features (what is pooled), and the signal metrics of the golden files."""
        outputs: dict[str, Any] = {}

        def measure(i: int, y: Array) -> None:
            outputs[f"avg_sq_mean_{i}"] = (y.mean((0, 1, 2)) ** 2).mean()
            outputs[f"avg_var_{i}"] = y.var((0, 1, 2)).mean()

        for i, (module, _, stride, _) in enumerate(self.stem()):
            x = ws_conv(activation(self.act_layer, x) if i else x, params[f"{self.family}/~/{module}"], stride)
        if self.family == "NF_ResNet":
            x = max_pool(x, 3, 2)
        measure(0, x)
        for number in range(sum(self.depths)):
            x, outputs[f"res_avg_var_{number}"] = self.block(params, number, x)
            measure(number + 1, x)
        if self.final_chs():
            x = ws_conv(x, params[f"{self.family}/~/final_conv"])
        outputs["features"] = activation(self.act_layer, x)
        outputs["pool"] = outputs["features"].mean((1, 2))
        linear = params[f"{self.family}/~/linear"]
        return outputs | {"logits": outputs["pool"] @ linear["w"] + linear["b"]}


def authors_name(name: str) -> str:
    """NFNet-F0+, NF-ResNet50 or NF-RegNet-B0."""
    family, _, variant = name.removeprefix("dm_").replace("_plus", "+").rpartition("_")
    return {"nfnet": f"NFNet-{variant.upper()}", "nf": f"NF-ResNet{variant[6:]}"}.get(
        family, f"NF-RegNet-{variant.upper()}"
    )
