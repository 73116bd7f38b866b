"""The kernels of clipping without a device: interpreted, compiled, and which tensors take them."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import timm_nf
from tests.support.triton_targets import (
    NEEDS_TRITON,
    Compiled,
    assert_no_spilled_registers_on_amd,
    assert_no_spilled_registers_on_nvidia,
    assert_passes_interpreted,
    compiled_for,
    use_a_driver_without_a_device,
)
from timm_nf.optim import unit_triton
from timm_nf.optim.units import ROWS, SINGLE, Layout, layout_of


@NEEDS_TRITON
@pytest.mark.timeout(600)
def test_the_interpreted_kernels_equal_float64() -> None:
    assert_passes_interpreted(Path(__file__).parent / "interpreted_units.py")


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_the_kernels_compile_for_devices_without_spilled_registers(
    dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_nf.optim import _unit_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    types = {"fp32": triton.language.float32, "fp64": triton.language.float64, "bf16": triton.language.bfloat16}
    norm = "fp64" if dtype == "fp64" else "fp32"
    constants: dict[str, Any] = {"TENSORS": kernels.TENSORS, "CHUNK": kernels.CHUNK}
    constants |= dict.fromkeys(("WEIGHT", "GRAD"), types[dtype])
    constants |= dict.fromkeys(("WEIGHT_NORM", "GRAD_NORM", "NORM"), types[norm])
    for kernel in (kernels.norms, kernels.scale):
        signature: dict[str, Any] = {}
        for parameter in kernel.params:
            name = parameter.name
            if name in ("weights", "grads", "firsts", "lengths"):
                signature[name] = ("i64" if name in ("weights", "grads") else "i32",) * kernels.TENSORS
            elif name in ("weight_norms", "grad_norms", "scales"):
                signature[name] = f"*{norm}"
            else:
                signature[name] = "i32" if name == "done" else "constexpr"
        mine = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
        for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
            binary = compiled_for(ASTSource(kernel, signature, mine), target, warps=4)
            if target.backend == "hip":
                assert_no_spilled_registers_on_amd(binary, scalars_in_lanes=True)  # the arguments
            else:
                assert_no_spilled_registers_on_nvidia(binary, tmp_path / "kernel.cubin")


@NEEDS_TRITON
def test_a_launch_gives_triton_64_tensors_at_a_time_by_their_addresses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from timm_nf.optim import _unit_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    use_a_driver_without_a_device(monkeypatch)
    weights = [torch.empty(2, 3) for _ in range(70)]
    grads, counts, started = [torch.empty_like(w) for w in weights], [2] * 70, []
    norms = torch.empty(140), torch.empty(140)
    kernels.launch(Compiled(kernels.norms, started), (weights, grads), counts, norms)
    kernels.launch(Compiled(kernels.scale, started), (grads,), counts, norms[:1])
    assert [x[:2] for x in started] == [("norms", (128,)), ("norms", (12,)), ("scale", (128,)), ("scale", (12,))]
    first, second = started[0][2], started[1][2]
    assert first[0] == tuple(w.data_ptr() for w in weights[:64])
    assert second[1][:6] == tuple(g.data_ptr() for g in grads[64:])
    assert first[2] == tuple(range(0, 128, 2))
    assert second[2][:6] == tuple(range(0, 12, 2))
    assert min(second[2][6:]) > 12  # no unit is one of a tensor that is not there
    assert second[3] == (3,) * 6 + (0,) * 58
    assert (first[6], second[6]) == (0, 128)  # units of the launches before


# --- which tensors take them ---


class Operations(TorchDispatchMode):
    """The operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def f0() -> list[nn.Parameter]:
    parameters = list(timm.create_model("nfnet_f0", device="meta").parameters())
    for p in parameters:
        p.grad = torch.empty_like(p)
    return parameters


def test_clipping_a_network_on_an_accelerator_is_forty_operations_at_most() -> None:
    parameters = f0()
    with Operations() as operations:
        timm_nf.adaptive_clip_grad_(parameters)
    assert len(operations.names) <= 40
    assert operations.names.count("unit_norms") == operations.names.count("scale_units_") == 2


def test_without_triton_clipping_goes_the_way_of_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_triton, "has_triton", lambda device_type: False)
    parameters = f0()
    with Operations() as operations:
        timm_nf.adaptive_clip_grad_(parameters)
    assert len(operations.names) <= 290
    assert not {"unit_norms", "scale_units_"} & set(operations.names)


def takes(x: Tensor, layout: Layout | None = None, grad: Tensor | None = None) -> bool:
    return unit_triton.takes_kernel(x, torch.empty_like(x) if grad is None else grad, layout or layout_of(x.shape, 0))


@NEEDS_TRITON
def test_meta_tensors_and_accelerators_go_the_same_way_and_the_cpu_another() -> None:
    meta = torch.empty(4, 3, 3, 3, device="meta")
    with FakeTensorMode():
        fake, fake_cpu = torch.empty(4, 3, 3, 3, device="cuda"), torch.empty(4, 3, 3, 3)
        assert takes(fake)
        norms = unit_triton.unit_norms([fake], [fake.half()], [4])
        assert [(x.dtype, x.shape, x.device.type) for x in norms] == [(torch.float32, (4,), "cuda")] * 2
        assert not takes(fake_cpu)
    assert takes(meta)
    assert takes(nn.Parameter(meta))
    assert not takes(torch.empty(4, 3, 3, 3))


def test_units_that_do_not_lie_in_rows_of_one_piece_do_not_take_them() -> None:
    x = torch.empty(4, 3, 5, 5, device="meta")
    last = x.to(memory_format=torch.channels_last)
    volumes = torch.empty(4, 3, 2, 5, 5, device="meta").to(memory_format=torch.channels_last_3d)
    assert takes(x, grad=last)
    assert takes(last, grad=x)
    assert takes(last, SINGLE)
    assert takes(volumes, ROWS)
    assert not takes(x[:, :, ::2])
    assert not takes(x, grad=x.transpose(2, 3))
    assert not takes(x.transpose(0, 1))
    assert not takes(x, layout_of(x.shape, 1))
    assert not takes(x, layout_of(x.shape, (1, 2)))


def test_one_odd_tensor_leaves_the_others_their_kernels() -> None:
    parameters = [nn.Parameter(torch.empty(4, 3, device="meta")) for _ in range(5)]
    parameters.append(nn.Parameter(torch.empty(3, 4, device="meta").t()))
    for p in parameters:
        p.grad = torch.empty_like(p)
    with Operations() as operations:
        timm_nf.adaptive_clip_grad_(parameters)
    assert operations.names.count("unit_norms") == 1
    assert operations.names.count("linalg_vector_norm") == 2  # of the odd one and its gradient


def test_nothing_keeps_a_parameter_after_the_call() -> None:
    parameters = [nn.Parameter(torch.empty(4, 3, device="meta"))]
    parameters[0].grad = torch.empty(4, 3, device="meta")
    timm_nf.adaptive_clip_grad_(parameters)
    seen = weakref.ref(parameters.pop())
    assert seen() is None
