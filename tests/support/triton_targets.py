"""Triton's kernels without a device: interpreted in a process of their own, and compiled for devices of others."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.torch_version import TorchVersion

from tests.support import ROOT
from timm_nf._triton import OLDEST


def _lacks() -> str:
    """Why Triton's kernels are not taken here, if so."""
    if sys.platform != "linux":
        return "Triton is built for Linux"
    import triton

    return f"the kernels need Triton {OLDEST}" if TorchVersion(triton.__version__) < OLDEST else ""


NEEDS_TRITON = pytest.mark.skipif(bool(_lacks()), reason=_lacks())


def python(*arguments: str, **environment: str) -> str:
    """What Python prints in a process of its own, which has to succeed."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def assert_passes_interpreted(file: Path) -> None:
    """All tests of a file under TRITON_INTERPRET=1, which Triton reads when it is imported."""
    output = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file), TRITON_INTERPRET="1"
    )  # fmt: skip
    assert re.search(r"^\d+ passed", output, re.MULTILINE), output


def assert_no_spilled_registers_on_nvidia(binary: Any, file: Path) -> None:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file.write_bytes(binary.asm["cubin"])
    command = [cuobjdump, "--dump-resource-usage", file]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, *spilled = map(int, found.groups())
    assert spilled == [0, 0], usage
    assert registers * 32 * binary.metadata.num_warps <= 65536  # what a multiprocessor has


def assert_no_spilled_registers_on_amd(binary: Any, scalars_in_lanes: bool = False) -> None:
    """`scalars_in_lanes`: that scalar registers may lie in lanes of vector registers, of which no memory is used."""
    found = dict(re.findall(r"\.([sv]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", binary.asm["amdgcn"]))
    assert len(found) == 3
    if scalars_in_lanes:
        del found["sgpr_spill_count"]
    assert set(found.values()) == {"0"}, found


def compiled_for(source: Any, target: Any, warps: int) -> Any:
    """The binary of a kernel. For AMD, Triton 3.4 needs a linker of ROCm's, which later ones bring."""
    import triton

    try:
        return triton.compile(source, target=target, options={"num_warps": warps})
    except Exception as error:  # Triton's own
        if "ROCm linker" not in str(error):
            raise
        pytest.skip(f"Triton {triton.__version__} has no linker for AMD")


def use_a_driver_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton compile for `Driver`. Later ones than 3.4 keep their driver in another attribute."""
    import triton

    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", Driver())


class Driver:
    """As much of Triton's driver as compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel that is bound and compiled, but not started; `started` has its name, grid and arguments."""

    def __init__(self, kernel: Any, started: list[tuple[str, tuple[int, ...], tuple[Any, ...]]]) -> None:
        self.kernel, self.started = kernel, started

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def start(*args: Any, **kwargs: Any) -> None:
            self.started.append((self.kernel.__name__, grid, args))
            self.kernel.run(*args, grid=grid, warmup=True, **kwargs)

        return start
