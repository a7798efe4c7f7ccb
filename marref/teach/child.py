"""Runs a learner's file: ``python -m marref.teach.child EXERCISE FILE OUT LIMIT``.

The process knows the arguments and not the answers.  OUT, a folder, gets `report.json`, and for
each function that could be called a file of what it returned.  After LIMIT seconds the process
ends, and `stopped.txt` says where it was.  What the file prints goes to the output of this process.
"""

import copy
import faulthandler
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from marref import files, trees
from marref.teach.exercise import Part, Point
from marref.teach.exercises import EXERCISES
from marref.trees import Array
from marref.verify.layers import named


def main(exercise: str, file: str, out: str) -> None:
    """Call every function of the exercise at all its points, and write what came of it."""
    folder = Path(out)
    report: dict[str, Any] = {"running": "the file itself", "errors": {}}

    def write() -> None:
        (folder / "report.json").write_text(json.dumps(report), "utf-8")

    write()
    try:
        module = _loaded(file)
    except BaseException as error:
        report["error"] = _said(error, file)
        write()
        return
    for part in EXERCISES[exercise].parts:
        report["running"] = part.name
        write()
        try:
            calls = [_called(module, part, point) for point in part.draw()]
        except BaseException as error:
            report["errors"][part.name] = _said(error, file)
            continue
        outputs = {
            f"{at}/{name}": each for at, call in enumerate(calls) for name, each in call.items()
        }
        files.save(folder / f"{part.name}.npz", outputs, {}, compressed=False)
    report["running"] = None
    write()


class WrongCall(Exception):
    """A function that is missing, or whose result or behaviour cannot be compared."""


def _loaded(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exercise", file)
    if spec is None or spec.loader is None:
        raise WrongCall("is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(module: ModuleType, part: Part, point: Point) -> dict[str, Array]:
    function = getattr(module, part.name, None)
    if function is None:
        raise WrongCall("is not defined")
    given = copy.deepcopy(dict(point))
    result = function(**given)
    try:
        arrays = named(result, part.outputs)
    except ValueError as problem:
        raise WrongCall(str(problem)) from None
    for name, value in point.items():
        if not _equal(value, given[name]):
            raise WrongCall(f"writes over its argument {name}; arguments stay as they are")
    return arrays


def _equal(before: Any, after: Any) -> bool:
    if not isinstance(before, dict | list | np.ndarray):
        return True
    try:
        old, new = trees.flatten(before), trees.flatten(after)
    except (TypeError, ValueError):  # what is there now is no tree
        return False
    return old.keys() == new.keys() and all(np.array_equal(old[name], new[name]) for name in old)


def _said(error: BaseException, file: str) -> str:
    """Say what went wrong, and in which line of the learner's file."""
    if isinstance(error, WrongCall):
        return str(error)
    if isinstance(error, NotImplementedError):
        return "is not written yet"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    said = str(error).split("\n")[0]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, said = [error.lineno], error.msg
    where = f" in line {lines[-1]}" if lines else ""
    return f"raises {type(error).__name__}{where}" + (f": {said}" if said else "")


def main_within(exercise: str, file: str, out: str, limit: str) -> None:
    """Do so, and end the process after so many seconds."""
    with (Path(out) / "stopped.txt").open("w") as stopped:
        faulthandler.dump_traceback_later(float(limit), exit=True, file=stopped)
        main(exercise, file, out)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main_within(*sys.argv[1:])
