"""Written by `python -m scripts.optimizer_stub` from timm's registry: change that, not this."""

from collections.abc import Iterable
from typing import Any

import timm.optim.adabelief
import timm.optim.adafactor
import timm.optim.adafactor_bv
import timm.optim.adahessian
import timm.optim.adamp
import timm.optim.adamw
import timm.optim.adan
import timm.optim.adopt
import timm.optim.kron
import timm.optim.lamb
import timm.optim.laprop
import timm.optim.lars
import timm.optim.lion
import timm.optim.madgrad
import timm.optim.mars
import timm.optim.muon
import timm.optim.nadam
import timm.optim.nadamw
import timm.optim.nvnovograd
import timm.optim.radam
import timm.optim.rmsprop_tf
import timm.optim.sgdp
import timm.optim.sgdw
import torch.optim
from torch import nn

from .agc import ClipStats as ClipStats
from .agc import adaptive_clip_grad_ as adaptive_clip_grad_
from .agc import unitwise_norm as unitwise_norm
from .exempt import classifier_weights as classifier_weights
from .factory import register as register
from .factory import unregister as unregister
from .groups import param_groups_agc as param_groups_agc
from .optimizer import AdaptiveClipping as AdaptiveClipping
from .optimizer import agc_class as agc_class
from .units import Axis

class AgcAdaBelief(AdaptiveClipping, timm.optim.adabelief.AdaBelief):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdadelta(AdaptiveClipping, torch.optim.Adadelta):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdafactor(AdaptiveClipping, timm.optim.adafactor.Adafactor):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdafactorBigVision(AdaptiveClipping, timm.optim.adafactor_bv.AdafactorBigVision):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdagrad(AdaptiveClipping, torch.optim.Adagrad):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdahessian(AdaptiveClipping, timm.optim.adahessian.Adahessian):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdam(AdaptiveClipping, torch.optim.Adam):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdamP(AdaptiveClipping, timm.optim.adamp.AdamP):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdamW(AdaptiveClipping, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdamWLegacy(AdaptiveClipping, timm.optim.adamw.AdamWLegacy):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdamax(AdaptiveClipping, torch.optim.Adamax):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdan(AdaptiveClipping, timm.optim.adan.Adan):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcAdopt(AdaptiveClipping, timm.optim.adopt.Adopt):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcKron(AdaptiveClipping, timm.optim.kron.Kron):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcLaProp(AdaptiveClipping, timm.optim.laprop.LaProp):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcLamb(AdaptiveClipping, timm.optim.lamb.Lamb):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcLars(AdaptiveClipping, timm.optim.lars.Lars):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcLion(AdaptiveClipping, timm.optim.lion.Lion):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcMADGRAD(AdaptiveClipping, timm.optim.madgrad.MADGRAD):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcMars(AdaptiveClipping, timm.optim.mars.Mars):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcMuon(AdaptiveClipping, timm.optim.muon.Muon):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcNAdam(AdaptiveClipping, torch.optim.NAdam):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcNAdamLegacy(AdaptiveClipping, timm.optim.nadam.NAdamLegacy):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcNAdamW(AdaptiveClipping, timm.optim.nadamw.NAdamW):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcNvNovoGrad(AdaptiveClipping, timm.optim.nvnovograd.NvNovoGrad):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcRAdam(AdaptiveClipping, torch.optim.RAdam):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcRAdamLegacy(AdaptiveClipping, timm.optim.radam.RAdamLegacy):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcRMSprop(AdaptiveClipping, torch.optim.RMSprop):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcRMSpropTF(AdaptiveClipping, timm.optim.rmsprop_tf.RMSpropTF):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcSGD(AdaptiveClipping, torch.optim.SGD):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcSGDP(AdaptiveClipping, timm.optim.sgdp.SGDP):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...

class AgcSGDW(AdaptiveClipping, timm.optim.sgdw.SGDW):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...
