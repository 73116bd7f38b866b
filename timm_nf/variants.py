"""The configuration of a network, and the table of all variants.

The entrypoints, timm's default configs, the command line's listing and the tests' parameters all come from this table.

Sources: arXiv:2102.06171, table 1; deepmind-research nfnets/{base,nfnet,nf_resnet,nf_regnet}.py at f5de0ede.

Examples:
    >>> row = VARIANTS["nfnet_f0"]
    >>> isinstance(row, Variant), row.train_size, row.test_size
    (True, 192, 256)
    >>> parameters, multiply_adds = NfCfg(depths=(1,), channels=(32,), group_size=8).count(size=64)
    >>> parameters
    105001
    >>> squeeze_chs(256)
    128
"""

import dataclasses
import math
from itertools import pairwise
from typing import Any, Literal

__all__ = ["DEEP_STEM", "VARIANTS", "Family", "NfCfg", "Variant", "squeeze_chs"]

Family = Literal["NFNet", "NF_ResNet", "NF_RegNet"]  # the authors' classes
"""The authors' classes of networks."""
DEEP_STEM = (16, 32, 64)  # channels of the first three convolutions of a `deep_quad` stem, nfnets/nfnet.py
"""Output channels of the first three convolutions of an NFNet's stem."""


@dataclasses.dataclass(frozen=True)
class NfCfg:
    """The configuration of one network. Every field is also a keyword of `timm.create_model`, with timm's meaning.

    Attributes:
        depths: Number of blocks in each stage.
        channels: Output channels of each stage, before `width_factor`.
        alpha: Scale of the residual branch. Every block adds its square to the expected variance.
        stem_type: `deep_quad` (four 3x3 convolutions, stride 4), `3x3` (stride 2) or `7x7_pool` (stride 4).
        stem_chs: Output channels of the stem, before `width_factor`. By default they are a fraction of the first
            stage's, as in the authors' code: half (`deep_quad`), all (`3x3`) or a quarter (`7x7_pool`).
        num_features: Output channels of the final convolution, before `width_factor`. 0 for no final convolution. By
            default twice the last stage's, or 1280 / 440 of them if `reg`. A width that `width_factor` does not scale
            cannot be given beside it: give `channels` their final widths and leave the factor at 1.
        group_size: Channels per group of the 3x3 convolutions. Bottlenecks are rounded down to a multiple of it. None
            or 0 for no groups.
        bottle_ratio: Width of a bottleneck over its block's output channels, or over its input channels if `reg`.
        width_factor: Factor on all widths. Products are truncated, not rounded.
        attn_layer: `se` for squeeze-excite at the end of the branch, or after the 3x3 convolution if `reg`. None or ''
            for none. Give `create_model` the empty string: it drops keywords that are None.
        attn_kwargs: Arguments of squeeze-excite: `rd_ratio`.
        reg: Build blocks as in NF-RegNet. The network's first block has a bottle ratio of 1.
        extra_conv: Whether the branch has a second 3x3 convolution.
        avg_down: Whether shortcuts of strided blocks have an average pool. If not, their convolution has the stride.
        zero_init_fc: Whether the classifier starts at 0. If not, it starts from N(0, 0.01).
        act_layer: Name of an activation. The authors must give its gamma.
    """

    depths: tuple[int, ...]
    channels: tuple[int, ...]
    alpha: float = 0.2
    stem_type: str = "deep_quad"
    stem_chs: int | None = None
    num_features: int | None = None
    group_size: int | None = 128
    bottle_ratio: float = 0.5
    width_factor: float = 1.0
    attn_layer: str | None = "se"
    attn_kwargs: dict[str, Any] = dataclasses.field(default_factory=lambda: {"rd_ratio": 0.5})
    reg: bool = False
    extra_conv: bool = True
    avg_down: bool = True
    zero_init_fc: bool = False
    act_layer: str = "gelu"

    def __post_init__(self) -> None:
        stems = ("deep_quad", "3x3", "7x7_pool")
        if self.stem_type not in stems:
            raise ValueError(f"stem_type must be one of {', '.join(stems)}, got {self.stem_type!r}")
        if self.attn_layer not in ("se", "", None):
            raise ValueError(f"attn_layer must be 'se', or '' or None for none, got {self.attn_layer!r}")
        rd_ratio = self.attn_kwargs.get("rd_ratio", 0.5)
        for name in ("alpha", "bottle_ratio", "width_factor", "rd_ratio"):
            value = rd_ratio if name == "rd_ratio" else getattr(self, name)
            if not 0 <= value < math.inf:  # false for NaN
                raise ValueError(f"{name} must be zero or positive and finite, got {value}")
        if not self.depths or len(self.depths) != len(self.channels) or min(self.depths) < 1:
            raise ValueError(
                f"expected as many depths as channels, each at least 1, got depths {self.depths} and channels "
                f"{self.channels}"
            )
        if min(*self.stage_chs(), self.stem_out_chs()) < 1:
            raise ValueError(
                f"expected widths of at least 1, got {self.stem_out_chs()} channels after the stem and "
                f"{self.stage_chs()} after the stages; enlarge channels, stem_chs or width_factor"
            )

    def stage_chs(self) -> list[int]:
        """Output channels of the stages."""
        return [int(c * self.width_factor) for c in self.channels]

    def stem_out_chs(self) -> int:
        """Output channels of the stem."""
        if self.stem_chs is not None:
            return int(self.stem_chs * self.width_factor)
        if self.stem_type == "deep_quad":  # in nfnet.py the width scales only the stages, not the stem
            return self.channels[0] // 2
        return self.stage_chs()[0] // (4 if self.stem_type == "7x7_pool" else 1)

    def final_chs(self) -> int:
        """Output channels of the final convolution, or 0 if there is none."""
        if self.num_features is not None:
            return int(self.num_features * self.width_factor)
        last = self.stage_chs()[-1]
        return 1280 * last // 440 if self.reg else 2 * last

    def bottleneck(self, in_chs: int, out_chs: int, first: bool) -> tuple[int, int]:
        """Width and number of groups of a block's bottleneck.

        Args:
            in_chs: Input channels of the block.
            out_chs: Output channels of the block.
            first: Whether it is the network's first block.

        Raises:
            ValueError: if the bottleneck is narrower than one group.
        """
        if not self.reg:
            chs = int(out_chs * self.bottle_ratio)
        elif first:
            chs = in_chs
        else:
            chs = int(in_chs * self.bottle_ratio)
        groups = chs // (self.group_size or 1)
        if groups < 1:
            raise ValueError(
                f"expected a bottleneck of at least one group, got {chs} channels for group_size {self.group_size} "
                f"(channels {self.channels}, bottle_ratio {self.bottle_ratio}); choose smaller groups or a larger ratio"
            )
        if self.group_size:
            return groups * self.group_size, groups
        return chs, 1

    def count(self, size: int, in_chans: int = 3, num_classes: int = 1000) -> tuple[int, int]:
        """Number of parameters, and multiply-adds of all convolutions and linear layers for one image.

        The numbers come from arithmetic. A forward pass of all variants takes most of a minute even on the meta device.
        tests/cli/test_commands.py::test_counts_are_those_of_the_network_that_is_built compares them with the networks.

        Args:
            size: Height and width of the image.
            in_chans: Channels of the image.
            num_classes: Number of classes, 0 for no classifier.
        """
        params = macs = 0

        def layer(in_chs: int, out_chs: int, kernel: int, side: int, groups: int = 1, vectors: int = 2) -> None:
            """`vectors` is 2 for a standardised convolution, which has gain and bias, and 1 for a layer with a bias."""
            nonlocal params, macs
            weight = in_chs // groups * out_chs * kernel**2
            params += weight + vectors * out_chs
            macs += weight * side**2

        def squeeze_excite(chs: int) -> None:
            hidden = squeeze_chs(chs, **self.attn_kwargs)
            layer(chs, hidden, 1, side=1, vectors=1)
            layer(hidden, chs, 1, side=1, vectors=1)

        side, in_chs = -(-size // 2), self.stem_out_chs()
        if self.stem_type == "deep_quad":
            widths = (in_chans, *DEEP_STEM)
            for stem_in, stem_out in pairwise(widths):
                layer(stem_in, stem_out, 3, side)
            side = -(-side // 2)
            layer(widths[-1], in_chs, 3, side)
        elif self.stem_type == "3x3":
            layer(in_chans, in_chs, 3, side)
        else:
            layer(in_chans, in_chs, 7, side)
            side = -(-side // 2)
        for stage, (depth, out_chs) in enumerate(zip(self.depths, self.stage_chs(), strict=True)):
            for index in range(depth):
                strided = index == 0 and (stage > 0 or self.stem_type == "3x3")
                side_in, side = side, -(-side // 2) if strided else side
                mid_chs, groups = self.bottleneck(in_chs, out_chs, first=stage == index == 0)
                if strided or in_chs != out_chs:
                    layer(in_chs, out_chs, 1, side)
                layer(in_chs, mid_chs, 1, side_in)
                for _ in range(2 if self.extra_conv else 1):
                    layer(mid_chs, mid_chs, 3, side, groups)
                layer(mid_chs, out_chs, 1, side)
                if self.attn_layer:
                    squeeze_excite(mid_chs if self.reg else out_chs)
                params += 1  # the skip gain
                in_chs = out_chs
        if final_chs := self.final_chs():
            layer(in_chs, final_chs, 1, side)
        if num_classes:
            layer(final_chs or in_chs, num_classes, 1, side=1, vectors=1)
        return params, macs


def squeeze_chs(chs: int, rd_ratio: float = 0.5) -> int:
    """Hidden width of squeeze-excite: `chs * rd_ratio`, rounded down, at least 1."""
    return max(1, int(chs * rd_ratio))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named network of the papers, with its settings for training and evaluation.

    Attributes:
        cfg: The network's configuration.
        family: The authors' class. Recipe and evaluation depend on it.
        train_size: Height and width of training images in the paper.
        test_size: Height and width of test images in the paper.
        drop_rate: The paper's dropout rate. Only recipes use it; models are built with 0.
        rand_augment: The paper's magnitude of RandAugment (4 layers), None if it gives none.
        crop_pct: timm's crop_pct for evaluation. None stands for the authors' size / (size + 32).
        hf_hub_id: The Hub repository with the authors' weights, None if there are none.
    """

    cfg: NfCfg
    family: Family
    train_size: int = 224
    test_size: int = 224
    drop_rate: float = 0.0
    rand_augment: int | None = None
    crop_pct: float | None = None
    hf_hub_id: str | None = None


_F = (256, 512, 1536, 1536)
_F_PLUS = (384, 768, 2048, 2048)
_R = (256, 512, 1024, 2048)


def _nfnet(repeats: int, channels: tuple[int, ...], *sizes: Any, hub: bool = False) -> Variant:
    cfg = NfCfg(depths=tuple(repeats * d for d in (1, 2, 6, 3)), channels=channels)
    return Variant(cfg, "NFNet", *sizes, hf_hub_id=f"timm/dm_nfnet_f{repeats - 1}.dm_in1k" if hub else None)


def _nf_resnet(depths: tuple[int, ...]) -> Variant:
    cfg = NfCfg(
        depths,
        channels=_R,
        stem_type="7x7_pool",
        num_features=0,
        group_size=None,
        bottle_ratio=0.25,
        attn_layer=None,
        attn_kwargs={"rd_ratio": 0.25},
        extra_conv=False,
        avg_down=False,
        act_layer="relu",
    )
    return Variant(cfg, "NF_ResNet")


def _nf_regnet(depths: tuple[int, ...], channels: tuple[int, ...], *sizes: Any) -> Variant:
    cfg = NfCfg(
        depths,
        channels,
        stem_type="3x3",
        group_size=8,
        bottle_ratio=2.25,
        width_factor=0.75,
        reg=True,
        extra_conv=False,
        zero_init_fc=True,
        act_layer="silu",
    )
    return Variant(cfg, "NF_RegNet", *sizes)


# fmt: off
VARIANTS: dict[str, Variant] = {
    # N x depths (1, 2, 6, 3); sizes and dropout: arXiv:2102.06171, table 1; RandAugment: A.3; crop_pct: timm
    "nfnet_f0": _nfnet(1, _F, 192, 256, 0.2, 5, 0.9, hub=True),
    "nfnet_f1": _nfnet(2, _F, 224, 320, 0.3, 10, 0.91, hub=True),
    "nfnet_f2": _nfnet(3, _F, 256, 352, 0.4, 10, 0.92, hub=True),
    "nfnet_f3": _nfnet(4, _F, 320, 416, 0.4, 15, 0.94, hub=True),
    "nfnet_f4": _nfnet(5, _F, 384, 512, 0.5, 15, 0.951, hub=True),
    "nfnet_f5": _nfnet(6, _F, 416, 544, 0.5, 15, 0.954, hub=True),
    "nfnet_f6": _nfnet(7, _F, 448, 576, 0.5, 15, 0.956, hub=True),
    "nfnet_f7": _nfnet(8, _F, 480, 608, 0.5, 15),
    "nfnet_f0_plus": _nfnet(1, _F_PLUS, 192, 256, 0.2, 5),
    "nfnet_f1_plus": _nfnet(2, _F_PLUS, 224, 320, 0.3, 10),
    "nfnet_f2_plus": _nfnet(3, _F_PLUS, 256, 352, 0.4, 10),
    "nfnet_f3_plus": _nfnet(4, _F_PLUS, 320, 416, 0.4, 15),
    "nfnet_f4_plus": _nfnet(5, _F_PLUS, 384, 512, 0.5, 15),
    "nfnet_f5_plus": _nfnet(6, _F_PLUS, 416, 544, 0.5, 15),
    "nfnet_f6_plus": _nfnet(7, _F_PLUS, 448, 576, 0.5, 15),
    "nfnet_f7_plus": _nfnet(8, _F_PLUS, 480, 608, 0.5, 15),
    "dm_nf_resnet50": _nf_resnet((3, 4, 6, 3)),
    "dm_nf_resnet101": _nf_resnet((3, 4, 23, 3)),
    "dm_nf_resnet152": _nf_resnet((3, 8, 36, 3)),
    "dm_nf_resnet200": _nf_resnet((3, 24, 36, 3)),
    "dm_nf_resnet288": _nf_resnet((24, 24, 24, 24)),
    "dm_nf_resnet600": _nf_resnet((50, 50, 50, 50)),
    "dm_nf_regnet_b0": _nf_regnet((1, 3, 6, 6), (48, 104, 208, 440), 192, 224, 0.2),
    "dm_nf_regnet_b1": _nf_regnet((2, 4, 7, 7), (48, 104, 208, 440), 224, 256, 0.2),
    "dm_nf_regnet_b2": _nf_regnet((2, 4, 8, 8), (56, 112, 232, 488), 240, 272, 0.3),
    "dm_nf_regnet_b3": _nf_regnet((2, 5, 9, 9), (56, 128, 248, 528), 288, 320, 0.3),
    "dm_nf_regnet_b4": _nf_regnet((2, 6, 11, 11), (64, 144, 288, 616), 320, 384, 0.4),
    "dm_nf_regnet_b5": _nf_regnet((3, 7, 14, 14), (80, 168, 336, 704), 384, 456, 0.4),
    "dm_nf_regnet_b6": _nf_regnet((3, 8, 16, 16), (88, 184, 376, 792), 448, 528, 0.5),
    "dm_nf_regnet_b7": _nf_regnet((4, 10, 19, 19), (96, 208, 416, 880), 512, 600, 0.5),
    "dm_nf_regnet_b8": _nf_regnet((4, 11, 22, 22), (104, 232, 456, 968), 600, 672, 0.5),
}
"""The 31 networks by name."""
# fmt: on
