"""The console script `timm-nf`: it answers Ctrl-C also while torch is imported, which takes seconds."""

import os
import signal

__all__ = ["main"]


def _stop(*_: object) -> None:
    # Raised in the middle of an import, an exception may be swallowed or become another one.
    os.write(2, b"timm-nf: interrupted\n")
    os._exit(130)  # public, for all its underscore


def main() -> None:
    """Import the package and run the command line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, _stop)
    from timm_nf.cli import main

    signal.signal(signal.SIGINT, before)
    main()


if __name__ == "__main__":
    main()
