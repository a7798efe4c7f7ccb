"""The command line: ``marref``, and one file for each of its commands."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence

import marref
from marref.cli import (
    check,
    compare,
    demo,
    evaluate,
    exercise,
    export,
    golden,
    sample,
    train,
    watch,
)
from marref.cli.arguments import Parser, examples
from marref.cli.completion import SHELLS, PrintCompletion

_COMMANDS = (train, sample, evaluate, watch, export, demo, check, golden, compare, exercise)
_SIGPIPE = 13  # which Windows has no name for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without it those of the process.

    Returns
    -------
    int
        The exit status.  0: success; 1: a check failed, a comparison differs, or training
        diverged; 2: it could not be done; 130: Ctrl-C; 141: nobody reads the output.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the output's encoding lacks is written as an escape.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = _parsed(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        try:
            status: int = parsed.run(parsed)
            if sys.stdout is not None:  # None: closed before the start
                sys.stdout.flush()
        except FloatingPointError as error:
            print(f"marref: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:
            # Whoever read has seen enough; what is left goes nowhere, also at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + _SIGPIPE
        except (OSError, ValueError, TypeError, ImportError, MemoryError) as error:
            print(f"marref: {str(error) or type(error).__name__}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("marref: stopped", file=sys.stderr)
            return 130
    return status


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marref",
        description="The NumPy reference implementation of MAR.",
        epilog=examples("marref demo", "marref train book.txt --out run", "marref sample run"),
    )
    parser.add_argument("--version", action="version", version=f"marref {marref.__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        action=PrintCompletion,
        help="print what a shell needs to complete names (extra completion)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    parser.check_options(arguments)
    return parser.parse_args(arguments)


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"marref: warning: {message}", file=sys.stderr)
