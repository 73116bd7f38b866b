"""Write docs/hub.md, about converting, pushing and pulling, with the real output of the commands.

    python -m scripts.hub_walkthrough

The commands run one after the other in an empty folder. The Hub is the tests' stand-in on 127.0.0.1
(tests/support/stand_in_hub.py). Its port differs in every run, so the page says PORT. The other output is unchanged.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from tests.support import stand_in_hub

ROOT = Path(__file__).parents[1]

PAGE = ROOT / "docs" / "hub.md"
CHECKPOINT, LOGITS = (ROOT / "tests" / "golden" / name for name in ("T0_haiku_flatmap.npz", "T0_2x64x64.npz"))
TOKEN = next(iter(stand_in_hub.TOKENS))

TRAINED = """
import argparse
import timm
import timm_nf
from timm.utils import CheckpointSaver, ModelEmaV3

model = timm.create_model("local-dir:t0", pretrained=True)
args = argparse.Namespace(
    model="nfnet_f0", num_classes=10, model_kwargs=dict(depths=(1, 2, 1, 1), channels=(32, 64, 96, 96), group_size=8),
    img_size=64, opt="agcsgd", lr=0.1, opt_kwargs={"clip_factor": 0.01}, epochs=90, eval_metric="top1",
    dataset="hfds/alice/digits", val_split="validation", model_ema=True, model_ema_force_cpu=False,
)
optimizer = timm.optim.create_optimizer_v2(model, "agcsgd")
CheckpointSaver(model, optimizer, args, ModelEmaV3(model)).save_checkpoint(89, metric=50.0)
"""

RELOAD = """
import numpy as np
import timm
import timm_nf
from timm_nf.verify.golden import image

model = timm.create_model("local-dir:t0", pretrained=True).double().eval()
golden = np.load("T0_2x64x64.npz")["logits"]  # by the authors' code, in float64
logits = model(image(2, 64, 64)).detach().numpy()  # of the same two pictures
print(f"{model.num_classes} classes, depths {model.cfg.depths}, channels {model.cfg.channels}")
print(f"relative error of the logits {np.linalg.norm(logits - golden) / np.linalg.norm(golden):.0e}")
"""

AGAIN = """
import timm_nf

model = timm_nf.hub.pull("alice/t0")
print("pulled", model.pretrained_cfg["hf_hub_id"])
written = timm_nf.hub.push(model, "alice/t0-tuned", card={"license": "apache-2.0"})
print(*(line for line in written.card.splitlines() if "base_model" in line or "Derived" in line), sep="\\n")
"""

TIMM = """
import timm
import timm_nf  # registers the networks

model = timm.create_model("hf-hub:alice/t0", pretrained=True)
print(model.pretrained_cfg["architecture"], sum(p.numel() for p in model.parameters()))
"""

TEXT = """\
# Hub and authors' checkpoints

`python -m scripts.hub_walkthrough` ran these commands and wrote this page, so everything printed below is real output.
It talked to the tests' stand-in for the Hub, on 127.0.0.1, where the user `alice` is logged in. So links lead nowhere,
and PORT stands for its port. On your machine the same commands talk to https://huggingface.co.

## The authors' checkpoints

The authors' checkpoints are pickles, although their names end in .npz. A pickle can run any code when it is loaded. So
timm_nf has its own reader: it builds numpy arrays, dicts and the wrappers of haiku and jax, and refuses all else. jax,
haiku and dill need not be installed. `T0_haiku_flatmap.npz` is a tiny network in the authors' format. `convert` finds
out from names and shapes which network it is, also if its depths and widths are not the paper's:

{convert}

`--license` adds the card, README.md. A license is never guessed, so without it there is no card. `--dtype bf16` rounds
the weights. `--push user/name` publishes the folder. The folder has to be new or empty. After an error it is as it was
before.

timm loads this folder like any other. The network gives the logits that the authors' code gives with these weights:

{reload}

`timm.create_model("nfnet_f0", checkpoint_path="F0_haiku.npz")` loads such a file directly. In Python, the steps are
`timm_nf.convert.load_haiku`, `infer_variant` and `haiku_to_timm`. `timm_to_haiku` is the way back. It takes state dicts
in float32, float16 or float64, as numpy has no bfloat16.

## Push

`timm-nf push` takes checkpoints of train.py, Lightning and DeepSpeed, state dicts saved by torch, safetensors, and the
index of a network in several files. It recognises a file by its content, entries such as `model` or `state_dict`, and
prefixes such as `module.` or `_orig_mod.`. If a file has several candidates, the error lists them. Torch files are read
with `weights_only=True`, and nothing beside the weights is built. From a checkpoint of train.py, the command takes the
weights of the last step. `--use-ema` takes their average instead. `classify`, `export`, `diagnose`, `clip-range`,
`bench` and `verify` read `--checkpoint FILE` in the same way.

Here timm's CheckpointSaver wrote `model_best.pth.tar`, as at the end of a training of the tiny network with
`--model-ema`. Its metric of 50 is invented:

{dry_run}

`--dry-run` prints the card last. The card has facts only: license and data set as given, the metric that train.py
measured with these very weights, the recipe from the checkpoint, versions, and the sha256 of the file. This command
uploads it:

{push}

One commit uploads model.safetensors, config.json and README.md, and no pickle. Before that, the command reads the
weights back and compares them, and loads the network with timm, which has to give the same features and logits. If
anything fails, the repository stays as it was. If somebody else commits in the meantime, the push is refused, and
nothing is overwritten. An existing README stays, unless you give `--overwrite-card`.

config.json states the number of classes once, at its top level. timm's own `save_for_hf` and `push_to_hf_hub` repeat it
in `model_args`, and then transformers' `AutoModelForImageClassification.from_pretrained` stops with "multiple values
for keyword argument 'num_classes'". timm loads both forms.

| option | what it does |
| --- | --- |
| `--revision BRANCH` | pushes to a branch, which is made if it is missing; `refs/pr/N` updates a pull request |
| `--create-pr` | opens a pull request, also in repositories of others |
| `--private` | makes the repository private |
| `--dtype bf16` | rounds the weights, also to `fp16` or `fp32` |
| `--num-classes N`, `--labels FILE` | say what the checkpoint does not say |
| `--architecture dm_nfnet_f0` | stock timm loads the network; the card states the measured error of its logits |

From Python: `timm_nf.hub.push(model, "user/name", card={{"license": ...}})`, and `timm_nf.hub.write_folder` for the
files alone.

## Pull

{pull}

The Hub's client compares only the size of what it downloads. `pull` also compares the file's sha256 with the Hub's, and
with `--sha256` if you give it. Before it assigns any weight, it compares names, shapes and dtypes with the
architecture's. If a file in the cache is damaged, `pull` names it and fetches it once more. Without a network
(`HF_HUB_OFFLINE=1`), `pull` compares files with the hashes that the cache has in their names, or, on a system without
links, with those that an earlier pull recorded:

{offline}

A pulled network knows its commit. If you push it again, the card says what it is derived from:

{again}

timm's own loader loads the same repositories, without these checks:

{timm}

## When it does not work

An error is one line that says what to do. The exit code is then 1. `--debug` adds the traceback.

{errors}
"""


class Shell:
    """Runs commands in one folder with one Hub, and returns blocks of the page."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.environment = os.environ | {
            "HF_ENDPOINT": url, "HF_HOME": str(folder / ".cache"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "120",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }  # fmt: skip

    def show(
        self, code: str, command: str, arguments: Iterable[str] = (), failing: bool = False, **variables: str
    ) -> str:
        """Run code. Return a block with the command that a user would type, and its output."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=self.folder, env=self.environment | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        out = "\n".join(line.rstrip() for line in done.stdout.splitlines()).replace(self.url, "http://127.0.0.1:PORT")
        if done.returncode != failing:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{out}")
        line = " ".join([*(f"{name}={value}" for name, value in variables.items()), command])
        fence = "````" if "```" in out else "```"
        return f"{fence}\n$ {line}\n{out}\n{fence}"

    def cli(self, command: str, failing: bool = False, **variables: str) -> str:
        code = "from timm_nf.cli import main; main()"
        return self.show(code, f"timm-nf {command}", command.split(), failing, **variables)

    def python(self, code: str) -> str:
        code = code.strip()
        return f"```python\n{code}\n```\n\n{self.show(code, 'python example.py')}"


def blocks(shell: Shell) -> dict[str, str]:
    """Run all commands in their order."""
    push = "push model_best.pth.tar alice/t0 --model nfnet_f0 --license apache-2.0 --use-ema"
    shown: dict[str, str] = {}
    shown["convert"] = shell.cli("convert T0_haiku_flatmap.npz -o t0/")
    shown["reload"] = shell.python(RELOAD)
    shown["trained"] = shell.show(TRAINED, "python")
    shown["dry_run"] = shell.cli(f"{push} --dry-run")
    shown["push"] = shell.cli(push)
    shown["pull"] = shell.cli("pull alice/t0")
    shown["offline"] = shell.cli("pull alice/t0", HF_HUB_OFFLINE="1")
    shown["again"] = shell.python(AGAIN)
    shown["timm"] = shell.python(TIMM)
    errors = [
        shell.cli("convert hostile.npz -o x/", failing=True),
        shell.cli("convert T0_haiku_flatmap.npz -o t0/", failing=True),
        shell.cli(f"{push} --num-classes 7", failing=True),
        shell.cli("pull alice/t0@v2", failing=True),
        shell.cli("pull alice/nothing", failing=True),
        shell.cli(push, failing=True, HF_TOKEN=""),
    ]
    shown["errors"] = "\n\n".join(errors)
    return shown


def page() -> str:
    """The text of docs/hub.md."""
    with TemporaryDirectory() as temporary, stand_in_hub.running() as hub:
        folder = Path(temporary)
        for file in (CHECKPOINT, LOGITS):
            (folder / file.name).symlink_to(file)
        (folder / "hostile.npz").write_bytes(b"\x80\x04cposix\nsystem\nX\x09\x00\x00\x00rm -rf ~/x\x85R.")
        with Console(stderr=True).status("running the commands"):
            text = TEXT.format(**blocks(Shell(folder, hub.url)))
    if TOKEN in text or str(folder) in text or str(ROOT) in text:
        raise RuntimeError("the page would show a token or a path of this machine")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
