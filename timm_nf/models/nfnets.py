"""The networks of the papers as timm models. They equal the authors' JAX code up to rounding.

timm's port (`timm.models.nfnet`) computes other functions. With the same parameters, the logits of its dm_nfnet_f0
differ by 1.8 %. Its nfnet_f0 is a different network. `python -m benchmarks.differences` measures the differences.

Where arXiv:2102.06171 and the authors' code differ, this file follows the code, which made the published weights:

- Squeeze-excite has a relu, the paper writes gelu.
- F4+ truncates its bottlenecks to a multiple of the group width. It has 524.95 M parameters, 527 M in table 5.

Sources: arXiv:2101.08692, arXiv:2102.06171; deepmind-research nfnets/{base,nfnet,nf_resnet,nf_regnet}.py at f5de0ede.

Examples:
    >>> model = timm.create_model("nfnet_f0", depths=(1, 1), channels=(16, 32), group_size=8, num_classes=10)
    >>> model = nfnet_f0(depths=(1, 1), channels=(16, 32), group_size=8, num_classes=10)  # the same
    >>> model(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
"""

# timm's model builder has no types.
# pyright: standard, reportPrivateImportUsage=false

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import _registry as registry
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .._gain_names import SKIP_GAIN, is_gain
from .._versions import build_network, make_head, reset_head
from ..convert.infer import load_haiku_into
from ..layers.activations import Activation
from ..layers.drop import check_drop_path_rate
from ..layers.standardize import destandardize_weight, standardize_weight
from ..layers.std_conv import ScaledStdConv2d
from ..variants import VARIANTS, NfCfg, Variant
from .blocks import NormFreeBlock, make_stem

__all__ = ["VARIANTS", "NfCfg", "NormFreeNet", "Variant"]  # timm's registry adds the entrypoints


class NormFreeNet(nn.Module):
    """A normalizer-free network with timm's model interface.

    Args:
        cfg: The network's configuration.
        num_classes: Number of classes. With 0 the network returns pooled features (N, num_features).
        in_chans: Channels of the input.
        global_pool: timm's name of a pooling, empty for none.
        output_stride: 8, 16 or 32. Strides beyond it become dilations. Parameter names stay. By default it is the
            network's own output stride: 32, or 64 with a fifth stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth: block i of N drops its branch with this rate times i / N. The branches that
            remain are not rescaled.
        fused: Build plain convolutions, for weights that are already standardised. For inference.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: Fields of `NfCfg` to replace.

    Raises:
        ValueError: if a value is out of range, or values do not fit together.
        TypeError: if a keyword is not a field of `NfCfg`.

    Examples:
        >>> cfg = NfCfg(depths=(1, 1), channels=(16, 32), group_size=8)
        >>> features = NormFreeNet(cfg).forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
        >>> [tuple(feature.shape) for feature in features]
        [(1, 64, 32, 32), (1, 16, 16, 16), (1, 64, 8, 8)]
    """

    __jit_unused_properties__ = ("fused", "_model_args")  # otherwise TorchScript compiles them, and fails

    def __init__(
        self,
        cfg: NfCfg,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fused: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_drop_path_rate(drop_path_rate)
        cfg = dataclasses.replace(cfg, **kwargs)
        dd = {"device": device, "dtype": dtype}
        self.cfg = cfg
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self._model_args = {}
        self._traits = {"first_conv": None}  # `checkpoint_filter_fn` converts the stem's channels, timm must not

        self.stem, stride, feature = make_stem(cfg, in_chans, dd)
        self.stem_feature_index = [f"stem.{n}" for n, _ in self.stem.named_children()].index(feature["module"])
        self.feature_info = [feature]
        self.stages = self._make_stages(stride, output_stride, drop_path_rate, dd)

        in_chs, final_chs = cfg.stage_chs()[-1], cfg.final_chs()
        if final_chs:
            self.final_conv = ScaledStdConv2d(in_chs, final_chs, 1, scale=1.0, **dd)
            self.feature_info[-1].update(num_chs=final_chs, module="final_conv")
        else:
            self.final_conv = nn.Identity()
        self.num_features = final_chs or in_chs
        # No convolution follows that could carry gamma. forward_features returns the authors' tensor.
        self.final_act = Activation(cfg.act_layer)
        self.head = make_head(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self._pooled_width()
        self._init_classifier()
        if fused:
            reparameterize_model(self, inplace=True)

    def _make_stages(
        self, stride: int, output_stride: int | None, drop_path_rate: float, dd: dict[str, Any]
    ) -> nn.Sequential:
        """Build the stages, and add their features to `feature_info`. `stride` is the stem's."""
        cfg = self.cfg
        nominal_strides = [2] * len(cfg.depths)
        if stride == 4:  # the stem has done the first stage's stride
            nominal_strides[0] = 1
        own_stride = stride * math.prod(nominal_strides)
        if output_stride is None:
            output_stride = own_stride
        elif output_stride not in (8, 16, 32, own_stride):
            raise ValueError(
                f"output_stride must be 8, 16 or 32, or None for the network's own, {own_stride}; got {output_stride}"
            )

        in_chs, expected_var, dilation = cfg.stem_out_chs(), 1.0, 1
        drop_path_rates = (drop_path_rate * i / sum(cfg.depths) for i in itertools.count())
        stages = []
        for stage, (depth, out_chs) in enumerate(zip(cfg.depths, cfg.stage_chs(), strict=True)):
            nominal_stride = nominal_strides[stage]
            # A block whose stride becomes a dilation still gets the input of the stage before. Its first 3x3
            # convolution keeps that stage's dilation.
            first_dilation = dilation
            if stride * nominal_stride > output_stride:
                dilation *= nominal_stride
            else:
                stride *= nominal_stride
            blocks = []
            for index in range(depth):
                first = index == 0
                blocks.append(
                    NormFreeBlock(
                        cfg,
                        in_chs,
                        out_chs,
                        beta=expected_var**0.5,
                        nominal_stride=nominal_stride if first else 1,
                        stride=nominal_stride if first and dilation == first_dilation else 1,
                        dilation=(first_dilation if first else dilation, dilation),
                        drop_path_rate=next(drop_path_rates),
                        first=first and stage == 0,
                        **dd,
                    )
                )
                in_chs = out_chs
                expected_var = (1.0 if first else expected_var) + cfg.alpha**2
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": out_chs, "reduction": stride, "module": f"stages.{stage}"})
        return nn.Sequential(*stages)

    @property
    def fused(self) -> bool:
        """Whether all convolutions are plain. timm's `reparameterize_model` can replace them at any time."""
        return not any(isinstance(module, ScaledStdConv2d) for module in self.modules())

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm's factory records and saves, and `fused`.

        Stock timm has no argument `fused`. It raises, instead of loading the weights into its own nfnet_f0.
        """
        return self._recorded_args | {"fused": self.fused}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._recorded_args = args

    def init_weights(self) -> None:
        """Initialise all parameters as the constructor does, for example after `to_empty`."""
        if self.fused:
            self._init_fused()
        else:
            for module in self.modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None and next(module.parameters(recurse=False), None) is not None:
                    reset()
        self._init_classifier()

    @torch.no_grad()
    def _init_fused(self) -> None:
        """Initialise all parameters outside the head from a new network: plain convolutions do not know their scale."""
        own = dict(self.named_parameters())
        reference = next(iter(own.values()))
        fresh = type(self)(self.cfg, 0, self.in_chans, fused=True, device=reference.device, dtype=reference.dtype)
        for name, parameter in fresh.named_parameters():
            if name in own:  # prune_intermediate_layers removes parameters
                own[name].copy_(parameter)

    def _init_classifier(self) -> None:
        """Draw the weight from N(0, 0.01), or set it to 0 in an NF-RegNet. Set the bias to 0."""
        if isinstance(self.head.fc, nn.Linear):
            nn.init.normal_(self.head.fc.weight, std=0.0 if self.cfg.zero_init_fc else 0.01)
            nn.init.zeros_(self.head.fc.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # timm loads with strict=False if num_classes or in_chans differ, so torch would not complain.
        _refuse_other_networks(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_pretrained(self, checkpoint_path: str) -> None:
        """Load one of the authors' checkpoints. timm calls this for every .npz file.

        Raises:
            ValueError: if the file is not such a checkpoint, or belongs to another network. Nothing is loaded.
        """
        load_haiku_into(self, checkpoint_path)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The groups of layer-wise learning rate decay: the stem, every block (every stage if `coarse`), the head.

        The final convolution belongs to the last block: timm reads (99999,) as "join the group before".
        """
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(block, None), (r"^final_conv", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """The names of the gains and skip gains. The authors do not decay them."""
        return {name for name, _ in self.named_parameters() if is_gain(name)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn on gradient checkpointing: the backward pass computes the blocks again, so no activation is stored."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier, or nn.Identity if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes`. The pooling stays unless `global_pool` is given."""
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.head.in_features = self.num_features  # which pruning changes
        reset_head(self.head, num_classes, global_pool, reference.device, reference.dtype)
        self.head_hidden_size = self._pooled_width()
        self._init_classifier()

    def _pooled_width(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the features of the stem (index 0) and of every stage (index 1 and up), and the final features.

        Args:
            x: (N, in_chans, H, W).
            indices: The indices to return. An integer n stands for the last n, None for all.
            norm: Has no effect, as there is no normalisation layer.
            stop_early: Do not compute what follows the last index.
            output_fmt: Only `NCHW`.
            intermediates_only: Return only the list.

        Returns:
            The final features (N, num_features, H, W), and a list of the requested features (N, C, H, W). The last
            stage's feature is taken after the final convolution and before its activation.

        Raises:
            ValueError: if `output_fmt` is not NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got '{output_fmt}'")
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        intermediates: list[Tensor] = []
        for index, module in enumerate(self.stem):  # TorchScript cannot slice it
            if not stop_early or last > 0 or index <= self.stem_feature_index:
                x = module(x)
            if index == self.stem_feature_index and 0 in take:
                intermediates.append(x)
        for index, stage in enumerate(self.stages, start=1):
            if not stop_early or index <= last:
                x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
                if index == len(self.stages):
                    x = self.final_conv(x)
            if index in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if not stop_early or last == len(self.stages):
            x = self.final_act(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the features at `indices` do not need.

        Args:
            indices: The indices of the features to keep, counted as in `forward_intermediates`.
            prune_norm: Has no effect, as there is no normalisation layer.
            prune_head: Remove the classifier even if the last stage stays.

        Returns:
            The indices as a list, counted from 0.
        """
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        if last < len(self.stages):
            self.final_conv, self.final_act = nn.Identity(), nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
            prune_head = True  # its input has the last stage's width
        if last == 0:
            self.stem = self.stem[: self.stem_feature_index + 1]
        self.stages = self.stages[:last]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, ceil(H / stride), ceil(W / stride)), after the final activation."""
        x = self.stem(x)
        for stage in self.stages:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
        return self.final_act(self.final_conv(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, H, W) -> (N, num_classes), or the pooled features (N, num_features) if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes), or (N, num_features) without a classifier."""
        return self.forward_head(self.forward_features(x))


def _refuse_other_networks(network: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse the weights of a network with another formula.

    Only a state dict that has all convolution weights of the blocks is checked. Parts of a network (an adapter, biases,
    a single layer) load as in torch.

    Args:
        network: The network, or the module that timm makes of it for `features_only`.
        state_dict: Any state dict.
        prefix: Prefix of the network's names in it.
        *_: What else torch passes to a hook.

    Raises:
        RuntimeError: if the state dict is from timm's own nfnet_f*, or one is fused and the other is not.
    """
    # By the names of parameters: a traced feature extractor has parameters, but no layers.
    parameters = {f"{prefix}{name}": p for name, p in network.named_parameters()}
    skip_gains = [name for name in parameters if name.endswith(f".{SKIP_GAIN}")]
    blocks = tuple(name.removesuffix(SKIP_GAIN) for name in skip_gains)
    weights = [name for name, p in parameters.items() if p.ndim == 4 and name.endswith(".weight")]
    weights = [name for name in weights if name.startswith(blocks)]
    if not weights or any(name not in state_dict for name in weights):
        return
    if missing := [name for name in skip_gains if name not in state_dict]:
        raise RuntimeError(
            f"this state dict has no skip gain for {len(missing)} of {len(skip_gains)} blocks ({missing[0]}, ...), so "
            "it is not from a timm_nf network. Most likely it was saved from timm's own nfnet_f*, a different "
            "network that timm_nf replaces in the registry. Build that network with "
            "timm.models.nfnet.nfnet_f0(...), or create it in a process that does not import timm_nf, and load the "
            "file there."
        )
    gains = [f"{name.removesuffix('weight')}gain" for name in weights]
    if any(name in parameters and name not in state_dict for name in gains):
        raise RuntimeError(
            "this state dict is from a fused network, but this network is unfused: create it with fused=True"
        )
    if any(name in state_dict and name not in parameters for name in gains):
        raise RuntimeError(
            "this state dict is from an unfused network, but this network is fused: create it with fused=False, "
            "load the state dict, and call timm_nf.fuse"
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Convert the stem of a pretrained state dict to the model's number of input channels.

    timm converts the raw weight, which standardisation then rescales. This function converts the standardised weight:
    it sums over the channels for one channel, and repeats them otherwise. Then it finds the raw weight and the gain
    that give the converted weight. A grey image therefore gets the logits of the same image in RGB.

    Standardised weights have zero mean. If the new number of channels is neither 1 nor a multiple of the old one, the
    converted weight loses its mean.

    Args:
        state_dict: A state dict of a network with any number of input channels. It is not changed.
        model: The network that will load it.

    Returns:
        A state dict for `model`.
    """
    name = "stem.conv1" if "stem.conv1.weight" in state_dict else "stem.conv"
    weight, gain = state_dict.get(f"{name}.weight"), state_dict.get(f"{name}.gain")
    state_dict = dict(state_dict)  # timm deletes the classifier from the returned dict
    if weight is None or weight.shape[1] == model.in_chans:
        return state_dict
    converted = weight.double() if gain is None else standardize_weight(weight.double(), gain.double())
    old, new = weight.shape[1], model.in_chans
    if new == 1:
        converted = converted.sum(1, keepdim=True)
    else:
        converted = converted.repeat(1, -(-new // old), 1, 1)[:, :new] * (old / new)
    if gain is not None:
        converted, new_gain = destandardize_weight(converted)
        state_dict[f"{name}.gain"] = new_gain.to(gain.dtype)
    state_dict[f"{name}.weight"] = converted.to(weight.dtype)
    return state_dict


def _default_cfg(variant: Variant) -> dict[str, Any]:
    side = -(-variant.train_size // 32)
    return {
        "hf_hub_id": variant.hf_hub_id,
        "num_classes": 1000,
        "input_size": (3, variant.train_size, variant.train_size),
        "test_input_size": (3, variant.test_size, variant.test_size),
        "pool_size": (side, side),
        "crop_pct": variant.crop_pct or round(variant.test_size / (variant.test_size + 32), 3),
        # From the authors' experiment files.
        "crop_mode": "squash" if variant.family == "NFNet" else "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1" if variant.cfg.stem_type == "deep_quad" else "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.dm_in1k" if v.hf_hub_id else name: _default_cfg(v) for name, v in VARIANTS.items()}
)


_Entrypoint = Callable[..., nn.Module]


def _entrypoint(name: str) -> _Entrypoint:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        network = build_network(
            NormFreeNet,
            name,
            pretrained,
            model_cfg=VARIANTS[name].cfg,
            feature_cfg={"flatten_sequential": True} | kwargs.pop("feature_cfg", {}),
            pretrained_filter_fn=checkpoint_filter_fn,
            asked=kwargs,
        )
        if not isinstance(network, NormFreeNet):  # with features_only
            network.register_load_state_dict_pre_hook(_refuse_other_networks)
        return network

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`{name}`, see `VARIANTS`. Keywords are those of `NormFreeNet` and of timm's model builder."
    return create


# For type checkers. The loop below makes the functions; a test compares these names with VARIANTS and timm's registry.
nfnet_f0: _Entrypoint
nfnet_f1: _Entrypoint
nfnet_f2: _Entrypoint
nfnet_f3: _Entrypoint
nfnet_f4: _Entrypoint
nfnet_f5: _Entrypoint
nfnet_f6: _Entrypoint
nfnet_f7: _Entrypoint
nfnet_f0_plus: _Entrypoint
nfnet_f1_plus: _Entrypoint
nfnet_f2_plus: _Entrypoint
nfnet_f3_plus: _Entrypoint
nfnet_f4_plus: _Entrypoint
nfnet_f5_plus: _Entrypoint
nfnet_f6_plus: _Entrypoint
nfnet_f7_plus: _Entrypoint
dm_nf_resnet50: _Entrypoint
dm_nf_resnet101: _Entrypoint
dm_nf_resnet152: _Entrypoint
dm_nf_resnet200: _Entrypoint
dm_nf_resnet288: _Entrypoint
dm_nf_resnet600: _Entrypoint
dm_nf_regnet_b0: _Entrypoint
dm_nf_regnet_b1: _Entrypoint
dm_nf_regnet_b2: _Entrypoint
dm_nf_regnet_b3: _Entrypoint
dm_nf_regnet_b4: _Entrypoint
dm_nf_regnet_b5: _Entrypoint
dm_nf_regnet_b6: _Entrypoint
dm_nf_regnet_b7: _Entrypoint
dm_nf_regnet_b8: _Entrypoint

for _name in VARIANTS:
    globals()[_name] = _entrypoint(_name)

_replaced: dict[str, _Entrypoint | None] = {}  # what each name stood for before it was ours: timm's nfnet_f0 to f7


def register_networks() -> None:
    """Put the networks into timm's registry, in the place of timm's of the same name. Safe to repeat.

    Nothing is done to a name that somebody else has registered since.
    """
    for name in VARIANTS:
        if name not in _replaced:
            _replaced[name] = registry._model_entrypoints.get(name)
            _forget(name)
            _register(name, globals()[name])


def unregister_networks() -> list[str]:
    """Put back what `register_networks` replaced, and take out the rest. Networks that exist go on working.

    Returns:
        Names that somebody else has registered since. Those stay.
    """
    left: list[str] = []
    while _replaced:
        name, before = _replaced.popitem()
        if registry._model_entrypoints.get(name) is not globals()[name]:
            left.insert(0, name)
            continue
        _forget(name)
        if before is not None:
            _register(name, before)
    return left


def _register(name: str, entrypoint: _Entrypoint) -> None:
    """Register an entrypoint. Its module's `__all__` stays as it is: below 1.0.31 timm adds the name each time."""
    names: list[str] = getattr(sys.modules[entrypoint.__module__], "__all__", [])
    before = names[:]
    register_model(entrypoint)
    if name in before:
        names[:] = before


def _forget(name: str) -> None:
    """Take a name out of timm's registry, which older timm would keep in part when another network takes it."""
    registry._model_entrypoints.pop(name, None)
    registry._model_default_cfgs.pop(name, None)
    for full_name in (name, *registry._model_with_tags.pop(name, ())):
        registry._model_pretrained_cfgs.pop(full_name, None)
        registry._model_has_pretrained.discard(full_name)
    module = registry._model_to_module.pop(name, None)
    if module is not None:
        registry._module_to_models[module].discard(name)
        if not registry._module_to_models[module]:
            del registry._module_to_models[module]


register_networks()
