"""Temporary folders and files for unfinished work. What killed processes have left behind is removed."""

import ctypes
import os
import re
import shutil
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from ctypes import wintypes
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, cast

__all__ = ["replacing", "temporary_folder"]

# https://learn.microsoft.com/windows/win32/api/processthreadsapi/nf-processthreadsapi-openprocess
_SYNCHRONIZE, _NO_SUCH_PROCESS, _STILL_RUNS = 0x00100000, 87, 258


@contextmanager
def temporary_folder(parent: Path | None = None) -> Generator[Path]:
    """Make a folder that is removed at the end. First, folders that killed processes have left are removed.

    Args:
        parent: The folder to make it in, by default the system's folder for temporary files.
    """
    parent = parent or Path(gettempdir())
    _remove_leftovers(parent)
    try:
        made = TemporaryDirectory(dir=parent, prefix=f"{_writing()}{os.getpid()}-")
    except OSError as error:  # the error names `parent`, since nobody knows the temporary name
        raise OSError(error.errno, error.strerror, str(parent)) from error
    with made as temporary:
        yield Path(temporary)


@contextmanager
def replacing(file: Path) -> Generator[Path]:
    """A path to write to. It replaces `file` at the end, or is removed if something is raised."""
    with temporary_folder(file.parent) as temporary:
        yield temporary / file.name
        os.replace(temporary / file.name, file)


def _writing() -> str:
    """The prefix of this machine's temporary folders. The process follows. Other machines may share the disk."""
    return f".writing-{re.sub('[^A-Za-z0-9]', '', socket.gethostname())}-"


def _remove_leftovers(parent: Path) -> None:
    """Remove temporary folders of processes that are gone."""
    for folder in parent.glob(f"{_writing()}*"):
        process = folder.name.removeprefix(_writing()).partition("-")[0]
        if process.isdecimal() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether a process runs on this machine."""
    if sys.platform == "win32":
        return _runs_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        return True
    return True


def _runs_on_windows(process: int) -> bool:
    """The same on Windows, where `os.kill` would end the process."""
    kernel: Any = cast(Any, ctypes).WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.argtypes = (wintypes.DWORD, wintypes.BOOL, wintypes.DWORD)
    kernel.OpenProcess.restype = wintypes.HANDLE  # as wide as a pointer
    kernel.WaitForSingleObject.argtypes = (wintypes.HANDLE, wintypes.DWORD)
    kernel.CloseHandle.argtypes = (wintypes.HANDLE,)
    handle = kernel.OpenProcess(_SYNCHRONIZE, False, process)
    if not handle:  # with any other error, such as for another user's process, it runs
        return cast(Any, ctypes).get_last_error() != _NO_SUCH_PROCESS
    try:
        return kernel.WaitForSingleObject(handle, 0) == _STILL_RUNS
    finally:
        kernel.CloseHandle(handle)
