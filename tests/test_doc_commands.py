"""The commands of the pages run, and print what stands below them.

Each page's run in order, in a folder of its own, with what the page supposes to be there.  Tables
say what is not run, and why; with which options what takes long is made short; and what is not
compared with the page.  Where it is, numbers that rounding touches are left open, and behind
options that were added all numbers.
"""

import dataclasses
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from marref import cli, files
from marref.teach.exercises import EXERCISES
from marref.verify import golden, golden_continuous
from marref.verify.comparison import Golden

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROUNDED = r"\d+\.\d+(?:e[-+]\d+)?|\d+e[-+]\d+"
COUNT = r"\d[\d,]*"

# Commands that are not run, by a pattern, and why not.
NOT_RUN = {
    r"^python3 -m venv": ".ci/run runs both, in a fresh copy of the repository",
    r"^.venv/bin/(ruff|pytest|mkdocs) ": ".ci/run runs them",
    r"^pip install": "it installs into this environment",
    r"^mpiexec": "tests/test_ranks.py and tests/test_pool.py start processes of MPI",
    r"python -m benchmarks": "takes minutes or hours; tests/test_benchmarks.py runs them quickly",
    r"^python docs/tools/figures": "tests/test_docs.py holds pictures to the code that draws them",
    r"^(for|done)\b|^ ": "a loop, over benchmarks or, on the page for teachers, tested below",
    r"^marref demo": ".ci/run runs the one, tests/test_continuous_training.py the other",
}
# Pages with a test of their own that runs their commands and compares what they show.
ELSEWHERE = {"cross-checking.md": "tests/test_cross_checking.py"}
# What is added to commands, by a pattern, so that they take seconds.
SMALL = (
    "--num-steps 3 --num-layers 1 --num-heads 1 --embed-dim 8 --batch-size 8"
    " --validation-fraction 0.02 --num-threads 1"
)
SMALL_CONTINUOUS = (
    "--num-steps 3 --batch-size 2 --encoder-dim 8 --decoder-dim 8 --diffusion-dim 8 --num-heads 1"
)
ADDED = {
    r"marref train (?!.*(--resume|--continuous))": SMALL,
    r"marref train .*--continuous": SMALL_CONTINUOUS,
    r"marref sample run --num 64": "--num 2",
    r"marref sample .*--num 100000": "--num 3",
}
# What is needed for a command beside the core, by a pattern.
NEEDED = {
    r"\.onnx\b": "onnx",
    r"\.safetensors\b": "safetensors",
    r"\.(png|gif)\b|\bpictures\b": "PIL",
    r"--processes": "threadpoolctl",
    r"--names mar": "torch",
}
# Blocks below commands that are not compared, by the first words, and why not.
NOT_COMPARED = {
    "Training 133,249 parameters": "it is of a longer training",
    "--- 1, step 1/4": "the words are those of a longer training",
    "256 held-out sequences": "it is of a longer training",
    "attend is right, ": "it is of a file that someone has filled in",
}


def commands_of(block):
    return block.replace("\\\n", " ").strip().splitlines()


def blocks_of(page):
    """The commands of each sh block of a page, with what is shown below it, or None."""
    found = list(BLOCK.finditer(page.read_text("utf-8")))
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block[1] == "sh":
            shown = following[2] if following and following[1] in ("", "text") else None
            yield commands_of(block[2]), shown


def entries(table, text):
    return [value for pattern, value in table.items() if re.search(pattern, text)]


def run(command, capfd):
    """Run a command in this process; give what it prints, on both streams."""
    program, *words = shlex.split(command)
    assert program in ("marref", ".venv/bin/marref"), command
    arguments = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
    capfd.readouterr()
    status = cli.main(arguments)
    printed = capfd.readouterr()
    finds_something = re.search(r"marref (compare|exercise check) ", command)
    assert status == (1 if finds_something else 0), printed.err
    return printed.out + printed.err


def pattern_of(line, *, exact):
    """A pattern for a line of a page: any spaces, and any numbers, or any where rounding shows."""
    free = re.compile(ROUNDED if exact else f"{ROUNDED}|{COUNT}")
    words = (free.split(word) for word in line.split())
    return r"\s+".join(r"[\d.,e+-]+".join(map(re.escape, word)) for word in words)


def small_run(capfd, name, num_steps):
    run(f"marref train digits --out {name} {SMALL} --num-steps {num_steps}", capfd)


def with_tanh():
    """Arrays as in the README: a model with the other GELU, in float32."""
    model = dataclasses.replace(golden.PRESETS["tiny"], gelu="tanh")
    arrays, metadata = golden.make(model, dtype="float32")
    block = r"blocks\.\d\.(\w+_norm|feed_forward\.(up|down)|output)"
    kept = re.compile(rf"loss|gradients/.*|activations/(logits|{block})")
    mine = {name: array for name, array in arrays.items() if kept.fullmatch(name)}
    files.save(Path("yours.npz"), mine, metadata)


def with_norm_of_tokens_alone():
    """Arrays as on the page on continuous tokens: a mistake made in PyTorch, in float32."""
    torch = pytest.importorskip("torch")
    from .test_faults_continuous import mistaken
    from .test_golden_continuous import port

    vectors = Golden(*golden_continuous.make(golden_continuous.TINY))
    mine = port(vectors, torch.float32, mistaken()["token-norm-not-on-the-buffer"])
    # Of a port's activations, loss and gradients, as on the page.
    shown = {name: array for name, array in mine.items() if not name.startswith("noise_schedule")}
    np.savez("mine.npz", **shown)


def pictures():
    pillow = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        os.makedirs(f"pictures/{name}")
        for index in range(8):
            pixels = rng.integers(256, size=(8, 8), dtype=np.uint8)
            pillow.fromarray(pixels).save(f"pictures/{name}/{index}.png")


# What a page supposes to be there, and who makes it, given capfd.
SUPPOSED = {
    "README.md": lambda capfd: with_tanh(),
    "continuous.md": lambda capfd: (pictures(), with_norm_of_tokens_alone()),
    "golden-continuous.md": lambda capfd: with_norm_of_tokens_alone(),
    "interop.md": lambda capfd: small_run(capfd, "run", num_steps=40),
    "scaling.md": lambda capfd: small_run(capfd, "two", num_steps=3),
}
WITH_COMMANDS = [page for page in PAGES if any(blocks_of(page)) and page.name not in ELSEWHERE]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_and_print_what_it_shows(page, tmp_path, monkeypatch, capfd):
    commands = [command for block, _ in blocks_of(page) for command in block]
    for command in commands:
        for module in entries(NEEDED, command):
            pytest.importorskip(module, reason=f"{command} needs it")
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "docs", "docs")
    SUPPOSED.get(page.name, lambda capfd: None)(capfd)
    for block, shown in blocks_of(page):
        to_run = [command for command in block if not entries(NOT_RUN, command)]
        printed = "".join(run(" ".join([c, *entries(ADDED, c)]), capfd) for c in to_run)
        if shown and to_run == block and not any(map(shown.startswith, NOT_COMPARED)):
            exact = not any(entries(ADDED, command) for command in block)
            for line in filter(None, shown.splitlines()):
                assert re.search(pattern_of(line, exact=exact), printed), line


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
def test_a_class_is_graded_by_the_loop_of_the_page_for_teachers(tmp_path):
    program = tmp_path / "bin" / "marref"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m marref "$@"\n', "utf-8")
    program.chmod(0o755)
    stub = EXERCISES["mask-ratio"].stub()
    ratio = "return 2 * np.sin(np.pi / 4 * u) ** 2"
    handed_in = {"anna": stub.replace("raise NotImplementedError", ratio), "ben": stub}
    for student, text in handed_in.items():
        file = tmp_path / "class" / student / "mine.py"
        file.parent.mkdir(parents=True)
        file.write_text(text, "utf-8")
    page = (ROOT / "docs" / "teaching.md").read_text("utf-8")
    (loop,) = (block[2] for block in BLOCK.finditer(page) if block[1] == "sh")
    paths = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", loop], cwd=tmp_path, env={**os.environ, **paths}, check=True)
    lines = (line.split("\t") for line in (tmp_path / "grades.tsv").read_text("utf-8").splitlines())
    passed = {name: json.loads(result)["passed"] for name, result in lines}
    assert passed == {"class/anna/mine.py": True, "class/ben/mine.py": False}


def test_the_tables_hold_nothing_that_no_page_has():
    commands = [command for page in PAGES for block, _ in blocks_of(page) for command in block]
    for pattern in (*NOT_RUN, *ADDED, *NEEDED):
        assert any(re.search(pattern, command) for command in commands), pattern
    shown = [block for page in PAGES for _, block in blocks_of(page) if block]
    for start in NOT_COMPARED:
        assert any(block.startswith(start) for block in shown), start
    assert {*SUPPOSED, *ELSEWHERE} <= {page.name for page in PAGES}
