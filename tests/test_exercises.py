"""Exercises: the solution passes, and what a learner gets wrong is told in the right sentence."""

import collections
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marref import cli
from marref.teach import child, grading
from marref.teach.exercises import EXERCISES

from .wrong_attempts import ATTEMPTS

ALL = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=list(EXERCISES))


def solution(exercise):
    """The learner's file that asks the package for everything."""
    return "".join(
        f"from {part.reference.__module__} import {part.reference.__qualname__} as {part.name}\n"
        for part in exercise.parts
    )


def graded(exercise, text, folder):
    """Grade a file without a process of its own, which costs most of the time."""
    file = folder / "learner.py"
    file.write_text(text, "utf-8")
    child.main(exercise.name, str(file), str(folder))
    return grading.graded(exercise, folder, "was not run in a process")


@ALL
def test_the_solution_passes(exercise, tmp_path):
    grade = graded(exercise, solution(exercise), tmp_path)
    assert grade.passed, grade.sentence
    assert grade.sentence == "all functions are right"


@ALL
def test_the_file_that_is_started_defines_the_functions_and_nothing_else(exercise, tmp_path):
    grade = graded(exercise, exercise.stub(), tmp_path)
    assert [verdict.sentence for verdict in grade.functions] == ["is not written yet"] * len(
        exercise.parts
    )
    file = tmp_path / "any.py"
    file.write_text(exercise.stub(), "utf-8")
    assert grading.exercise_of(file) is exercise


@ALL
def test_an_empty_file_defines_nothing(exercise, tmp_path):
    grade = graded(exercise, "", tmp_path)
    assert [verdict.sentence for verdict in grade.functions] == ["is not defined"] * len(
        exercise.parts
    )


@ALL
def test_a_file_that_raises_is_told_where(exercise, tmp_path):
    at_once = graded(exercise, "x = 1\nraise KeyError('no')\n", tmp_path)
    assert at_once.functions[0].sentence == (
        "cannot be called: the file raises KeyError in line 2: 'no'"
    )
    functions = "".join(f"def {part.name}(**_):\n    1 / 0\n" for part in exercise.parts)
    called = graded(exercise, functions, tmp_path)
    assert called.functions[0].sentence == ("raises ZeroDivisionError in line 2: division by zero")
    assert not any(verdict.passed for verdict in (*at_once.functions, *called.functions))


@ALL
def test_a_file_that_prints_where_the_answers_are_has_answered_nothing(exercise, tmp_path):
    lines = ["import marref.teach.exercises"]
    for part in exercise.parts:
        lines += [f"def {part.name}(**_):", "    print(marref.teach.exercises.__file__)"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        grade = graded(exercise, "\n".join(lines), tmp_path)
    assert "exercises" in printed.getvalue()
    for verdict, part in zip(grade.functions, exercise.parts, strict=True):
        wanted = ", ".join(name or "…" for name in part.outputs)
        if len(part.outputs) > 1:
            assert verdict.sentence == f"returned None, expected {wanted}"
        else:
            assert verdict.sentence == f"{wanted}: received None, expected an array of numbers"


WITH = """
import numpy as np
from marref import trees
{solution}
def changed(value):
    if isinstance(value, tuple):
        return tuple(map(changed, value))
    if isinstance(value, dict):
        return trees.map_leaves(changed, value)
    return {change} if value is not None else None
{functions}
"""


def with_results(exercise, change):
    """The solution, with a change to every array that it returns."""
    imports = "".join(
        f"from {part.reference.__module__} import {part.reference.__qualname__} as _{part.name}\n"
        for part in exercise.parts
    )
    functions = "".join(
        f"def {part.name}(**point):\n    return changed(_{part.name}(**point))\n"
        for part in exercise.parts
    )
    return WITH.format(solution=imports, change=change, functions=functions)


@ALL
def test_right_numbers_of_the_wrong_dtype_are_told_so(exercise, tmp_path):
    grade = graded(exercise, with_results(exercise, "np.asarray(value, np.float32)"), tmp_path)
    for verdict in grade.functions:
        assert "dtype float32, expected " in verdict.sentence


@ALL
def test_right_numbers_in_the_wrong_shape_are_told_so(exercise, tmp_path):
    grade = graded(exercise, with_results(exercise, "np.asarray(value)[..., None]"), tmp_path)
    for verdict in grade.functions:
        assert "1], expected [" in verdict.sentence
        assert verdict.sentence.endswith("; the numbers are right")


# To start a process costs a second; this one starts all others, which are there at once.
FORKS = """
import json, os, sys
from marref.teach import child
for job in json.load(sys.stdin):
    if os.fork() == 0:
        child.main_within(*job)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_files_that_loop_for_ever_are_ended_and_told_where(tmp_path):
    jobs = {}
    for name, exercise in EXERCISES.items():
        folder = tmp_path / name
        folder.mkdir()
        first = exercise.parts[0].name
        text = solution(exercise) + f"def {first}(**_):\n    while True: pass\n"
        (folder / "learner.py").write_text(text, "utf-8")
        jobs[name] = (name, str((folder / "learner.py").resolve()), str(folder), "2")
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(list(jobs.values())),
        text=True,
        env=environment,
        check=True,
    )
    for name, exercise in EXERCISES.items():
        file, folder = Path(jobs[name][1]), tmp_path / name
        grade = grading.graded(exercise, folder, grading.how_it_ended(file, folder, 2, 1))
        first, *others = exercise.parts
        ended = f"did not end within 2 s, in line {len(exercise.parts) + 2}"
        assert [verdict.sentence for verdict in grade.functions] == [
            ended,
            *(f"is not graded: {first.name} {ended}" for _ in others),
        ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import sys; sys.exit(3)", "cannot be called: the file raises SystemExit in line 1: 3"),
        (
            "def softmax(:",
            "cannot be called: the file raises SyntaxError in line 1: invalid syntax",
        ),
        (
            "def softmax(scores):\n    scores -= 1\n    return scores",
            "writes over its argument scores; arguments stay as they are",
        ),
        ("softmax = 3", "raises TypeError: 'int' object is not callable"),
        (
            "def softmax(x):\n    return x",
            "raises TypeError: softmax() got an unexpected keyword argument 'scores'",
        ),
        (
            "def softmax(scores):\n    return 'weights'",
            "weights: received a str, expected an array of numbers",
        ),
        (
            "import numpy as np\ndef softmax(scores):\n    return np.array([None])",
            "weights: received a ndarray, expected an array of numbers",
        ),
        (
            "def softmax(scores):\n    return scores, scores",
            "returned a tuple of 2, expected weights",
        ),
    ],
)
def test_whatever_a_file_does_is_told_in_a_sentence(text, sentence, tmp_path):
    assert graded(EXERCISES["softmax"], text, tmp_path).functions[0].sentence == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("while True: pass", "is not graded: the file itself did not end within 1 s, in line 1"),
        (
            "import os; os._exit(7)",
            "is not graded: the file itself ended the process, with status 7",
        ),
        (
            "def softmax(scores):\n    return input()",
            "raises EOFError in line 2: EOF when reading a line",
        ),
    ],
)
def test_whatever_a_file_does_to_its_process_is_told_too(text, sentence, tmp_path):
    file = tmp_path / "softmax.py"
    file.write_text(text, "utf-8")
    grade = grading.grade(file, EXERCISES["softmax"], time_limit=1 if "while" in text else 30)
    assert grade.functions[0].sentence == sentence


def test_what_a_file_prints_is_not_the_graders_output(tmp_path):
    file = tmp_path / "mask_ratio.py"
    file.write_text(f"print('hello')\n{solution(EXERCISES['mask-ratio'])}", "utf-8")
    command = [sys.executable, "-m", "marref", "exercise", "check", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "hello\n"
    assert json.loads(done.stdout) == {
        "exercise": "mask-ratio",
        "passed": True,
        "sentence": "all functions are right",
        "functions": [
            {
                "name": "one_minus_cosine",
                "passed": True,
                "sentence": "is right, to 0.0e+00 (allowed 1e-12)",
            }
        ],
    }


def test_an_exercise_is_started_once_and_its_hints_and_solution_are_shown(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["exercise", "start", "layer-norm"]) == 0
    assert capsys.readouterr().out == (
        "Wrote layer_norm.py: fill in forward. Derived on the page layer-norm.md.\n"
    )
    Path("layer_norm.py").write_text("mine", "utf-8")
    assert cli.main(["exercise", "start", "layer-norm"]) == 2
    assert "layer_norm.py: exists" in capsys.readouterr().err
    assert Path("layer_norm.py").read_text("utf-8") == "mine"
    assert cli.main(["exercise", "hint", "layer-norm", "--stage", "3"]) == 0
    assert "keepdims=True" in capsys.readouterr().out
    assert cli.main(["exercise", "solution", "layer-norm"]) == 0
    assert "inverse_std = 1.0 / np.sqrt(variance + epsilon)" in capsys.readouterr().out
    assert cli.main(["exercise", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(EXERCISES)


def test_an_unknown_exercise_is_told_the_nearest(tmp_path, capsys):
    assert cli.main(["exercise", "start", "atention"]) == 2
    assert "'atention' is unknown; nearest: attention" in capsys.readouterr().err
    file = tmp_path / "homework.py"
    file.write_text("", "utf-8")
    assert cli.main(["exercise", "check", str(file)]) == 2
    assert "exercise 'homework' is unknown" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.exercise)
def test_a_typical_wrong_attempt_is_told_its_mistake(attempt, tmp_path):
    exercise = EXERCISES[attempt.exercise]
    text = exercise.stub() + solution(exercise) + attempt.source
    for verdict in graded(exercise, text, tmp_path).functions:
        assert verdict.passed == (verdict.name != attempt.function), verdict.sentence
        if not verdict.passed:
            assert attempt.phrase in verdict.sentence


def test_every_exercise_has_five_wrong_attempts_and_at_most_one_of_them_raises():
    plain = ("raises ", "could not be broadcast", "shape [", ": missing", "dtype ")
    said = collections.Counter(
        attempt.exercise
        for attempt in ATTEMPTS
        if not any(words in attempt.phrase for words in plain)
    )
    assert all(said[name] >= 4 for name in EXERCISES)
    all_of_them = collections.Counter(each.exercise for each in ATTEMPTS)
    assert all(all_of_them[name] >= 5 for name in EXERCISES)
    assert all(all_of_them[name] - said[name] <= 1 for name in EXERCISES)


OF_CUBE = """
from marref.layers import block
def backward(params, dy, cache):
    dx, grads = block.backward(params, dy**3, cache)
    return dx, {**grads, "feed_forward": block.backward(params, dy, cache)[1]["feed_forward"]}
"""


def test_what_no_mistake_explains_is_listed_beside_what_is_right(tmp_path):
    exercise = EXERCISES["block"]
    _, verdict = graded(exercise, solution(exercise) + OF_CUBE, tmp_path).functions
    first, last = verdict.sentence.splitlines()
    assert first.startswith("is wrong: dx is wrong, first at [0, 0, 0]: ")
    assert last.startswith("Wrong too: grads.attention_norm.scale, grads.attention_norm.bias, ")
    assert "Right: grads.attention.key.bias, grads.feed_forward.up.kernel, " in last


def test_a_single_wrong_number_is_not_called_so_many_times_the_right_one(tmp_path):
    text = "def any_order_bound(log_probabilities):\n    return log_probabilities.sum()"
    (verdict,) = graded(EXERCISES["bound"], text, tmp_path).functions
    assert not verdict.passed
    assert "times" not in verdict.sentence


def test_the_step_to_look_at_is_found_in_whatever_order_outputs_are_wrong(tmp_path):
    text = """
import numpy as np
def forward(params, x, epsilon):
    s = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon) ** 0.9
    normalised = (x - x.mean(axis=-1, keepdims=True)) * s
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": s}
"""
    (verdict,) = graded(EXERCISES["layer-norm"], text, tmp_path).functions
    assert "The step to look at: μ and σ², the means of x and (x - μ)²" in verdict.sentence


@ALL
def test_every_step_is_of_outputs_that_there_are(exercise):
    for part in exercise.parts:
        outputs = grading.layers.named(part.reference(**part.draw()[0]), part.outputs)
        for names in part.steps:
            assert set(names.split()) <= outputs.keys()


def test_an_argument_that_is_no_tree_any_more_has_been_written_over(tmp_path):
    text = "def backward(params, dy, cache):\n    params['kernel'] = 0.5\n    return dy, params\n"
    text = text.replace("return dy, params", "return dy, {}")
    verdict = graded(EXERCISES["linear"], text, tmp_path).functions[1]
    assert verdict.sentence.startswith("writes over its argument params")


@ALL
def test_no_mistake_of_learners_computes_the_right_numbers_or_those_of_another(exercise):
    for part in exercise.parts:
        seen = {}
        for mistake in grading.known(part):
            if mistake.name in part.mistakes:
                assert all(mistake.outputs), mistake.name
                seen[mistake.name] = [
                    {key: array.tobytes() for key, array in each.items()}
                    for each in mistake.outputs
                ]
        right = [
            {
                key: array.tobytes()
                for key, array in grading.layers.named(
                    part.reference(**point), part.outputs
                ).items()
            }
            for point in part.draw()
        ]
        assert right not in seen.values()
        assert len(set(map(str, seen.values()))) == len(seen)
