"""The `timm-nf` command: arguments in, tables out. What it prints, the other modules compute."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .._text import reason
from . import inference, measure, networks, weights
from .terminal import complain, typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="timm-nf",
    help="Normalizer-free networks and adaptive gradient clipping for timm.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 the command line was wrong. "
    "After a failure, the same command with --debug shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
"""The typer application of all commands; `main` runs it."""
for module in (networks, weights, inference, measure):
    app.add_typer(module.commands)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line, `sys.argv` by default.

    Raises:
        SystemExit: with code 1 if the work failed and 2 if the command line was wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # anywhere, so that it can be added to the end of what failed
    arguments = [argument for argument in arguments if argument != "--debug"]
    if debug:
        logging.basicConfig()
        logging.getLogger("timm_nf").setLevel(logging.DEBUG)
    else:  # it announces every retry of a download; what became of it is ours to say, in one line
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    command: Callable[..., Any] = app
    try:
        code = command(arguments or ["--help"], prog_name="timm-nf", standalone_mode=False)
    except typer.TyperException as error:  # what typer raises of its own is about the command line
        message = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
        complain(f"{message} (see timm-nf --help)")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        complain(str(error) or reason(error))
        raise SystemExit(1) from None
    if code:
        raise SystemExit(code)
