"""``marref exercise``: functions to fill in, hints, and what is wrong with yours."""

import argparse
import json
from pathlib import Path
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref exercise list",
    "marref exercise start attention",
    "marref exercise hint attention",
    "marref exercise check attention.py",
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    exercise = commands.add_parser(
        "exercise",
        help="derive a gradient, write it, and be told what is wrong with it",
        description="Exercises that grade themselves, and name the mistake that you have made.",
        epilog=_EXAMPLES,
    )
    actions = exercise.add_subparsers(required=True, metavar="ACTION")
    _add(actions, "list", _list, "list all exercises")

    start = _add(actions, "start", _start, "write a file with the functions to fill in")
    start.add_argument("name", metavar="NAME", help="of an exercise in the list")
    start.add_argument("--out", type=Path, metavar="FILE", help="default: NAME.py, here")

    hint = _add(actions, "hint", _hint, "show a hint")
    hint.add_argument("name", metavar="NAME")
    hint.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=1, help="1 is a nudge, 3 all but the code"
    )

    check = _add(actions, "check", _check, "say what is right, and what is wrong and why")
    check.add_argument("file", metavar="FILE", type=Path)
    check.add_argument("--exercise", metavar="NAME", help="default: as the file says")
    check.add_argument("--json", action="store_true", help="one JSON object, for who grades many")
    check.add_argument(
        "--time-limit",
        type=arguments.positive,
        default=10,
        metavar="SECONDS",
        help="for the whole file; default: 10",
    )

    solution = _add(actions, "solution", _solution, "print the package's own functions")
    solution.add_argument("name", metavar="NAME")


def _add(actions: Any, name: str, run: Any, summary: str) -> Any:
    action = actions.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    action.set_defaults(run=run)
    return action


def _list(parsed: argparse.Namespace) -> int:
    from marref.teach.exercises import EXERCISES

    for exercise in EXERCISES.values():
        long = " (long)" if exercise.is_long else ""
        print(f"{exercise.name:<21}{exercise.title}{long}")
    return 0


def _start(parsed: argparse.Namespace) -> int:
    from marref.teach.exercises import by_name

    exercise = by_name(parsed.name)
    path = parsed.out or Path(exercise.file_name)
    arguments.check_folder("--out", path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(exercise.stub())
    except FileExistsError:
        raise ValueError(f"{path}: exists, and is left as it is; --out names another") from None
    functions = ", ".join(part.name for part in exercise.parts)
    print(f"Wrote {path}: fill in {functions}. Derived on the page {exercise.page}.")
    return 0


def _hint(parsed: argparse.Namespace) -> int:
    from marref.teach.exercises import by_name

    print(by_name(parsed.name).hints[parsed.stage - 1])
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from marref.teach import grading

    exercise = grading.exercise_of(parsed.file, parsed.exercise)
    grade = grading.grade(parsed.file, exercise, parsed.time_limit)
    if parsed.json:
        functions = [vars(verdict) for verdict in grade.functions]
        result = {"exercise": grade.exercise, "passed": grade.passed, "sentence": grade.sentence}
        print(json.dumps({**result, "functions": functions}, ensure_ascii=False))
    else:
        print("\n\n".join(f"{verdict.name} {verdict.sentence}" for verdict in grade.functions))
    return 0 if grade.passed else 1


def _solution(parsed: argparse.Namespace) -> int:
    from marref.teach.exercises import by_name

    print(by_name(parsed.name).solution())
    return 0
