"""``marref --print-completion``: what a shell needs to complete names, through shtab."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marref.cli.arguments import Named

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("data", "tokenizer", "prompt")  # options that may name a file, beside those of type Path


class PrintCompletion(argparse.Action):
    """Prints the script for a shell, and ends."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option: Any = None
    ) -> None:
        """Do so for the parser that the option belongs to."""
        try:
            import shtab
        except ImportError:
            parser.error(f'{option}: needs the completion extra: pip install ".[completion]"')
        for action in _actions(parser):
            if action.type is Path or action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            if isinstance(action.type, Named):
                action.choices = tuple(action.type.known)
        print(shtab.complete(parser, shell))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """List the options and arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
