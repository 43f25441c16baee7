"""Ctrl-C while a command still starts: importing torch takes seconds, and a traceback from inside it says nothing.

Of the standard library alone, because the package imports it before anything else.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def _is_command() -> bool:
    """Whether this process is `sirius` or `python -m sirius_ext`. For the latter sys.argv begins with "-m" as long as Python only
    looks for the module, which is when it imports the package."""
    first = Path(sys.argv[0]) if getattr(sys, "argv", None) else Path()
    if str(first) == "-m":
        return any(argument in ("sirius_ext", "-msirius_ext") for argument in sys.orig_argv)
    return first.stem == "sirius" or first.parts[-2:] == ("sirius_ext", "__main__.py")


def raise_again() -> None:
    """From here on an interrupt is a KeyboardInterrupt again, unless it was ignored from the beginning (nohup)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# An interrupt ends a starting command by the signal itself, which shells show as status 130.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
