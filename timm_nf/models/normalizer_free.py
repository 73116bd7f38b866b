"""Makes normalizer-free networks from normalised ones.

`replace_convs` only replaces layers. `normalizer_free` takes networks of convolutions, batch normalisation, activations
and residual additions, such as the ResNets of torchvision and timm. It follows the signal's variance through the
network, and puts beta, alpha, gamma and skip gains where the paper has them.

Sources: arXiv:2101.08692, section 4; arXiv:2102.06171, section 3.
"""

# Graphs of torch.fx and timm's layers have no types.
# pyright: standard, reportPrivateImportUsage=false

import copy
import operator
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import timm.layers as timm_layers
import torch
import torch.nn.functional as F
from timm.layers.drop import DropBlock2d
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .._text import reason
from ..layers.activations import ACTIVATIONS, Activation, activation_gain, create_activation
from ..layers.residual import SkipInit
from ..layers.std_conv import (
    STANDARDIZED_LAYERS,
    ScaledStdConv1d,
    ScaledStdConv2d,
    ScaledStdConv3d,
    ScaledStdConvTranspose1d,
    ScaledStdConvTranspose2d,
    ScaledStdConvTranspose3d,
    bake,
)

__all__ = ["ResidualBlock", "normalizer_free", "replace_convs"]

_ALPHA = 0.2  # arXiv:2102.06171, section 3

_TWINS: dict[type, Any] = {
    nn.Conv1d: ScaledStdConv1d,
    nn.Conv2d: ScaledStdConv2d,
    nn.Conv3d: ScaledStdConv3d,
    nn.ConvTranspose1d: ScaledStdConvTranspose1d,
    nn.ConvTranspose2d: ScaledStdConvTranspose2d,
    nn.ConvTranspose3d: ScaledStdConvTranspose3d,
    # timm's convolutions that standardise by another formula, or pad SAME.
    timm_layers.StdConv2d: ScaledStdConv2d,
    timm_layers.Conv2dSame: ScaledStdConv2d,
    timm_layers.StdConv2dSame: ScaledStdConv2d,
}
_STANDARDISED = (*STANDARDIZED_LAYERS, timm_layers.ScaledStdConv2d, timm_layers.ScaledStdConv2dSame)
_SAME = (timm_layers.Conv2dSame, timm_layers.StdConv2dSame)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)
_NORM_ACTS = (timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct, timm_layers.GroupNormAct)
_ANY_NORM = (*_NORMS, *_NORM_ACTS, nn.LayerNorm, nn.modules.instancenorm.InstanceNorm2d, nn.LocalResponseNorm)
_GATES = (timm_layers.SEModule, timm_layers.EcaModule)  # a sigmoid, which is 0.5 at initialisation
_PASSING = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.ConstantPad2d),
    *(timm_layers.AvgPool2dSame, MaxPool2dSame, DropBlock2d),
)
_MAX_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3, MaxPool2dSame: 2}
_PASSING_FUNCTIONS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool2d, F.dropout, torch.max_pool2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu"}


# -- layers ------------------------------------------------------------------------------------------------------------


def _convolution(module: nn.Module) -> type | None:
    """Which of the convolutions with a twin a module is; None if it is none, or may compute something else.

    Subclasses count if they override nothing that computes, such as torchvision's for video.
    """
    classes = type(module).__mro__
    index = next((i for i, each in enumerate(classes) if each in _TWINS), None)
    if index is None or is_parametrized(module):
        return None
    own = {name for each in classes[:index] for name in vars(each) if not name.startswith("__")}
    overridden = own & set(dir(classes[index])) - {"extra_repr", "reset_parameters"}
    return None if overridden else classes[index]


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
        raise ValueError(f"{name} has hooks, which would be lost: remove them, convert, and put them on the copy")


def _standardised(conv: Any, name: str, scale: float = 1.0) -> Any:
    """A standardised convolution with the weight and the bias of a plain one, and gain 1.

    Raises:
        ValueError: if the convolution cannot be standardised, or has hooks.
    """
    _refuse_hooks(conv, name)
    if prod(conv.weight.shape) == conv.out_channels:
        raise ValueError(f"{name} has a fan-in of 1, and nothing is left of one weight less its mean")
    transposed: dict[str, Any] = {}
    if conv.transposed:
        transposed["output_padding"] = conv.output_padding
    layer = _convolution(conv)
    assert layer is not None
    twin: Any = _TWINS[layer](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        "same" if layer in _SAME else conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        device="meta",
        dtype=conv.weight.dtype,
        scale=scale,
        **transposed,
    )
    bake(twin, conv, conv.weight)
    device = conv.weight.device
    if conv.bias is None:
        twin.bias = nn.Parameter(torch.zeros(conv.out_channels, dtype=conv.weight.dtype, device=device))
    twin.gain = nn.Parameter(torch.ones_like(twin.gain, device=device))
    return twin


def replace_convs(model: nn.Module) -> nn.Module:
    """Copy a model and replace its convolutions by standardised ones. Nothing else changes.

    Weights and biases stay, and gains are 1. Convolutions without a bias get one of zero. The classifier stays plain.

    This is enough if normalisation stays (Weight Standardization beside GroupNorm), or if there never was any. In a
    residual network without normalisation, the variance grows block by block, and activations need their gamma. Use
    `normalizer_free` there.

    Args:
        model: Any module with torch's or timm's convolutions, plain or transposed. It is not changed.

    Returns:
        The copy. It shares no tensor with `model`.

    Raises:
        ValueError: if there is no convolution, or if one cannot be standardised, such as one under `weight_norm`.

    Examples:
        >>> type(replace_convs(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))[0]).__name__
        'ScaledStdConv2d'
    """
    spared = _classifier(model)
    every = {n: m for n, m in model.named_modules() if isinstance(m, tuple(_TWINS)) and m not in spared}
    convs = {n: m for n, m in every.items() if not isinstance(m, _STANDARDISED)}
    for name, conv in convs.items():
        if _convolution(conv) is None:
            raise ValueError(
                f"{name} is a {type(conv).__name__}, which computes its weight or output in another way than torch's "
                "and timm's convolutions: make it one of these first"
            )
    if not convs:
        raise ValueError(f"{type(model).__name__} has no convolution to replace: expected torch's or timm's layers")
    return copy.deepcopy(model, {id(conv): _standardised(conv, name) for name, conv in convs.items()})


def _classifier(model: Any) -> set[nn.Module]:
    """The modules of the classifier, without any if the model does not say what its classifier is."""
    if not callable(getattr(model, "get_classifier", None)):
        return set()
    heads = model.get_classifier()
    if isinstance(heads, nn.Module):
        heads = (heads,)
    return {module for head in heads or () for module in head.modules()}


class ResidualBlock(nn.Module):
    """`shortcut + alpha * skip_gain * branch(act(x) / beta)`, made of the layers of another network's block.

    Args:
        act: The activation before the branch. Its gamma and 1 / beta are in the scale of the next convolutions.
        branch: The branch, (N, I, ...) -> (N, O, ...).
        shortcut: What the shortcut computes from the activated input, (N, I, ...) -> (N, O, ...). None adds the input
            itself.
        skip: Adds the branch to the shortcut.
        expected_var: Variance of the sum for noise as the input, with a skip gain of 1.

    Attributes:
        final_act: What follows the sum. Only the last block of a network whose blocks ended in activations has one.
    """

    def __init__(
        self, act: nn.Module, branch: nn.Module, shortcut: nn.Module | None, skip: SkipInit, expected_var: float
    ) -> None:
        super().__init__()
        self.act, self.branch, self.shortcut, self.skip = act, branch, shortcut, skip
        self.expected_var = expected_var
        self.final_act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ...) -> (N, O, ...)."""
        out = self.act(x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.final_act(self.skip(shortcut, self.branch(out)))

    def extra_repr(self) -> str:
        return f"expected_var={self.expected_var:.4f}"


# -- what modules are --------------------------------------------------------------------------------------------------


def _is_gate(module: nn.Module) -> bool:
    layer = type(module)
    name = f"{layer.__module__}.{layer.__name__}"  # torchvision is timm's dependency, not ours
    return isinstance(module, _GATES) or name == "torchvision.ops.misc.SqueezeExcitation"


def _drop_rate(module: Any) -> float | None:
    """The rate of stochastic depth, None for other modules."""
    return module.drop_prob if isinstance(module, timm_layers.DropPath) else None


@torch.no_grad()
def _gamma(module: nn.Module) -> float | None:
    """Gamma of an activation that computes one of the authors' functions, None for other modules.

    The tolerance takes exact gelu for the tanh form. They differ by 5e-4.
    """
    is_activation = type(module).__module__.rpartition(".")[2].startswith("activation")
    if not is_activation or next(module.parameters(), None) is not None:
        return None
    z = torch.linspace(-8, 8, 161, device="cpu")  # also inside `with torch.device("meta")`
    try:
        got = module(z.clone())
    except (TypeError, RuntimeError, IndexError):  # a softmax over channels, a gate of two halves
        return None
    for name in ACTIVATIONS:
        if name != "identity" and got.shape == z.shape and torch.allclose(got, create_activation(name)(z), 0, 1e-3):
            return activation_gain(name)
    return None


def _scaled(act: nn.Module, gain: float) -> Activation:
    found = Activation("identity", gain)
    found.act = act
    return found


class _Op(NamedTuple):
    """One step of a chain: a module, or the module of a function."""

    name: str
    module: nn.Module


def _expand(name: str, module: Any) -> list[_Op]:
    """The steps of a module. Normalisation with an activation in it has two."""
    if not isinstance(module, _NORM_ACTS):
        return [_Op(name, module)]
    norm = nn.BatchNorm2d(1, device="meta")  # a stand-in: normalisation is dropped later
    act: Any = module.act
    return [_Op(name, norm), _Op(name, act)]


# -- graphs ------------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces into modules, down to blocks and to the layers that the conversion knows."""

    def __init__(self, blocks: set[str], spared: set[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.spared = blocks, spared

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.blocks or m in self.spared or _is_gate(m) or _convolution(m):
            return True
        if isinstance(m, (nn.Sequential, nn.ModuleList)):
            return False
        if not type(m).__module__.startswith(("torch.nn", "timm.layers")):
            return False
        inside = [x for x in m.modules() if x is not m]
        is_converted = any(_convolution(x) or isinstance(x, _ANY_NORM) for x in inside)
        return isinstance(m, _ANY_NORM) or not is_converted


def _graph(module: nn.Module, name: str, blocks: set[str], spared: set[nn.Module]) -> fx.Graph:
    try:
        return _Tracer(blocks, spared).trace(module)
    except Exception as error:  # a forward can do anything with the stand-ins of its tensors
        raise ValueError(
            f"{name} cannot be followed by torch.fx ({reason(error)}): expected a network without a wrapper, whose "
            "forward does not depend on values or sizes"
        ) from error


def _inputs(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def _is_addition(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS and len(_inputs(node)) == 2


def _find_blocks(network: nn.Module, graph: fx.Graph) -> set[str]:
    """The modules whose forward adds a branch to a shortcut."""
    found: Counter[str] = Counter()
    for node in filter(_is_addition, graph.nodes):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        found[stack[-1][0] if stack else ""] += 1
    for path, count in found.items():
        name = path or f"the forward of {type(network).__name__} itself"
        if not path or count > 1:
            raise _too_many_additions(name, count)
    return set(found)


def _too_many_additions(name: str, count: int) -> ValueError:
    return ValueError(f"{name} has {count} residual additions: expected one, in a module of its own")


def _chain(node: fx.Node, block: nn.Module, name: str) -> list[_Op]:
    """The steps from the block's input to a node."""
    chain: list[_Op] = []
    while node.op != "placeholder":
        steps = _steps(node, block)
        if not steps:
            raise ValueError(f"{name} computes {node.name}, which has no counterpart without normalisation")
        if len(_inputs(node)) != 1:
            raise ValueError(f"{name} joins signals at {node.name}: expected one addition at the end of two chains")
        chain = steps + chain
        node = _inputs(node)[0]
    return chain


def _steps(node: fx.Node, block: nn.Module) -> list[_Op]:
    """The steps of one node; none if the node is neither a module nor an activation."""
    if node.op == "call_module":
        path = str(node.target)
        return _expand(path, block.get_submodule(path))
    if node.target in _FUNCTIONS:
        name = _FUNCTIONS[node.target]
        return [_Op(name, create_activation(name))]
    return []


# -- variance ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Noise:
    """The distribution of a signal if the network's input is noise.

    It is the largest of some unit normal numbers, plus a normal number.

    Attributes:
        window: How many numbers. A max pooling takes the largest of its window; a convolution starts from 1 again.
        added: Variance of the normal number, which residual branches have added.
    """

    window: int = 1
    added: float = 0.0

    def after_block(self, projects: bool) -> "_Noise":
        """The distribution of a block's sum. A convolution in the shortcut starts from unit variance again."""
        return _Noise(added=_ALPHA**2) if projects else replace(self, added=self.added + _ALPHA**2)

    def var(self, act: nn.Module | None = None) -> float:
        """The variance of the signal, or of its activation."""
        z = torch.linspace(-8, 8, 801, dtype=torch.float64, device="cpu")
        normal = torch.exp(-z.square() / 2)
        largest = normal * torch.special.ndtr(z) ** (self.window - 1)
        weights = torch.outer(largest / largest.sum(), normal / normal.sum())
        x = z[:, None] + self.added**0.5 * z
        x = x if act is None else act(x)
        return ((x - (x * weights).sum()).square() * weights).sum().item()

    def gain(self, act: nn.Module | None) -> float:
        """The factor that gives the activation of this signal unit variance: the authors' gamma / beta.

        The authors ignore max pooling. That is right for the activation of its output: gamma * std(relu(largest of 9))
        is 1.02. It is not right if sums follow without a convolution, so the variance is computed there.
        """
        if self.window > 1:
            return self.var(act) ** -0.5
        gamma = 1.0 if act is None else _gamma(act) or 1.0
        return gamma * (1 + self.added) ** -0.5


# -- blocks ------------------------------------------------------------------------------------------------------------


class _Sequence(NamedTuple):
    """A converted chain.

    Attributes:
        module: Its layers.
        pending: The factor that no convolution of the chain has taken.
        convs: Number of its convolutions.
        drop_path_rate: Rate of its stochastic depth.
    """

    module: nn.Sequential
    pending: float
    convs: int
    drop_path_rate: float


def _convert_chain(steps: list[_Op], pending: float, block: str) -> _Sequence:
    """Convert the steps of a chain. `pending` is the factor that the signal lacks at its beginning."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    convs = 0
    drop_path_rate = 0.0

    def keep(name: str, module: nn.Module) -> None:
        key = name.replace(".", "_")
        layers[f"{key}_{len(layers)}" if key in layers else key] = module

    for name, module in steps:
        gamma, rate = _gamma(module), _drop_rate(module)
        if _convolution(module):
            keep(name, _standardised(module, f"{block}.{name}", pending))
            pending = 1.0
            convs += 1
        elif isinstance(module, _NORMS) or type(module) is nn.Identity:
            pass  # left out
        elif gamma is not None:
            keep(name, copy.deepcopy(module))
            pending *= gamma
        elif _is_gate(module):
            keep(name, module)
            pending *= 2
        elif rate is not None:
            drop_path_rate = rate
        elif isinstance(module, _PASSING):
            keep(name, module)
        else:
            raise ValueError(f"{block}.{name} is a {type(module).__name__}, which has no counterpart here")
    return _Sequence(nn.Sequential(layers), pending, convs, drop_path_rate)


def _is_conv(step: _Op) -> bool:
    return _convolution(step.module) is not None


def _lead(steps: list[_Op]) -> list[_Op]:
    """The steps before the first convolution."""
    first = next((i for i, step in enumerate(steps) if _is_conv(step)), len(steps))
    return steps[:first]


def _activation_of(steps: list[_Op], block: str) -> nn.Module:
    """The only activation among steps. Beside it there may be normalisation and dropout."""
    acts = [step for step in steps if _gamma(step.module) is not None]
    others = [s for s in steps if s not in acts and not isinstance(s.module, (*_NORMS, nn.Identity, nn.Dropout))]
    if others or len(acts) > 1:
        step = (others or acts)[-1]
        raise ValueError(
            f"{block}.{step.name} is a {type(step.module).__name__} outside of the branch: expected one activation"
        )
    return copy.deepcopy(acts[0].module) if acts else nn.Identity()


class _Converted(NamedTuple):
    """A converted block.

    Attributes:
        block: The block.
        noise: The distribution of its sum.
        post_activation: Whether the original had its activation after the addition.
    """

    block: ResidualBlock
    noise: _Noise
    post_activation: bool


def _convert_block(block: nn.Module, name: str, noise: _Noise) -> _Converted:
    """Convert a block whose input has this distribution."""
    graph = _graph(block, name, set(), set())
    additions = list(filter(_is_addition, graph.nodes))
    if len(additions) > 1:  # some of them in modules of its own, such as attention with positions
        raise _too_many_additions(name, len(additions))
    addition = additions[0]
    post = _after_addition(block, name, graph, addition)
    shortcut, branch = sorted(
        (_chain(each, block, name) for each in _inputs(addition)),
        key=lambda steps: (sum(map(_is_conv, steps)), len(steps)),
    )
    if not any(map(_is_conv, branch)):
        raise ValueError(f"{name} adds two signals, neither of which a convolution has computed")
    lead = _lead(branch)
    pre_activation = any(not isinstance(step.module, nn.Identity) for step in lead)
    act = _activation_of(lead if pre_activation else post, name)
    if pre_activation:
        _require_pre_activation(name, shortcut, lead, post)
        branch = branch[len(lead) :]
        shortcut = shortcut[len(lead) :]
    scale = noise.gain(None if isinstance(act, nn.Identity) else act)
    converted = _convert_chain(branch, scale, name)
    projection = _convert_shortcut(shortcut, scale, name)
    after = noise.after_block(projection is not None)
    parameter = next(block.parameters())
    skip = SkipInit(
        _ALPHA * converted.pending, converted.drop_path_rate, device=parameter.device, dtype=parameter.dtype
    )
    new = ResidualBlock(act, converted.module, projection, skip, after.var())
    return _Converted(new.train(block.training), after, not pre_activation)


def _after_addition(block: nn.Module, name: str, graph: fx.Graph, addition: fx.Node) -> list[_Op]:
    """The steps from the addition to the block's output."""
    post: list[_Op] = []
    node = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(node, fx.Node):
        raise ValueError(f"{name} returns more than one tensor")
    while node is not addition:
        steps = _steps(node, block)
        if not steps:
            raise ValueError(f"{name} computes {node.name} after its addition, which has no counterpart here")
        post = steps + post
        node = _inputs(node)[0]
    return post


def _require_pre_activation(name: str, shortcut: list[_Op], lead: list[_Op], post: list[_Op]) -> None:
    """Refuse a block that activates both before its branch and elsewhere."""
    if shortcut and [step.name for step in _lead(shortcut)][: len(lead)] != [step.name for step in lead]:
        raise ValueError(f"{name} takes its shortcut from an input that is not activated, unlike its branch")
    if any(type(step.module) is not nn.Identity for step in post):
        raise ValueError(f"{name} has {post[-1].name} after its addition, and {lead[-1].name} before its branch")


def _convert_shortcut(steps: list[_Op], scale: float, name: str) -> nn.Module | None:
    """The layers of a shortcut; None if it is the block's input."""
    converted = _convert_chain(steps, scale, name)
    if converted.convs:
        return converted.module
    if len(converted.module):
        raise ValueError(f"{name} has a shortcut without a convolution, whose variance is not known")
    return None


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signal:
    """What is known of a tensor between blocks.

    Attributes:
        noise: Its distribution before the activation.
        act: The activation that it has passed, or that is due. Its gamma is not applied yet.
        pending: Another factor that it lacks.
        carrier: The module that can apply all factors, if no convolution does.
        due: Whether `act` is still to come, after the carrier.
        activated: Whether it stays activated, since other modules take it too.
        follows: What computed it, if nothing else is known of it.
    """

    noise: _Noise = _Noise()
    act: nn.Module | None = None
    pending: float = 1.0
    carrier: str | ResidualBlock | None = None
    due: bool = False
    activated: bool = False
    follows: str | None = None

    @property
    def gain(self) -> float:
        """The factor that the next convolution has to apply."""
        return self.pending * self.noise.gain(self.act)


def _window_of(pool: Any) -> int:
    """How many values a max pooling takes the largest of."""
    size: Any = pool.kernel_size
    return size ** _MAX_POOLS[type(pool)] if isinstance(size, int) else prod(size)


class _Walk:
    """Follows the signal through a network and converts it in place."""

    def __init__(self, network: nn.Module, spared: set[nn.Module]) -> None:
        self.network, self.spared = network, spared
        self.name = type(network).__name__
        first = _graph(network, self.name, set(), spared)
        self.blocks = _find_blocks(network, first)
        self.graph = _graph(network, self.name, self.blocks, spared)
        self.calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        self.signals: dict[fx.Node, _Signal] = {}

    def run(self) -> None:
        """Convert the whole network."""
        for node in self.graph.nodes:
            sources = [self.signals[n] for n in _inputs(node)]
            signal = sources[0] if sources else _Signal()
            if node.op == "call_module" and len(sources) == 1:
                signal = self.step(str(node.target), signal)
            elif node.target in _FUNCTIONS and signal.follows is None:
                signal = self.activated(signal, create_activation(_FUNCTIONS[node.target]), None)
            elif node.op not in ("placeholder", "get_attr") and node.target not in _PASSING_FUNCTIONS:
                for each in sources:
                    self.settled(each)
                signal = _Signal(follows=node.name)
            if len(node.users) > 1:
                signal = self.settled(signal)
            self.signals[node] = signal

    def step(self, path: str, signal: _Signal) -> _Signal:
        """Convert the module at this path. Return its output, from its input."""
        module: Any = self.network.get_submodule(path)
        is_converted = path in self.blocks or _convolution(module) or isinstance(module, _ANY_NORM)
        if is_converted and module not in self.spared:
            self.require_known_variance(path, signal)
        if signal.follows is not None:
            return signal
        if path in self.blocks:
            return self.block(path, signal)
        if module in self.spared:
            return self.other(path, signal)
        if _convolution(module):
            signal = self.with_activation(signal)
            self.replace(path, _standardised(module, path, signal.gain))
            return _Signal()
        if isinstance(module, _ANY_NORM):
            return self.norm(path, module, signal)
        if _gamma(module) is not None:
            return self.activated(signal, module, path)
        if _is_gate(module):
            return replace(self.with_activation(signal), pending=signal.pending * 2, carrier=None)
        if type(module) in _MAX_POOLS:
            window = signal.noise.window * _window_of(module)
            return replace(signal, noise=replace(signal.noise, window=window))
        return signal if isinstance(module, _PASSING) else self.other(path, signal)

    def require_known_variance(self, path: str, signal: _Signal) -> None:
        if signal.follows is not None:
            raise ValueError(f"{path} stands behind {signal.follows}, from where on the variance is not known")
        if self.calls[path] > 1:
            raise ValueError(f"{path} is called {self.calls[path]} times, with signals of other variance each time")

    def other(self, path: str, signal: _Signal) -> _Signal:
        self.settled(signal)
        return _Signal(follows=f"{path} ({type(self.network.get_submodule(path)).__name__})")

    def activated(self, signal: _Signal, act: nn.Module, path: str | None) -> _Signal:
        signal = self.with_activation(signal)
        if signal.act is not None:
            raise ValueError(f"{path or act} follows another activation: expected a convolution between them")
        return replace(signal, act=copy.deepcopy(act), carrier=path)

    def norm(self, path: str, module: Any, signal: _Signal) -> _Signal:
        steps = _expand(path, module)
        if not isinstance(steps[0].module, _NORMS):
            raise ValueError(f"{path} is a {type(module).__name__}: expected batch or group normalisation")
        act = steps[1].module if len(steps) == 2 else nn.Identity()
        self.replace(path, act)
        if isinstance(act, nn.Identity):
            return signal  # what comes divides by the variance
        if _gamma(act) is None:
            raise ValueError(f"{path} ends in a {type(act).__name__}, whose gamma is not known")
        return self.activated(signal, act, path)

    def block(self, path: str, signal: _Signal) -> _Signal:
        original = self.network.get_submodule(path)
        new, noise, post_activation = _convert_block(original, path, signal.noise)
        if not post_activation:
            signal = self.with_activation(signal)
            if signal.act is not None:
                signal = self.settled(signal)
                new, noise, _ = _convert_block(original, path, signal.noise)
        elif signal.activated:
            raise ValueError(f"{path} shares its input with something that takes it activated, as it would itself")
        elif isinstance(signal.carrier, str):  # the block begins with the activation that stood before it
            self.replace(signal.carrier, nn.Identity())
        self.replace(path, new)
        act = None if isinstance(new.act, nn.Identity) or not post_activation else new.act
        return _Signal(noise, act=act, carrier=new, due=act is not None)

    def with_activation(self, signal: _Signal) -> _Signal:
        """The signal with its activation, for modules that do not begin with one themselves."""
        return self.settled(signal) if signal.due else signal

    def settled(self, signal: _Signal) -> _Signal:
        """The signal with its activation and all factors, for modules that take it as it is."""
        gain = signal.gain
        if isinstance(signal.carrier, ResidualBlock) and (signal.due or gain != 1.0):
            act = signal.act if signal.due and signal.act is not None else nn.Identity()
            signal.carrier.final_act = _scaled(copy.deepcopy(act), gain)
        elif isinstance(signal.carrier, str) and gain != 1.0:
            self.replace(signal.carrier, _scaled(copy.deepcopy(self.network.get_submodule(signal.carrier)), gain))
        elif signal.act is not None or signal.pending != 1.0:
            raise ValueError(
                f"{self.name} activates by a function in its forward where no convolution follows: use a module, "
                "which can carry gamma"
            )
        return _Signal(activated=signal.act is not None)

    def replace(self, path: str, module: nn.Module) -> None:
        _refuse_hooks(self.network.get_submodule(path), path)
        if self.calls[path] > 1:
            raise ValueError(f"{path} is called {self.calls[path]} times, and would have to change in one place only")
        self.network.set_submodule(path, module)


def normalizer_free(model: nn.Module) -> nn.Module:
    """A normalizer-free network with the convolutions of a normalised one.

    **This is another network, not the same function**: train it. The weights of convolutions are copied, but weights
    that were trained together with normalisation are only a start. The classifier stays as it is.

    It takes networks of convolutions, batch or group normalisation, activations and residual additions: the ResNets,
    RegNets and pre-activation ResNets of torchvision and timm. Convolutions become standardised, and normalisation
    goes. Activations get their gamma, and residual blocks their beta, alpha = 0.2 and skip gain. Beta is the square
    root of the signal's expected variance: 1 after a convolution, and 1 + k alpha^2 at block k after a shortcut with a
    convolution. Squeeze-excite gates count twice. Stochastic depth does not rescale.

    Blocks that end in an activation become blocks that begin with it, since nothing may follow the sum of a block.

    Args:
        model: The network. It is not changed. torch.fx traces it to find its residual additions. Each addition must be
            in a module of its own.

    Returns:
        A copy whose blocks are `ResidualBlock`s. It shares no tensor with `model`.

    Raises:
        ValueError: if something in the network has no counterpart. The message names it.

    Examples:
        >>> model = normalizer_free(timm.create_model("test_resnet", num_classes=10))
        >>> isinstance(model.layer1[0], ResidualBlock), model(torch.zeros(1, 3, 64, 64)).shape
        (True, torch.Size([1, 10]))
    """
    network: Any = copy.deepcopy(model)
    if not any(isinstance(module, _ANY_NORM) for module in network.modules()):
        raise ValueError(f"{type(model).__name__} has no normalisation to do without: expected batch normalisation")
    for module in network.modules():
        # The shortcut of a block needs the activation's input too, and hooks may keep it.
        if hasattr(module, "inplace"):
            module.inplace = False
    _Walk(network, _classifier(network)).run()
    for name, module in network.named_modules():
        if isinstance(module, _ANY_NORM):
            raise ValueError(f"{name} is a {type(module).__name__} that the signal was not followed to")
    if hasattr(network, "pretrained_cfg"):  # timm raises at this argument, and so loads no weights into the old network
        network._model_args = getattr(network, "_model_args", {}) | {"normalizer_free": True}
    return network
