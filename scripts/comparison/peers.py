"""The packages of the comparison: how each is installed, and the process that answers for it."""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.environments import PIP_INSTALL, python_of

ROOT = Path(__file__).parents[2]
THREADS = 2


@dataclass(frozen=True)
class Peer:
    """One package of the comparison.

    Attributes:
        key: The package's name in worker.py.
        requirements: Requirements for pip, none if this interpreter has the package.
        without: Requirements that the package declares, but that are not installed. The page names them.
        alone: Whether its environment has all packages itself, and does not see those of this interpreter.
        clipping: The clipping function, for the page.
        remark: What had to be changed to run the package, for the page.
    """

    key: str
    clipping: str
    requirements: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    alone: bool = False
    remark: str = ""


PEERS = {
    "timm_nf": Peer("timm_nf", "`adaptive_clip_grad_`"),
    "timm": Peer("timm", "`timm.utils.agc.adaptive_clip_grad`", remark="a process that does not import timm_nf"),
    "nfnets-pytorch": Peer(
        "nfnets",
        "`nfnets.agc.AGC.step` around an optimizer that does nothing",
        ("nfnets-pytorch==0.1.3",),
        remark="`collections.Iterable`, which it imports and Python 3.10 removed, is put back before the import",
    ),
    "pytorch_optimizer": Peer(
        "pytorch_optimizer",
        "`agc` for every parameter, its result copied to the gradient as `Ranger21` does",
        ("pytorch_optimizer==4.1.0",),
    ),
    "composer": Peer(
        "composer",
        "`apply_gradient_clipping(model, 'adaptive', ...)`",
        ("mosaicml==0.32.1",),
        without=("torch", "torchvision"),
        remark="it declares torch<2.7.1, and runs on this one",
    ),
    "optax": Peer(
        "optax",
        "`adaptive_grad_clip` under `jax.jit`, arrays in the authors' layout, result in new arrays",
        ("optax==0.2.8", "jax==0.10.2"),
        alone=True,
    ),
}


class PeerError(Exception):
    """A package does not install or gives no answer. The message is one line."""


def install(peer: Peer, folder: Path) -> str:
    """Make an environment for the package, and return its interpreter. Without requirements, return this interpreter.

    Unless the package is `alone`, its environment sees the packages of this interpreter, so that all packages run with
    the same torch.

    Raises:
        PeerError: with the last line of the command that failed.
    """
    if not peer.requirements:
        return sys.executable
    environment = folder / peer.key
    _run([sys.executable, "-m", "venv", str(environment)])
    python = str(python_of(environment))
    if not peer.alone:
        (packages,) = environment.glob("**/site-packages")
        seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "host.pth").write_text("\n".join(seen))
    pip = [python, *PIP_INSTALL]
    if not peer.without:
        _run([*pip, *peer.requirements])
    else:
        _run([*pip, "--no-deps", *peer.requirements])
        name = peer.requirements[0].partition("==")[0]
        listing = _run([python, "-c", f"from importlib.metadata import requires; print(requires({name!r}))"])
        _run([*pip, *remaining(ast.literal_eval(listing), peer.without)])
    return python


def remaining(declared: Sequence[str], without: Sequence[str]) -> list[str]:
    """The package's declared requirements, except those of extras and those in `without`."""

    def name(requirement: str) -> str:
        for index, character in enumerate(requirement):
            if not (character.isalnum() or character in "-_."):
                return requirement[:index]
        return requirement

    return [r for r in declared if "extra ==" not in r and name(r) not in without]


def how_installed(peer: Peer) -> str:
    """How the package was installed, in words for the page."""
    if not peer.requirements:
        words = "this interpreter"
    else:
        sees = "an environment of its own" if peer.alone else "its environment sees this interpreter's packages"
        words = f"`pip install {' '.join(peer.requirements)}`, {sees}"
    if peer.without:
        words += f"; installed without its requirements {' and '.join(peer.without)}"
    return words + (f"; {peer.remark}" if peer.remark else "")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise PeerError(lines[-1].strip() if lines else f"{command[0]} ended with code {done.returncode}")
    return done.stdout


class Worker:
    """A process that answers for one package until it is closed."""

    def __init__(self, peer: Peer, python: str) -> None:
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115, closed with the process
        variables = {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, "-m", "scripts.comparison.worker", peer.key], env=os.environ | variables,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer to one question.

        Raises:
            PeerError: with the last line of the exception, or of the output of a process that ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended, and readline returns nothing
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            printed = [text for text in self.log.read().splitlines() if text.strip()] or ["without a word"]
            raise PeerError(f"the process ended with code {self.process.wait()}: {printed[-1].strip()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply["answer"]

    def close(self) -> None:
        self.process.communicate()  # closes the input, which ends the process
        self.log.close()


class Absent:
    """Takes the place of a package that does not install. Every answer is the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def ask(self, do: str, **arguments: Any) -> Any:
        raise PeerError(f"did not install: {self.reason}")

    def close(self) -> None:
        pass
