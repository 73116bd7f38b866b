"""The `timm-nf` command: puts all commands together, runs one, and turns errors into one line and an exit code."""

import inspect
import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, cast

from .._text import reason
from ..version import __version__
from . import inference, measure, networks, weights
from .terminal import complain, not_installed, typer

__all__ = ["app", "main"]

_INTERRUPTED = 130  # the exit code that shells give

app = typer.Typer(
    name="timm-nf",
    epilog="Exit codes: 0 done, 1 the work failed, 2 the command line was wrong, 130 interrupted. "
    "After a failure, the same command with --debug shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
"""The typer application of all commands; `main` runs it."""


def _paragraphs(text: str) -> str:
    """A docstring without the line breaks inside its paragraphs. typer would keep them."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


for module in (networks, weights, inference, measure):
    for command in module.commands.registered_commands:
        command.help = _paragraphs(inspect.getdoc(command.callback) or "")
    app.add_typer(module.commands)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"timm-nf {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Normalizer-free networks and adaptive gradient clipping for timm."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line, `sys.argv` by default.

    Raises:
        SystemExit: with code 1 if the work failed, 2 if the command line was wrong and 130 if it was interrupted.

    Examples:
        >>> main(["recipe", "nfnet_f0", "--kind", "finetune"])
        # nfnet_f0, fine-tuning...
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # anywhere, so that people can add it at the end of the line that failed
    arguments = [argument for argument in arguments if argument != "--debug"]
    _escape_unprintable()
    _set_log_levels(debug)
    command: Callable[..., Any] = app
    try:
        code = command(arguments or ["--help"], prog_name="timm-nf", standalone_mode=False)
    except typer.TyperException as error:  # typer's own errors are about the command line
        message = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
        complain(f"{message} (see timm-nf --help)")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if debug:
            raise
        complain(_one_line(error))
        raise SystemExit(1) from None
    if code == _INTERRUPTED:  # typer returns it too
        print("timm-nf: interrupted", file=sys.stderr)
    if code:
        raise SystemExit(code)


def _escape_unprintable() -> None:
    """Escape characters that the terminal's encoding lacks, for example in labels. Python would raise an error."""
    stdout: object = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        cast("io.TextIOWrapper[Any]", stdout).reconfigure(errors="backslashreplace")


def _set_log_levels(debug: bool) -> None:
    if debug:
        logging.basicConfig()
        logging.getLogger("timm_nf").setLevel(logging.DEBUG)
    else:  # the Hub's client logs every retry of a download; our one line says how it ended
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _one_line(error: Exception) -> str:
    """The error's text. For an operating system's error, the file and the text without its number."""
    if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
        return not_installed(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, OSError)) and str(error):
        return str(error)
    return reason(error)  # with its type: the text of others, such as a missing key, says nothing alone
