"""The kernels of weight standardisation without a GPU: interpreted, compiled, counted on meta tensors."""

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import OLD_TORCH, fake_cuda
from tests.support.small_nets import create
from tests.support.triton_targets import (
    NEEDS_TRITON,
    Compiled,
    assert_no_spilled_registers_on_amd,
    assert_no_spilled_registers_on_nvidia,
    assert_passes_interpreted,
    compiled_for,
    python,
    use_a_driver_without_a_device,
)
from timm_nf import _triton
from timm_nf.layers import ScaledStdConv2d, standardize_triton, standardize_weight
from timm_nf.layers.standardize_triton import standardize, takes_kernel

HERE = Path(__file__).parent

# --- the kernels ---


@NEEDS_TRITON
def test_the_interpreted_kernels_keep_every_promise() -> None:
    assert_passes_interpreted(HERE / "test_standardize_triton.py")


# fan-in, dtypes of weight and gain, of the output: each class of tile, the most registers, every conversion
KERNELS = [
    (16, "fp32", "fp32"), (27, "fp64", "fp64"), (576, "fp16", "fp16"), (1152, "fp32", "bf16"),
    (4608, "bf16", "bf16"), (8192, "fp64", "fp64"), (8193, "fp64", "fp64"), (16384, "fp32", "fp16"),
]  # fmt: skip


def compiled(kernel: Any, fan_in: int, weight: str, out: str, target: Any) -> Any:
    import triton.language as tl
    from triton.compiler import ASTSource

    from timm_nf.layers._standardize_kernels import tiling

    types = {
        "weight": f"*{weight}", "grad_weight": f"*{weight}", "gain": f"*{weight}", "grad_gain": f"*{weight}",
        "out": f"*{out}", "grad": f"*{out}", "rows": "i32", "fan_in": "i32", "eps": "fp64", "scale": "fp64",
    }  # fmt: skip
    sizes, warps = tiling(fan_in)
    constants = {"DTYPE": tl.float64 if weight == "fp64" else tl.float32, **sizes}
    names = [parameter.name for parameter in kernel.params]
    signature = {name: types.get(name, "constexpr") for name in names}
    # as at a launch: torch's allocations are aligned, and so are rows of a multiple of 16 elements
    aligned = [n for n, t in signature.items() if t[0] == "*" or (n == "fan_in" and fan_in % 16 == 0)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return compiled_for(source, target, warps)


@pytest.fixture
def triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def targets(fan_in: int) -> list[Any]:
    """The two kernels for rows of this length."""
    from timm_nf.layers._standardize_kernels import BACKWARD, FORWARD, MAX_COLUMNS

    return [pair[fan_in > MAX_COLUMNS] for pair in (FORWARD, BACKWARD)]


@NEEDS_TRITON
@pytest.mark.usefixtures("triton_cache")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_nvidia_without_spilled_registers(capability: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget

    for fan_in, weight, out in KERNELS:
        for kernel in targets(fan_in):
            binary = compiled(kernel, fan_in, weight, out, GPUTarget("cuda", capability, 32))
            assert_no_spilled_registers_on_nvidia(binary, tmp_path / "kernel.cubin")
            written = out if kernel.__name__.startswith("forward") else weight
            rounding = set(re.findall(r"cvt\.(\S+?)\.bf16(?:x2)?\.f32", binary.asm["ptx"]))
            assert rounding == ({"rn"} if written == "bf16" else set())  # to nearest


@NEEDS_TRITON
@pytest.mark.usefixtures("triton_cache")
def test_the_kernels_compile_for_amd_without_spilled_registers() -> None:
    from triton.backends.compiler import GPUTarget

    for fan_in, weight, out in KERNELS:
        for kernel in targets(fan_in):
            binary = compiled(kernel, fan_in, weight, out, GPUTarget("hip", "gfx942", 64))
            assert_no_spilled_registers_on_amd(binary)


@NEEDS_TRITON
@pytest.mark.usefixtures("triton_cache")
@pytest.mark.parametrize(
    ("shape", "names", "programs"),
    [
        ((250, 8, 3, 3), ["forward", "backward"], 32),  # 128 columns, 8 rows a program
        ((6, 128, 3, 3), ["forward", "backward"], 6),
        ((3, 1024, 3, 3), ["forward_long", "backward_long"], 3),
    ],
    ids=str,
)
def test_a_launch_gives_triton_the_arguments_that_the_kernel_has(
    shape: tuple[int, ...], names: list[str], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:

    from timm_nf.layers._standardize_kernels import BACKWARD, FORWARD, launch

    started = []
    weight, gain = torch.empty(shape), torch.empty(shape[0])
    use_a_driver_without_a_device(monkeypatch)
    for pair, tensors in ((FORWARD, (weight, gain, weight)), (BACKWARD, (weight, weight, gain, weight, gain))):
        launch(tuple(Compiled(k, started) for k in pair), tensors, weight, 1e-4, 1.7, torch.float32)
    assert [x[:2] for x in started] == [(name, (programs,)) for name in names]


# --- what is asked of an accelerator ---


class Operations(TorchDispatchMode):
    """Names of the operations, less views, allocations and convolutions, and the bytes that they read and write."""

    FREE = ("view", "_unsafe_view", "permute", "_reshape_alias", "as_strided", "unsqueeze", "select", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.FREE and not name.startswith(("empty", "new_empty", "convolution")):
            results = out if isinstance(out, tuple) else (out,)
            self.names.append(name)
            self.bytes += sum(x.nbytes for x in (*args, *(kwargs or {}).values(), *results) if isinstance(x, Tensor))
        return out


def step(function: Callable, kernel: int, memory_format: torch.memory_format) -> tuple[list[str], float, float]:
    """Of one convolution's weight, forward and backward: operations, bytes moved, bytes saved as multiples of it."""
    weight = torch.empty(256, 128, kernel, kernel, device="meta").to(memory_format=memory_format).requires_grad_()
    gain = torch.empty(256, 1, 1, 1, device="meta", requires_grad=True)
    x = torch.empty(2, 128, 8, 8, device="meta").to(memory_format=memory_format)
    saved = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal saved
        saved += t.nbytes
        return t

    with Operations() as operations:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = function(weight, gain)
        y = nn.functional.conv2d(x, out)
        y.backward(torch.empty_like(y))
    assert weight.grad is not None
    assert weight.grad.stride() == out.stride() == weight.stride()
    return operations.names, operations.bytes / weight.nbytes, saved / weight.nbytes


LAYOUTS = pytest.mark.parametrize(
    ("kernel", "memory_format"),
    [(3, torch.contiguous_format), (3, torch.channels_last), (1, torch.contiguous_format), (1, torch.channels_last)],
    ids=["3x3 nchw", "3x3 nhwc", "1x1 nchw", "1x1 nhwc"],
)


@LAYOUTS
def test_one_kernel_forward_and_one_backward_move_five_times_the_weight(
    kernel: int, memory_format: torch.memory_format
) -> None:
    names, moved, saved = step(lambda w, g: standardize(w, g, scale=1.7), kernel, memory_format)
    # On the meta device, older torch gives a channels_last weight a contiguous gradient.
    copies = ["clone"] * OLD_TORCH * ((kernel, memory_format) == (3, torch.channels_last))
    assert names == ["standardize", *copies, "standardize_backward"]
    assert moved < 5.05 + 2 * len(copies)
    assert saved < 1.01


def test_under_autocast_no_copy_of_the_weight_is_made() -> None:
    weight = torch.empty(64, 32, 3, 3, device="meta", requires_grad=True)
    gain = torch.empty(64, 1, 1, 1, device="meta", requires_grad=True)
    with Operations() as operations:
        out = standardize(weight, gain, out_dtype=torch.bfloat16)
        out.backward(torch.empty_like(out))
    assert out.dtype is torch.bfloat16
    assert operations.names == ["standardize", "standardize_backward"]
    assert operations.bytes / weight.nbytes < 4.1


@LAYOUTS
def test_without_triton_sixteen_kernels_move_twelve_times_the_weight(
    kernel: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standardize_triton, "has_triton", lambda device_type: False)
    names, moved, saved = step(lambda w, g: standardize(w, g, scale=1.7), kernel, memory_format)
    copies = names.count("clone")
    assert copies == OLD_TORCH * ((kernel, memory_format) == (3, torch.channels_last))
    assert len(names) == 16 + copies
    assert moved < 12.5 + 2 * copies  # 11, and once more as addcmul writes over its input
    assert saved < 1.05


# --- which tensors take them ---


class OtherTensor(Tensor):
    pass


@NEEDS_TRITON
def test_meta_tensors_and_accelerators_go_the_same_way_and_the_cpu_another() -> None:
    meta = torch.empty(4, 3, 3, 3, device="meta")
    with FakeTensorMode():
        fake, fake_cpu = torch.empty(4, 3, 3, 3, device="cuda"), torch.empty(4, 3, 3, 3)
        assert standardize(fake, torch.empty(4, 1, 1, 1, device="cuda"), out_dtype=torch.float16).device.type == "cuda"
    for weight in (meta, nn.Parameter(meta), fake):
        assert takes_kernel(weight)
        assert standardize_triton.has_triton(weight.device.type)
    for weight in (
        torch.empty(4, 3, 3, 3),
        nn.Parameter(torch.empty(4, 3, 3, 3)),
        fake_cpu,
        meta.as_subclass(OtherTensor),
    ):
        assert not takes_kernel(weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_compiled_or_exported_takes_the_formula() -> None:
    weight, seen = torch.empty(4, 3, 3, 3, device="meta"), []

    def function(w: Tensor) -> Tensor:
        return w + 1 if takes_kernel(w) else w - 1

    def look(w: Tensor) -> Tensor:
        seen.append(takes_kernel(w))
        return w + 1

    class Module(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return function(w)

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        graphs.append(graph.code)
        return graph.forward

    torch.compile(function, backend=backend, fullgraph=True)(weight)
    for strict in (False, True):
        graphs.append(torch.export.export(Module(), (weight,), strict=strict).graph_module.code)
    graphs.append(torch.fx.symbolic_trace(function).code)
    torch.jit.trace(look, (torch.empty(4, 3, 3, 3, device="meta"),), check_trace=False)
    assert all(" - 1" in code or "sub" in code for code in graphs), graphs
    assert seen == [False]


@NEEDS_TRITON
@fake_cuda.NEEDS_NO_DRIVER
def test_a_convolution_on_an_accelerator_takes_one_kernel_and_under_autocast_its_dtype() -> None:
    with FakeTensorMode():
        conv = ScaledStdConv2d(4, 8, 3, scale=1.7, device="cuda")
        x = torch.empty(2, 4, 6, 6, device="cuda")
        for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
            with fake_cuda.autocast(enabled), Operations() as operations:
                assert conv(x).dtype is conv.effective_weight().dtype is dtype
            casts = ["_to_copy"] * 2 * enabled  # of the input and of the bias
            names = [name for name in operations.names if name != "device"]
            assert sorted(names) == [*casts, "standardize", "standardize"]
            with fake_cuda.autocast(enabled):
                assert conv.fuse().weight.dtype is torch.float32


def test_what_make_fx_records_of_cpu_tensors_holds_no_operation_of_ours() -> None:
    weight, gain = torch.empty(8, 4, 3, 3), torch.empty(8, 1, 1, 1)
    graph = make_fx(lambda w, g: standardize_weight(w, g), tracing_mode="fake")(weight, gain)
    assert "timm_nf" not in graph.code
    assert "addcmul" in graph.code


def test_a_network_on_the_meta_device_exports_without_operations_of_ours() -> None:
    # Its tensors would take the kernels, but what records them sees the formula.
    model, x = create("NFNet", device="meta").eval(), torch.empty(1, 3, 32, 32, device="meta")
    with Operations() as operations:
        model(x)
    assert "standardize" in operations.names
    exported = torch.export.export(model, (x,), strict=False).run_decompositions()
    assert "timm_nf" not in exported.graph_module.code


# --- without Triton ---


def test_without_triton_the_operations_exist_and_the_plain_way_is_taken() -> None:
    output = python(
        "-c",
        """
import sys
sys.modules["triton"] = None
import torch
from timm_nf._triton import has_triton
import timm_nf
from timm_nf.layers.standardize_triton import standardize
weight = torch.empty(4, 3, 3, 3, device="meta", requires_grad=True)
out = standardize(weight, torch.empty(4, 1, 1, 1, device="meta"))
out.backward(torch.empty_like(out))
print(weight.grad.shape, torch.ops.timm_nf.standardize.default, torch.ops.timm_nf.standardize_backward.default)
print(torch.ops.timm_nf.unit_norms.default, torch.ops.timm_nf.scale_units_.default)
print([has_triton(x) for x in ("meta", "cuda", "mps", "cpu")])
print(standardize(torch.tensor([[3.0, 1.0]]), torch.tensor([2.0]), scale=0.5))
""",
        TRITON_INTERPRET="1",
    )
    assert output.splitlines() == [
        "torch.Size([4, 3, 3, 3]) timm_nf.standardize.default timm_nf.standardize_backward.default",
        "timm_nf.unit_norms.default timm_nf.scale_units_.default",
        "[True, False, False, False]",
        "tensor([[ 0.7071, -0.7071]])",
    ]


@NEEDS_TRITON
def test_a_triton_that_does_not_start_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import triton

    _triton.has_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class NoDriver:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.runtime, "driver", NoDriver())
    with caplog.at_level(logging.WARNING):
        assert [_triton.has_triton("cuda") for _ in range(2)] == [False, False]
    _triton.has_triton.cache_clear()
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.message


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")
@pytest.mark.parametrize(
    ("found", "taken"), [("3.2.0", False), ("3.3.1", False), ("3.4.0", True), ("3.10.0+rocm", True)]
)
def test_a_triton_that_is_too_old_is_said_once_and_not_taken(
    found: str, taken: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    import triton

    _triton.has_triton.cache_clear()
    monkeypatch.setattr(triton, "__version__", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert [_triton.has_triton("cuda") for _ in range(2)] == [taken, taken]
    _triton.has_triton.cache_clear()
    assert [f"Triton {found} is older than 3.4" in record.message for record in caplog.records] == [True] * (not taken)
