"""What is not whole yet: it never stands under the file's name, and what a killed process left goes at the next run."""

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import timm_nf
from tests.support.small_nets import create
from timm_nf._temporary import replacing, temporary_folder
from timm_nf.diagnostics import plots
from timm_nf.inference import export


@pytest.fixture(scope="module")
def gone() -> int:
    """The id of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def beginning(folder: Path) -> str:
    """How the names of temporary folders begin on this machine, before the process."""
    with temporary_folder(folder) as mine:
        return mine.name.partition(f"{os.getpid()}-")[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_torchscript(folder: Path) -> str:
    model = timm_nf.fuse(create("NFNet", pretrained_cfg_overlay={"input_size": (3, 32, 32)}))
    export.write(model, folder / "net.ts")
    return "net.ts"


def write_hub_folder(folder: Path) -> str:
    timm_nf.hub.write_folder(create("NFNet"), folder / "net", card=None)
    return "net"


def write_plot(folder: Path) -> str:
    plots.draw_signals({}, "nothing", folder / "plot.svg")
    return "plot.svg"


@pytest.mark.parametrize("write", [write_torchscript, write_hub_folder, write_plot])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(
    write: Callable[[Path], str], gone, tmp_path
):
    with temporary_folder(tmp_path) as mine:
        (mine / "half").write_bytes(b"x")
        prefix = beginning(tmp_path)
        left = tmp_path / f"{prefix}{gone}-abc"
        left.mkdir()
        (left / "half").write_bytes(b"x")
        kept = {"notes", ".writing-elsewhere-1-abc", f"{prefix}1-abc", f"{prefix}x-abc"}
        for other in kept:
            (tmp_path / other).mkdir()
        written = write(tmp_path)
        assert names(tmp_path) == {written, mine.name} | kept


def test_a_process_killed_while_it_writes_leaves_the_old_file_and_its_rest_goes_at_the_next_run(tmp_path):
    file = tmp_path / "net.onnx"
    file.write_text("the old one")
    code = (
        "import os, signal, sys; from pathlib import Path; from timm_nf._temporary import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(file)])
    assert file.read_text() == "the old one"
    assert len(names(tmp_path)) == 2
    with replacing(file) as temporary:
        temporary.write_text("the new one")
    assert file.read_text() == "the new one"
    assert names(tmp_path) == {"net.onnx"}


def test_a_file_that_replaces_another_is_readable_as_every_new_file(tmp_path):
    (tmp_path / "new").touch()
    with replacing(tmp_path / "file") as temporary:
        temporary.touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_folder_that_cannot_be_written_is_named_and_not_what_would_be_in_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, temporary_folder(tmp_path / "none"):
        pass
    assert caught.value.filename == str(tmp_path / "none")
    with temporary_folder() as made:
        assert made.parent == Path(tempfile.gettempdir())


class Windows:
    """The functions of kernel32 that are called, for some processes that run and some that do not."""

    def __init__(self, running: set[int], ended: set[int], others: set[int]):
        """Take processes that run, have ended but are known still, and run for somebody else."""
        self.running, self.ended, self.others = running, ended, others
        self.open: set[int] = set()
        self.error = 0

    def kernel(self) -> Any:
        def OpenProcess(access: int, inherit: bool, process: int) -> int | None:
            if process in self.running | self.ended:
                self.open.add(process)
                return process
            self.error = 5 if process in self.others else 87
            return None

        def WaitForSingleObject(handle: int, milliseconds: int) -> int:
            assert milliseconds == 0
            return 258 if handle in self.running else 0

        def CloseHandle(handle: int) -> None:
            self.open.remove(handle)

        return SimpleNamespace(**locals())


def test_on_windows_the_system_is_asked_whether_a_process_runs(tmp_path, monkeypatch):
    windows = Windows(running={11}, ended={12}, others={13})
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: windows.kernel(), raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: windows.error, raising=False)
    monkeypatch.setattr(os, "kill", None)  # which would end the process there
    prefix = beginning(tmp_path)
    for process in (11, 12, 13, 14):
        (tmp_path / f"{prefix}{process}-abc").mkdir()
    beginning(tmp_path)
    assert names(tmp_path) == {f"{prefix}{process}-abc" for process in (11, 13)}
    assert not windows.open
