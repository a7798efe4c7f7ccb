"""How a command line is read: one line for what is wrong with it, and the nearest name."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from marref import checks


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that shows examples as they are written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        """Say on one line what is wrong, and exit with 2."""
        print(f"{self.prog}: {message} (--help says more)", file=sys.stderr)
        raise SystemExit(2)

    def check_options(self, arguments: Sequence[str]) -> None:
        """End with the nearest names if a command, or an option of it, does not exist."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and arguments:
                name, *rest = arguments
                if name in action.choices:
                    action.choices[name].check_options(rest)
                    return
                if not name.startswith("-"):
                    what = str(action.metavar).lower()
                    self.error(f"{what} {checks.unknown_name(name, action.choices)}")
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            # With a space it is taken for a value.
            if name.startswith("--") and " " not in argument and name not in known:
                self.error(checks.unknown_name(name, known))


def examples(*lines: str) -> str:
    """Write the end of a command's help."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


class Named:
    """Reads the name of a rule, or ``name:number``, and makes the rule of it."""

    def __init__(self, known: Mapping[str, type[Any]]) -> None:
        self.known = known

    def __call__(self, text: str) -> Any:
        """Make a rule, without a number with its default."""
        name, colon, number = text.partition(":")
        if name not in self.known:
            known = ", ".join(self.known)
            raise argparse.ArgumentTypeError(f"received {name!r}, expected one of {known}")
        rule = self.known[name]
        if not colon:
            return rule()
        if not dataclasses.fields(rule):
            raise argparse.ArgumentTypeError(f"received {text!r}, expected {name} without a number")
        try:
            return rule(real(number))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def described(self) -> str:
        """List the names, with their numbers."""
        fields = {name: dataclasses.fields(rule)[:1] for name, rule in self.known.items()}
        return ", ".join(
            ":".join([name, *(str(field.default) for field in of_rule)])
            for name, of_rule in fields.items()
        )


def integer(text: str) -> int:
    """Read an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"received {text}, expected an integer") from None


def integers(text: str) -> list[int]:
    """Read integers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"received {text!r}, expected integers with commas between them"
        ) from None


def real(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"received {text}, expected a number") from None


def positive(text: str) -> int:
    """Read an integer from 1 on."""
    return _at_least(text, 1)


def not_negative(text: str) -> int:
    """Read an integer from 0 on."""
    return _at_least(text, 0)


def _at_least(text: str, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"received {text}, expected an integer >= {minimum}")
    return value


def check_folder(option: str, path: Path) -> None:
    """Raise ValueError unless the folder of a file to be written exists."""
    if not path.parent.is_dir():
        raise ValueError(f"{option}: received {path}, whose folder does not exist")


def add_processes(command: argparse.ArgumentParser) -> None:
    """Add the option of commands whose parts do not depend on each other."""
    command.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="share the work among so many, of one thread each; default: this one alone, or all "
        "that mpiexec has started",
    )
