import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import marref
from marref import cli, data, demo, files
from marref.demo import quality
from marref.verify import golden, self_check


def test_check_prints_every_gradient_and_succeeds(capsys):
    assert cli.main(["check"]) == 0
    printed = capsys.readouterr().out
    for name in ("layer_norm", "blocks.1.attention.key.bias", "gelu (tanh)", "embedding.table"):
        assert name in printed
    assert "all gradients agree" in printed
    assert "FAILED" not in printed


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_check_fails_if_a_gradient_does(capsys, monkeypatch, error):
    rows = [
        self_check.Row("layer_norm", "x", (2, 3), {"complex-step": error, "central": 1e-9}),
        self_check.Row("linear", "x", (2, 3), {"complex-step": 1e-16, "central": 1e-9}),
    ]
    monkeypatch.setattr(self_check, "run", lambda seed: iter(rows))
    assert cli.main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "1 failed" in printed
    assert printed.count("FAILED") == 1
    assert f"largest error {error:.1e}" in printed


@pytest.fixture
def tiny(monkeypatch):
    """A demo of a moment, in this process."""
    monkeypatch.setattr(demo, "NUM_OF_EACH", 2)
    return ["demo", "--quick", "--steps", "2"]


def test_demo_writes_what_it_says_and_can_be_repeated(tiny, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert cli.main([*tiny, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for ratio in ("0.25", "0.50", "0.75", "1.00"):
        assert re.search(rf"^ +{ratio} +\d\.\d+ +\d\.\d+$", printed, re.MULTILINE)
    assert re.search(r"sees the digit that was asked for in \d+% of 20;\n.* right in 99%", printed)
    assert re.search(r"MMD², unbiased.*: -?0\.\d+; of as many real ones\nit is -?0\.\d+", printed)
    model, _ = marref.load_model(out / "parameters.npz")
    assert model == demo.QUICK.config.resolved(demo.digits()[0]).model(18, 10)
    with (out / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["step"] for row in history] == ["1", "2"]
    assert float(history[0]["loss"]) > 0
    assert '"title": "marref demo"' in (out / "decode.html").read_text("utf-8")
    assert f"open {out / 'decode.html'} in a browser" in printed

    again = tmp_path / "again"
    cli.main([*tiny, "--out", str(again)])
    same = (again / "parameters.npz").read_bytes() == (out / "parameters.npz").read_bytes()
    assert same, "one seed is one result"
    cli.main([*tiny, "--out", str(again), "--seed", "1"])
    assert (again / "parameters.npz").read_bytes() != (out / "parameters.npz").read_bytes()


def test_demo_draws_its_pictures(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    cli.main([*tiny, "--out", str(tmp_path)])
    for name in ("loss.png", "samples.png", "unmasking.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_the_viz_extra_the_demo_says_what_it_would_add(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "tqdm", None)
    monkeypatch.setitem(sys.modules, "marref.plots", None)
    monkeypatch.delattr(marref, "plots", raising=False)
    assert cli.main([*tiny, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert 'pip install ".[viz]"' in printed
    assert re.search(r"step 2/2: loss \d\.\d+, learning rate \S+, [\d,]+ tokens/s", printed)
    written = ["decode.html", "history.csv", "parameters.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_the_demo_measures_what_it_is_told_the_class_of():
    train, held_out = demo.digits()
    assert (len(train), len(held_out)) == (1500, 297)
    (examples, classes), (real, real_classes) = map(demo.rows_and_labels, (train, held_out))
    for rows, labels, expected in zip(
        (examples, real),
        (classes, real_classes),
        zip(data.digits(), data.digit_labels(), strict=True),
        strict=True,
    ):
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(labels, expected[1])


def test_two_samples_are_told_apart_and_the_same_are_not():
    rng = np.random.default_rng(0)
    x, same, shifted = (rng.normal(mean, 1.0, (60, 5)) for mean in (0.0, 0.0, 1.0))
    found = quality.two_samples(x, same, np.random.default_rng(1))
    assert abs(found.statistic) < 3 * found.noise
    other = quality.two_samples(x, shifted, np.random.default_rng(1))
    assert other.statistic > 10 * other.noise
    collapsed = quality.two_samples(np.tile(x[:3], (20, 1)), same, np.random.default_rng(1))
    assert collapsed.statistic > 5 * collapsed.noise


def test_the_two_sample_statistic_is_the_sum_over_pairs_of_different_ones():
    x, y = np.array([[0.0], [1.0], [3.0]]), np.array([[1.0], [4.0]])

    def k(a, b):
        # The ten squared distances are 1 9 1 16 4 0 9 4 1 9: the median is 4.
        return float(np.exp(-((a - b) ** 2).sum() / 4.0))

    within_x = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    within_y = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    across = np.mean([k(a, b) for a in x for b in y])
    found = quality.two_samples(x, y, np.random.default_rng(0))
    assert found.statistic == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


def test_a_nearest_neighbour_is_one():
    examples, labels = np.array([[0, 0], [4, 4]]), np.array([7, 3])
    found = quality.nearest_neighbour_classes(np.array([[1, 2], [3, 3]]), examples, labels)
    assert found.tolist() == [7, 3]


def test_pixels_are_drawn_darker_with_more_ink_and_masks_as_question_marks():
    blank, full, masked = (np.full(64, token) for token in (1, 17, 0))
    first_line = demo.side_by_side([full, masked, blank]).splitlines()[0]
    assert first_line == "@" * 16 + "  | " + "?" * 16 + "  |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "received 0, expected an integer >= 1"),
        (["demo", "--seed", "x"], "received x, expected an integer >= 0"),
        (["dance"], "command 'dance' is unknown"),
        (["chekc"], "nearest: check"),
        (["demo", "--step", "3"], "'--step' is unknown; nearest: --steps"),
        (["--verison"], "nearest: --version"),
        ([], "required"),
    ],
)
def test_bad_arguments_are_one_clear_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_clear_line(tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("marref: ")


def test_a_copy_that_is_not_installed_makes_golden_vectors(tmp_path):
    """A folder with NumPy, SciPy and marref, and Python without its installed packages."""
    vendored = tmp_path / "vendored"
    shutil.copytree(Path(marref.__file__).parent, vendored / "marref")
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "scipy", "scipy.libs"):
        if (installed / name).exists():
            (vendored / name).symlink_to(installed / name)
    run = subprocess.run(
        [sys.executable, "-S", "-m", "marref", "golden", "x.npz"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(vendored)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    _, metadata = files.load(tmp_path / "x.npz")
    assert metadata["versions"]["marref"] == marref.__version__


def test_importing_marref_imports_no_extra_nor_scipy_stats():
    code = (
        "import sys, marref; heavy = 'matplotlib', 'torch', 'scipy.stats', 'tqdm', 'PIL', "
        "'tokenizers'; print([m for m in heavy if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_diagnosis_tries_is_said_on_stderr_after_a_while(monkeypatch, capsys):
    seconds = iter([0.0, 9.0, 11.0, 11.0, 12.0])
    monkeypatch.setattr(cli.compare.time, "monotonic", lambda: next(seconds))
    progress = cli.compare._Progress()
    progress("pairs", 10, 5886)
    assert capsys.readouterr().err == ""
    progress("pairs", 1200, 5886)
    progress("pairs", 1300, 5886)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "trying pairs: 1,200 of 5,886\n")


def test_fail_fast_leaves_out_what_comes_after_the_first_stage_that_differs(tmp_path, capsys):
    arrays, _ = files.load(golden.shipped("tiny"))
    sections = ("activations/", "loss", "gradients/")
    arrays = {name: a for name, a in arrays.items() if name.startswith(sections)}
    files.save(tmp_path / "mine.npz", {**arrays, "loss": 2 * arrays["loss"]}, {})
    assert cli.main(["compare", "tiny", str(tmp_path / "mine.npz"), "--fail-fast"]) == 1
    printed = capsys.readouterr().out
    assert "the first is loss" in printed
    assert "activations/logits" in printed
    assert "gradients/" not in printed


# Completion.


def completion(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--print-completion", shell])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def completed(script, *words):
    """What bash offers for the last word."""
    line = " ".join(words)
    program = (
        f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        f"COMP_LINE='{line}'; COMP_POINT={len(line)}; _shtab_marref; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    bash = [shutil.which("bash"), "--norc", "-c", program]
    return subprocess.run(bash, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_options_choices_and_files(capsys, tmp_path, monkeypatch):
    script = completion("bash", capsys)
    assert completed(script, "marref", "sa") == ["sample"]
    assert completed(script, "marref", "sample", "--top") == ["--top-k", "--top-p"]
    assert completed(script, "marref", "sample", "--order", "r") == ["random"]
    assert completed(script, "marref", "sample", "--schedule", "s") == ["square", "square-root"]
    assert completed(script, "marref", "sample", "--re") == ["--reveal", "--remask"]
    assert completed(script, "marref", "sample", "--reveal", "t") == ["threshold"]
    assert completed(script, "marref", "sample", "--remask", "remdm-c") == [
        "remdm-cap",
        "remdm-conf",
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").touch()
    for words in (["train", "b"], ["sample", "--prompt", "b"], ["sample", "--out", "b"]):
        assert completed(script, "marref", *words) == ["book.txt"], words


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_every_command_is_completed_in_other_shells_too(shell, capsys):
    script = completion(shell, capsys)
    for command in ("train", "sample", "evaluate", "watch", "demo", "check", "golden", "compare"):
        assert command in script
    assert ("--top-p" in script) == (shell == "zsh"), "shtab knows no options of a command in tcsh"


def test_shtab_is_asked_for_by_name(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--print-completion", "bash"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert 'needs the completion extra: pip install ".[completion]"' in error
    assert error.count("\n") == 1
