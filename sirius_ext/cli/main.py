"""The command line: `python -m sirius_ext generate | chat | serve | calibrate | prepare | eval | report | study | analyze |
lm_eval | demo | info`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from .. import __version__
from ..decoding.stats import CostlyDrafts
from ..errors import reason
from . import commands, interrupts
from .arguments import Parser, as_option, check_text
from .options import Run
from .terminal import BROKEN_PIPE, drop_output, flushed


def main(arguments: list[str] | None = None) -> int:
    """Run one command. A wrong argument is one line on stderr and exit status 2, a machine that is too small status 1, an
    interrupt 130, and a reader of the output that has left 141."""
    parser = _parser()
    try:
        warnings.simplefilter("ignore", CostlyDrafts)  # `generate` says it in a line, and tables have the effective density
        with flushed():
            arguments = sys.argv[1:] if arguments is None else arguments
            check_text(arguments)
            if arguments[:1] == ["lm_eval"]:
                run = commands.lm_eval(arguments[1:])
            else:
                options = parser.parse_args(arguments)
                parser = options.parser
                run = options.command(options)
            interrupts.raise_again()  # what takes seconds to import is imported
            return run()
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        drop_output()
        print(f"sirius_ext: error: {as_option(reason(error), parser)}", file=sys.stderr)
        return 1 if isinstance(error, (RuntimeError, MemoryError)) else 2
    except KeyboardInterrupt as stop:
        # A terminal has shown ^C, which is no line.
        print("\n" if sys.stderr.isatty() else "", "; ".join(("sirius_ext: interrupted", *stop.args)), sep="", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(
        prog="sirius" if Path(sys.argv[0]).stem == "sirius" else "python -m sirius_ext",
        description="Decode language models with contextual sparsity and correction.",
    )
    parser.add_argument("--version", action="version", version=f"sirius_ext {__version__}")
    known = parser.add_subparsers(metavar="COMMAND")
    commands.add(known)

    def none_given(_: argparse.Namespace) -> Run:
        raise ValueError(f"expected a command: {', '.join(known.choices)}; {parser.prog} --help says what they do")

    parser.set_defaults(command=none_given, parser=parser)
    return parser
