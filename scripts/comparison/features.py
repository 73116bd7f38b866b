"""The rows of the comparison's first table. A cell is an answer of the running package, or was read in its source."""

from collections.abc import Callable
from typing import Any

from scripts.comparison.peers import PeerError

COLUMNS = ["timm_nf", "timm", "authors' code", "nfnets-pytorch", "pytorch_optimizer", "composer", "optax"]
Cells = dict[str, str]

ONLY_CLIPS = {"pytorch_optimizer": "none", "composer": "none", "optax": "none"}

# title: (cells, where they were read). The authors' code is nfnets/ of deepmind-research at f5de0ede, timm its 1.0.31.
READ: dict[str, tuple[Cells, str]] = {
    "Reads the authors' files without running code from them": (
        {
            "timm_nf": "yes: a reader for the few types such a pickle needs",
            "timm": "has no reader; safetensors made from them on the Hub",
            "authors' code": "no: dill.load",
            "nfnets-pytorch": "has no reader",
        }
        | dict.fromkeys(ONLY_CLIPS, "has no networks"),
        "timm_nf/convert/haiku_pickle.py; timm models/nfnet.py; nfnets/utils.py; all files of the others",
    ),
    "What it clips for": (
        {
            "timm_nf": "every optimizer of timm's registry (`agc` + name), and train.py's `--clip-mode agc`",
            "timm": "any optimizer, called between backward and step (`--clip-mode agc`)",
            "authors' code": "`SGD_AGC`; parameter groups may mix optimizers (`Hybrid`)",
            "nfnets-pytorch": "`SGD_AGC`, or any optimizer wrapped in `AGC`",
            "pytorch_optimizer": "`Ranger21`; a function of one tensor for anything else",
            "composer": "any optimizer in its `Trainer` (`GradientClipping`), or a function of a model",
            "optax": "any chain of transformations",
        },
        "timm utils/clip_grad.py; nfnets/optim.py; nfnets/agc.py and sgd_agc.py; optimizer/agc.py and ranger21.py; "
        "algorithms/gradient_clipping; transforms/_clipping.py",
    ),
    "The step after clipping": (
        {
            "timm_nf": "the wrapped optimizer's own; `agcsgd` takes torch's fused step on CPUs where bit-identical",
            "timm": "the optimizer's own",
            "authors' code": "compiled by XLA with the rest of the training step",
            "nfnets-pytorch": "`SGD_AGC`: a Python loop over parameters; `AGC`: the wrapped optimizer's own",
            "pytorch_optimizer": "`Ranger21`: foreach where possible",
            "composer": "the optimizer's own",
            "optax": "compiled by XLA if the caller does",
        },
        "timm_nf/optim/optimizer.py; timm utils/clip_grad.py; nfnets/experiment_nfnets.py; nfnets/sgd_agc.py; "
        "optimizer/ranger21.py; algorithms/gradient_clipping; transforms/_clipping.py",
    ),
    "Says what was clipped": (
        {"timm_nf": "`optimizer.clip_stats()`, `diagnostics.agc_stats(model)`"} | dict.fromkeys(COLUMNS[1:], "no"),
        "timm_nf/optim/optimizer.py; the files above",
    ),
    "Has what timm_nf lacks": (
        {
            "timm_nf": "",
            "timm": "nothing lost: timm_nf adds to it, and its other NF networks (ECA, SiLU; some with weights) stay",
            "authors' code": "a training loop with augmentations (here: timm's); Fixup ResNets (another method)",
            "nfnets-pytorch": "nothing: its layers and `replace_conv` are `timm_nf.layers` and `replace_convs`",
            "pytorch_optimizer": "other optimizers, losses and schedules (here: timm's, with `agc` before each)",
            "composer": "a trainer (here: timm's); clipping by global norm and value (torch has both)",
            "optax": "JAX (this package is for PyTorch)",
        },
        "the packages' modules",
    ),
}

# Features for which some packages answer, and others were read: (title, question, cells that were read, their source).
ASKED: list[tuple[str, str, tuple[str, ...], Cells, str]] = [
    (
        "Normalizer-free networks",
        "networks",
        ("timm_nf", "timm", "nfnets-pytorch"),
        {"authors' code": "31: `variant_dict` of three classes; weights of 7"} | ONLY_CLIPS,
        "counted; authors: nfnets/nfnet.py, nf_resnet.py, nf_regnet.py, README.md",
    ),
    (
        "Loads a file of the authors (T0 of tests/golden) by timm's `checkpoint_path`",
        "authors_checkpoint",
        ("timm_nf", "timm"),
        {"authors' code": "its own form", "nfnets-pytorch": "no timm model"}
        | dict.fromkeys(ONLY_CLIPS, "has no networks"),
        "tried",
    ),
    (
        "Fused inference: F0 after the package's conversion",
        "fused",
        ("timm_nf", "timm"),
        {"authors' code": "no conversion", "nfnets-pytorch": "no conversion"}
        | dict.fromkeys(ONLY_CLIPS, "has no networks"),
        "tried: `timm_nf.fuse`, timm's `reparameterize_model`; read: nfnets/base.py of both",
    ),
    (
        "The classifier under clipping (the paper: weight no, bias yes)",
        "classifier",
        ("nfnets-pytorch", "composer", "optax"),
        {
            "authors' code": "weight not clipped, bias clipped: by module name",
            "pytorch_optimizer": "up to the caller; `Ranger21` clips all",
        },
        "tried: `agcsgd`, `--clip-mode agc` (benchmarks/differences.py), `AGC(model=..., ignore_agc=['fc'])`, "
        "`apply_gradient_clipping`, `optax.masked`; read: nfnets/experiment_nfnets.py, optimizer/ranger21.py",
    ),
    (
        "Gains and skip gains that decay (the authors: none)",
        "decayed_gains",
        ("pytorch_optimizer",),
        {
            "authors' code": "0: by name",
            "nfnets-pytorch": "all, unless the caller makes groups",
            "composer": "up to the caller's groups",
            "optax": "up to the caller's mask",
        },
        "counted: `create_optimizer_v2(model, ...)` (benchmarks/differences.py), `get_optimizer_parameters` on "
        "`dm_nfnet_f0` with its default `wd_ban_list`; read: nfnets/experiment_nfnets.py, nfnets/sgd_agc.py",
    ),
    (
        "Sharded parameters: against the same clipping of whole ones",
        "sharded",
        ("timm_nf", "timm", "nfnets-pytorch", "pytorch_optimizer", "composer", "optax"),
        {"authors' code": "whole on every device (`pmap`)"},
        "tried: float64 DTensors, a convolution, a linear layer and a bias sharded on their first axis over two gloo "
        "processes; optax: the convolution over two XLA devices, as JAX shards evenly only",
    ),
]


def cell(peer: Any, question: str, **arguments: Any) -> str:
    """The answer, or the reason why there is none."""
    try:
        return str(peer.ask(question, **arguments))
    except PeerError as error:
        return f"fails: {error}"


def rows(
    peers: dict[str, Any], known: dict[str, Cells], arguments: dict[str, dict[str, Any]], track: Callable[..., Any]
) -> list[list[str]]:
    """All rows of the table: the title, a cell for each of `COLUMNS`, and how the cells were obtained.

    Args:
        peers: The packages' processes, by title.
        known: Cells that were measured elsewhere, by question.
        arguments: The arguments of questions, by question.
        track: Shows progress.
    """
    facts: dict[str, Any] = {}
    for title, peer in track(peers.items(), "versions"):
        try:
            facts[title] = peer.ask("versions")
        except PeerError as error:
            facts[title] = dict.fromkeys(("version", "licence", "ran"), str(error))
    facts["authors' code"] = {"version": "f5de0ede", "licence": "Apache-2.0", "ran": "jax 0.10.2, the goldens only"}
    how = "metadata of the installed package; authors: commit, LICENSE, tests/golden/README.md"
    table = [
        [name, *(facts[title][key] for title in COLUMNS), how]
        for name, key in (("Version read and run", "version"), ("Licence", "licence"), ("Ran on", "ran"))
    ]
    for name, question, asked, read, where in track(ASKED, "features"):
        cells = read | known.get(question, {})
        cells |= {title: cell(peers[title], question, **arguments.get(question, {})) for title in asked}
        table.append([name, *(cells[title] for title in COLUMNS), where])
    return table + [[name, *(cells[t] for t in COLUMNS), f"read: {where}"] for name, (cells, where) in READ.items()]
