"""Grading: run a learner's file in a process of its own, and say what is right and what is wrong.

Page: docs/exercises.md.
"""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from marref import files
from marref.teach.exercise import Exercise, Part
from marref.teach.exercises import by_name
from marref.trees import Array
from marref.verify import layers

_NAMED = re.compile(r"marref exercise ([\w-]+)")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is said of one function.

    Parameters
    ----------
    name : str
    passed : bool
    sentence : str
    """

    name: str
    passed: bool
    sentence: str


@dataclasses.dataclass(frozen=True)
class Grade:
    """What is said of a file.

    Parameters
    ----------
    exercise : str
    functions : tuple of Verdict
    """

    exercise: str
    functions: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether all functions are right."""
        return all(verdict.passed for verdict in self.functions)

    @property
    def sentence(self) -> str:
        """What is said of the first function that is not right, or that all are."""
        for verdict in self.functions:
            if not verdict.passed:
                return f"{verdict.name} {verdict.sentence}"
        return "all functions are right"


def exercise_of(file: Path, name: str | None = None) -> Exercise:
    """Find out which exercise a file is: as told, or as its docstring says, or by its name.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is a folder, there is no such exercise, or neither the file nor its name says which.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    files.regular(file)
    if name is not None:
        return by_name(name)
    found = _NAMED.search(file.read_bytes()[:1000].decode("utf-8", "replace"))
    try:
        return by_name(found[1] if found else file.stem.replace("_", "-"))
    except ValueError as unknown:
        raise ValueError(f"{file}: {unknown}; --exercise NAME says which it is") from None


def grade(file: Path, exercise: Exercise, time_limit: float) -> Grade:
    """Grade a learner's file.

    The file runs in a process of its own, which ends after a time limit.  This guards against
    accidents, not against malice: it may do what its user may do.

    Parameters
    ----------
    file : Path
    exercise : Exercise
    time_limit : float
        In seconds, for all functions together; right solutions need less than one.

    Returns
    -------
    Grade

    Raises
    ------
    OSError
        There is no such file.
    ValueError
        It is a folder.
    """
    files.regular(file)
    with tempfile.TemporaryDirectory() as folder:
        ended = _run(file, exercise, folder, time_limit)
        return graded(exercise, Path(folder), ended)


def graded(exercise: Exercise, folder: Path, ended: str) -> Grade:
    """Grade what `marref.teach.child` left in a folder.

    Parameters
    ----------
    exercise : Exercise
    folder : Path
    ended : str
        How the process ended, for when it has not come to its end.

    Returns
    -------
    Grade
    """
    report = json.loads((folder / "report.json").read_text("utf-8"))
    verdicts = []
    for part in exercise.parts:
        outputs = folder / f"{part.name}.npz"
        if "error" in report:
            sentence = f"cannot be called: the file {report['error']}"
        elif part.name in report["errors"]:
            sentence = report["errors"][part.name]
        elif outputs.exists():
            verdicts.append(_compared(part, outputs))
            continue
        else:
            at = report["running"]
            sentence = ended if at == part.name else f"is not graded: {at} {ended}"
        verdicts.append(Verdict(part.name, False, sentence))
    return Grade(exercise.name, tuple(verdicts))


def _run(file: Path, exercise: Exercise, folder: str, time_limit: float) -> str:
    """Run the file in a child process; return how it ended, for when it has not come to the end."""
    arguments = [exercise.name, str(file.resolve()), folder, str(time_limit)]
    # What the file prints goes to the standard error: the output is the grader's.
    done = subprocess.run(
        [sys.executable, "-m", "marref.teach.child", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,
        check=False,
    )
    return how_it_ended(file, Path(folder), time_limit, done.returncode)


def how_it_ended(file: Path, folder: Path, time_limit: float, status: int) -> str:
    """Say how a child ended that may not have come to the end."""
    stopped = (folder / "stopped.txt").read_text("utf-8", "replace")
    if not stopped:
        return f"ended the process, with status {status}"
    line = re.search(rf'"{re.escape(str(file.resolve()))}", line (\d+)', stopped)
    return f"did not end within {time_limit:g} s" + (f", in line {line[1]}" if line else "")


def _compared(part: Part, outputs: Path) -> Verdict:
    """Hold what a function returned at all points to the reference."""
    expected = [layers.named(part.reference(**point), part.outputs) for point in part.draw()]
    given: list[dict[str, Array]] = [{} for _ in expected]
    arrays, _ = files.load(outputs)
    for name, array in arrays.items():
        number, _, output = name.partition("/")
        given[int(number)][output] = array
    try:
        for found, right in zip(given, expected, strict=True):
            layers.check_fit(found, right)
    except ValueError as problem:
        said = "\nOr: ".join(layers.mistakes_in_shape(known(part), given, expected))
        mistake = f"\nExactly the numbers of this mistake: {said}" if said else ""
        return Verdict(part.name, False, f"is wrong: {problem}{mistake}")
    try:
        for found, right in zip(given, expected, strict=True):
            _check_dtypes(found, right)
    except ValueError as problem:
        return Verdict(part.name, False, f"is wrong: {problem}")
    diagnosis = layers.diagnose_points(expected, given, lambda: known(part))
    if diagnosis.passed:
        largest = max(diagnosis.errors.values())
        return Verdict(part.name, True, f"is right, to {largest:.1e} (allowed {layers.TOLERANCE})")
    return Verdict(part.name, False, f"is wrong: {_said(part, diagnosis)}")


def _said(part: Part, found: layers.LayerDiagnosis) -> str:
    """Say what was found; last and in one line, what is wrong and no known mistake explains.

    One mistake in a backward makes wrong whatever comes after it, which may be dozens of outputs;
    it is found between them and what is right.
    """
    lines = [finding.sentence for finding in found.findings if finding.mistakes]
    unnamed = [finding for finding in found.findings if not finding.mistakes]
    others = [finding.outputs[0] for finding in unnamed]
    wanted = set(others)
    together = next(
        (said for names, said in part.steps.items() if set(names.split()) == wanted), ""
    )
    steps = part.steps if all(name in part.steps for name in others) else {}
    for finding in unnamed:
        name = finding.outputs[0]
        step = together if together else steps.get(name)
        if not lines or (step and not together):
            others.remove(name)
            lines.append(finding.sentence + (f"\nThe step to look at: {step}." if step else ""))
    if others:
        wrong = {name for finding in found.findings for name in finding.outputs}
        right = [name for name in found.errors if name not in wrong]
        lines.append(f"Wrong too: {', '.join(others)}. Right: {', '.join(right) or 'nothing'}.")
    return "\n".join(lines)


@functools.cache
def known(part: Part) -> list[layers.Candidate]:
    """Compute what all mistakes come to at the points of a function."""
    return list(layers.candidates(part.reference, part.draw(), part.outputs, part.mistakes))


def _check_dtypes(given: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    for name, right in expected.items():
        found = given[name].dtype
        kinds = "iu" if right.dtype.kind in "iu" else right.dtype.kind
        if found.kind not in kinds or (right.dtype.kind in "fc" and found != right.dtype):
            raise ValueError(f"{name}: dtype {found}, expected {right.dtype} as of the arguments")
