"""docs/cross-checking.md, followed as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "cross-checking.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command, folder):
    program, *arguments = shlex.split(command)
    started = {"marref": [sys.executable, "-P", "-m", "marref"], "python": [sys.executable]}
    return subprocess.run(
        [*started[program], *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the commands of the page printed, in a fresh folder."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("user")
    script, own = blocks("py")
    (folder / "my_mar.py").write_text(script + own, "utf-8")
    commands = [block.strip() for block in blocks("sh") if "benchmarks" not in block]
    return folder, {command: run(command, folder) for command in commands}


def test_every_command_of_the_page_runs(runs):
    _, done = runs
    statuses = {command: result.returncode for command, result in done.items()}
    assert len(statuses) == 5
    for command, status in statuses.items():
        assert status == (1 if "compare" in command else 0), done[command].stderr


def test_the_commands_print_what_the_page_shows(runs):
    _, done = runs
    compared, diagnosed, own = (result for command, result in done.items() if "compare" in command)
    table, diagnosis, found, _ = blocks("text")
    for line in filter(None, table.splitlines()):
        # Names, verdicts and the closing line; the last digits are the machine's.
        for word in re.findall(r"[a-zA-Z<][\w./|<-]*", line):
            if not re.fullmatch(r"e", word):
                assert word in compared.stdout
    assert table.splitlines()[-1] in compared.stdout
    assert diagnosis.strip() in diagnosed.stdout
    assert own.stderr.startswith(found)
    assert diagnosis.strip() in own.stdout


def test_the_map_that_was_kept_gives_the_same_table(runs):
    folder, done = runs
    result = run("marref compare golden.npz own.npz --names names.json", folder)
    (*_, own) = (result for command, result in done.items() if "auto" in command)
    assert result.stderr == ""
    assert result.stdout == own.stdout[: len(result.stdout)]


def test_the_mended_model_agrees(runs):
    folder, _ = runs
    script = (folder / "my_mar.py").read_text("utf-8")
    (folder / "mended.py").write_text(script.replace('nn.GELU("tanh")', "nn.GELU()"), "utf-8")
    assert run("python mended.py", folder).returncode == 0
    result = run("marref compare golden.npz mine.npz --names torch", folder)
    assert result.returncode == 0, result.stdout
    assert "all 49 arrays agree" in result.stdout
