"""`marref train`, `sample` and `evaluate`, on texts and runs of a moment."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import marref
from marref import cli, decoding, trees
from marref.cli import drawing, prompts, sample
from marref.data.codecs import Bytes, Characters
from marref.training import checkpoints, runs
from tests.test_runs import without_pictures

TEXT = "the quick brown fox jumps over the lazy dog, and the dog_s tail\n" * 40
TINY = [
    *("--num-steps", "8", "--embed-dim", "8", "--num-layers", "1", "--num-heads", "2"),
    *("--batch-size", "4", "--num-threads", "1", "--checkpoint-every", "3"),
    *("--average-decay", "0.5"),
]
SMALL = [*TINY, "--validate-every", "4", "--length", "16", "--kind", "characters"]


@pytest.fixture(autouse=True)
def no_pictures():
    with without_pictures():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with without_pictures():
        assert cli.main(["train", str(text), "--out", str(out), *SMALL]) == 0
    return out


def copied(run, tmp_path, change):
    """Copy a run's config.json, changed, and its checkpoints."""
    settings = json.loads((run / "config.json").read_text())
    change(settings)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    return tmp_path


def said(capsys, *arguments, status=0):
    assert cli.main([str(argument) for argument in arguments]) == status
    return capsys.readouterr().out


# Training.


def test_training_says_what_it_does(text, tmp_path, capsys):
    lines = said(capsys, "train", text, "--out", tmp_path / "run", *SMALL).splitlines()
    assert re.match(r"Training [\d,]+ parameters .* 8 steps of 4 sequences\.", lines[0])
    assert lines[1].startswith(f"Data: {len(TEXT):,} tokens of {len(set(TEXT))} kinds, ")
    assert re.match(r"step 4/8: validation \d\.\d{3} bits per token, the best so far$", lines[2])
    progress = r"step 8/8: loss \d\.\d{3}, \d\.\d{3} bits per token, [\d,]+ tokens/s, 0:00 left$"
    assert re.match(progress, lines[3])
    assert lines[4].startswith("step 8/8: validation")
    assert lines[5] == f"Done. Sample from it: marref sample {tmp_path / 'run'}"


def test_in_a_terminal_progress_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    seconds = iter([0.0, 1.0, 1.1, 2.0])
    monkeypatch.setattr(cli.train.time, "monotonic", lambda: next(seconds))
    progress = cli.train._Progress(100)
    for step in (1, 2, 3):
        progress(runs.RunRecord(step, 2.0, 1.0, 0.1, 5000.0, 3.5 if step == 3 else None))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith(
        "step 1/100: loss 2.000, 2.885 bits per token, 5,000 tokens/s, 1:39 left\x1b[K\r"
        "step 3/100: loss"
    )


def test_the_command_line_is_over_the_file_of_options(text, tmp_path):
    (tmp_path / "o.toml").write_text("num_steps = 2\nembed_dim = 4\nnum_heads = 1\nnum_layers = 1")
    options = ["--config", str(tmp_path / "o.toml"), "--embed-dim", "6", "--decay", "all"]
    assert cli.main(["train", str(text), "--out", str(tmp_path / "run"), *options]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert [config[name] for name in ("num_steps", "embed_dim", "decay")] == [2, 6, "all"]


def interrupting(step, number):
    """Progress after which a signal comes."""

    def on_step(self, record):
        if record.step == step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("data_named", [True, False])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(
    text, run, tmp_path, capsys, monkeypatch, data_named
):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(cli.train._Progress, "__call__", interrupting(5, signal.SIGINT))
        printed = said(capsys, "train", text, "--out", out, *SMALL, status=130)
    assert (
        f"after step 5, from which resume goes on; go on with: marref train --out {out}" in printed
    )
    assert max(checkpoints.found(out / "checkpoints")) == 5
    assert cli.main(["train", *[str(text)] * data_named, "--out", str(out), "--resume"]) == 0
    found, expected = (checkpoints.latest(path / "checkpoints").state for path in (out, run))
    for name, leaf in trees.flatten(expected.average).items():
        np.testing.assert_array_equal(trees.flatten(found.average)[name], leaf, err_msg=name)


def test_sigterm_leaves_a_checkpoint_as_ctrl_c_does(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.train._Progress, "__call__", interrupting(2, signal.SIGTERM))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", str(text), "--out", str(tmp_path / "run"), *SMALL])
    assert exit_.value.code == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().out
    assert max(checkpoints.found(tmp_path / "run" / "checkpoints")) == 2


def test_ctrl_c_in_a_process_of_its_own_prints_no_traceback(text, tmp_path):
    command = [sys.executable, "-m", "marref", "train", str(text), "--out", str(tmp_path / "run")]
    many = [*SMALL, "--num-steps", "1000000"]
    with subprocess.Popen(
        [*command, *many], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        history = tmp_path / "run" / "history.csv"
        deadline = time.monotonic() + 60
        while not (history.exists() and history.read_text().count("\n") > 2):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "--resume" in printed
    assert checkpoints.found(tmp_path / "run" / "checkpoints")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_diverges_says_what_to_change(text, tmp_path, capsys):
    options = [*SMALL, "--learning-rate", "1e30", "--warmup-steps", "0"]
    assert cli.main(["train", str(text), "--out", str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert "diverged" in error
    assert "lower learning_rate (it was 1e+30)" in error


# Sampling.


def test_a_sample_does_not_depend_on_how_many_there_are(run, capsys):
    few, many = (said(capsys, "sample", run, "--num", num) for num in (2, 3))
    assert many.startswith(few)
    assert "--- 3\n" in many
    assert said(capsys, "sample", run, "--num", 2, "--seed", 1) != few
    assert len(set(re.split("--- .\n", many))) == 4


def test_a_prompt_is_kept_and_its_blanks_are_filled(run, capsys):
    printed = said(capsys, "sample", run, "--num", 3, "--prompt", r"fox\_s d_g _")
    samples = re.findall(r"--- \d\n(fox_s d(?s:.)g (?s:.))\n", printed)
    assert len(samples) == 3
    alphabet = set(TEXT)
    assert all(sample[7] in alphabet and sample[10] in alphabet for sample in samples)


def test_every_step_is_shown_with_blanks(run, capsys):
    options = ["--num", 1, "--show-steps", "--steps", 3, "--schedule", "linear"]
    printed = said(capsys, "sample", run, "--prompt", "a______", *options)
    stages = re.split(r"--- 1, step \d/3\n", printed)[1:]
    assert [stage.count("_") for stage in stages[:2]] == [4, 2]
    assert all(stage.startswith("a") for stage in stages)


def test_what_a_sample_is_drawn_with(run, monkeypatch, capsys):
    seen = []

    def decode(*args, **options):
        seen.append([options[name] for name in ("order", "choice_temperature", "num_steps")])
        assert (options["reveal"], options["remask"]) == (None, None)
        return np.ones((1, 16), int), {"tokens": np.ones((1, 1, 16), int)}

    monkeypatch.setattr(marref, "iterative_decode", decode)
    for options in (
        [],
        ["--order", "confidence"],
        ["--choice-temperature", "2"],
        ["--order", "confidence", "--choice-temperature", "0", "--steps", "5"],
    ):
        assert cli.main(["sample", str(run), "--num", "1", *options]) == 0
    assert seen == [
        ["random", 0.0, 16],
        ["confidence", 4.5, 16],
        ["confidence", 2.0, 16],
        ["confidence", 0.0, 5],
    ]


@pytest.mark.parametrize(
    ("options", "order", "noise", "rule"),
    [
        ("--reveal threshold", "confidence", 0.0, decoding.Threshold(0.9)),
        ("--reveal threshold:0.5", "confidence", 0.0, decoding.Threshold(0.5)),
        ("--reveal threshold --order confidence", "confidence", 0.0, decoding.Threshold(0.9)),
        ("--reveal quota-or-threshold", "confidence", 0.0, decoding.QuotaOrThreshold(0.95)),
        ("--reveal factor:2", "confidence", 0.0, decoding.Factor(2.0)),
        ("--reveal entropy-bounded", "entropy", 0.0, decoding.EntropyBounded(0.1)),
        ("--reveal independent", "random", 0.0, decoding.Independent()),
        ("--remask remdm-cap", "random", 0.0, decoding.ReMDMCap(0.008)),
        ("--remask remdm-rescale:1", "random", 0.0, decoding.ReMDMRescale(1.0)),
        ("--remask remdm-conf", "random", 0.0, decoding.ReMDMConf()),
        ("--remask remdm-loop:0.1", "random", 0.0, decoding.ReMDMLoop(eta=0.1)),
        ("--remask p2", "confidence", 0.0, decoding.P2()),
        ("--remask p2 --order margin", "margin", 0.0, decoding.P2()),
        ("--remask p2 --choice-temperature 2", "confidence", 2.0, decoding.P2()),
        ("--remask edit", "random", 0.0, decoding.Edit(0.9)),
        ("--remask edit:0.5 --order entropy", "entropy", 0.0, decoding.Edit(0.5)),
        ("--remask edit --reveal factor", "confidence", 0.0, decoding.Edit(0.9)),
        ("--order-temperature 0.1", "confidence", 0.0, None),
        ("--order left-to-right", "left-to-right", 0.0, None),
    ],
)
def test_a_rule_brings_its_order_and_its_number(options, order, noise, rule, run, monkeypatch):
    seen = []
    original = marref.iterative_decode

    def decode(*args, **options):
        seen.append(options)
        return original(*args, **options)

    monkeypatch.setattr(marref, "iterative_decode", decode)
    words = ["--num", "1", "--steps", "4", *options.split()]
    assert cli.main(["sample", str(run), *words]) == 0
    assert (seen[0]["order"], seen[0]["choice_temperature"]) == (order, noise)
    assert rule in (None, seen[0]["reveal"], seen[0]["remask"])


def test_what_says_how_a_token_is_drawn_reaches_the_decoder(run, monkeypatch, capsys):
    seen = []

    def decode(*args, **options):
        seen.append(options)
        return np.ones((1, 16), int), {"tokens": np.ones((1, 1, 16), int)}

    monkeypatch.setattr(marref, "iterative_decode", decode)
    options = "--min-p 0.1 --exclude-ids 0,7 --score-temperature 2 --order-temperature 0.5"
    said(capsys, "sample", run, "--num", 1, *options.split(), "--block-length", 4)
    expected = {
        "min_p": 0.1,
        "exclude_ids": [1, 8],
        "score_temperature": 2.0,
        "order_temperature": 0.5,
        "block_length": 4,
    }
    assert {name: seen[0][name] for name in expected} == expected


def test_ids_that_are_excluded_are_numbered_as_those_that_are_written(numbers, tmp_path, capsys):
    options = ["--num", 20, "--exclude-ids", "0,1,2,4,6", "--out", tmp_path / "s.npy"]
    said(capsys, "sample", numbers, *options)
    assert set(np.load(tmp_path / "s.npy").ravel()) == {3, 5}


def test_of_all_ids_one_must_be_left(numbers, capsys):
    assert cli.main(["sample", str(numbers), "--exclude-ids", "6,5,4,3,2,1,0"]) == 2
    error = capsys.readouterr().err
    assert error == "marref: --exclude-ids: received all 7, expected one to be left\n"


def test_blocks_are_filled_from_the_left(run, capsys):
    options = ["--num", 1, "--block-length", 4, "--show-steps"]
    printed = said(capsys, "sample", run, "--prompt", "_" * 12, *options)
    stages = re.split(r"--- 1, step \d+/12\n", printed)[1:]
    filled = [[c != "_" for c in stage[:12]] for stage in stages]
    assert [sum(each[:4]) for each in filled[:4]] == [1, 2, 3, 4]
    assert [sum(each[4:8]) for each in filled] == [0] * 4 + [1, 2, 3] + [4] * 5
    assert not any(any(each[8:]) for each in filled[:8])


def test_samples_are_written_as_ids_that_can_be_loaded_and_as_text(run, tmp_path, capsys):
    for name in ("s.npy", "s.txt"):
        assert f"Wrote 3 to {tmp_path / name}." in said(
            capsys, "sample", run, "--num", 3, "--out", tmp_path / name
        )
    codec = marref.data.codec_from_dict(json.loads((run / "config.json").read_text())["codec"])
    dataset = marref.data.load(tmp_path / "s.npy", num_ids=codec.num_ids)
    texts = codec.decode(dataset.rows(range(3)))
    assert (tmp_path / "s.txt").read_text() == "\n".join(texts) + "\n"


def test_the_averaged_parameters_of_the_best_checkpoint_are_used(run, tmp_path, monkeypatch):
    out = copied(run, tmp_path, lambda settings: None)
    lines = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    # Of the two that were validated, the earlier one is now the best, and a third is gone.
    for step, bits in (4, "0.5"), (5, "0.1"):
        lines[step][-1] = bits
    (out / "history.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    seen = []

    def decode(model, params, **options):
        seen.append(params)
        return np.ones((1, 16), int), {"tokens": np.ones((1, 1, 16), int)}

    monkeypatch.setattr(marref, "iterative_decode", decode)
    assert cli.main(["sample", str(out), "--num", "1"]) == 0
    state = checkpoints.load(checkpoints.found(out / "checkpoints")[4]).state
    expected, found = trees.flatten(state.average), trees.flatten(seen[0])
    assert all(np.array_equal(found[name], leaf) for name, leaf in expected.items())
    assert not np.array_equal(found["head.kernel"], trees.flatten(state.params)["head.kernel"])


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_damaged_best_checkpoint_is_passed_over_with_one_line(text, tmp_path, capsys):
    out = tmp_path / "run"
    said(capsys, "train", text, "--out", out, *SMALL)
    best = checkpoints.found(out / "checkpoints")[runs.best(out).step]
    content = bytearray(best.read_bytes())
    content[-5] ^= 1
    best.write_bytes(content)
    assert cli.main(["sample", str(out), "--num", "1"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("marref: warning: ")
    assert error.count("\n") <= 2


def test_a_blank_is_an_underscore_without_a_backslash():
    codec = Characters("\\_ab")
    tokens = prompts.read(r"a_\_b\a", codec, 10)
    assert tokens.tolist() == [3, 0, 2, 4, 1, 3]
    assert prompts.read("ö_", Bytes(), 10).tolist() == [0xC3 + 1, 0xB6 + 1, 0]


def test_pictures_are_drawn_in_characters(tmp_path, capsys):
    out = tmp_path / "digits"
    said(capsys, "train", "digits", "--out", out, *TINY, "--num-steps", 1)
    printed = said(capsys, "sample", out, "--num", 1, "--steps", 2, "--show-steps")
    stages = re.split(r"--- 1, step \d/2\n", printed)[1:]
    assert [stage.count("\n") for stage in stages] == [8, 8]
    assert "__" in stages[0]
    assert "_" not in stages[1]


# Pictures and ids.


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on pictures."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    with without_pictures():
        assert cli.main(["train", "digits", "--out", str(out), *TINY, "--num-steps", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A run on ids."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "a.npy", np.arange(60).reshape(10, 6) % 7)
    with without_pictures():
        options = [str(folder / "a.npy"), "--out", str(folder / "run"), *TINY]
        assert cli.main(["train", *options, "--num-steps", "1"]) == 0
    return folder / "run"


def frames(path):
    found = []
    with pytest.importorskip("PIL.Image").open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            found.append(np.asarray(image.convert("RGB")))
    return found


def holes(picture):
    """Which pixels have the colour of a mask."""
    return (picture == drawing._COLOUR_OF_MASK).all(axis=-1)


def test_pictures_are_written_in_a_square(digits, tmp_path, capsys):
    pytest.importorskip("PIL.Image")
    said(capsys, "sample", digits, "--num", 5, "--out", tmp_path / "s.npy")
    pixels = np.load(tmp_path / "s.npy").reshape(5, 8, 8)
    said(capsys, "sample", digits, "--num", 5, "--out", tmp_path / "s.png")
    (picture,) = frames(tmp_path / "s.png")
    factor = 512 // (3 * 9)
    assert picture.shape == (2 * 9 * factor, 3 * 9 * factor, 3)
    small = picture[::factor, ::factor]
    for index in range(5):
        row, column = divmod(index, 3)
        found = small[9 * row : 9 * row + 8, 9 * column : 9 * column + 8]
        expected = np.rint(pixels[index, ..., np.newaxis] * 255 / 16).astype(np.uint8)
        np.testing.assert_array_equal(found, np.broadcast_to(expected, (8, 8, 3)))
    assert (small[9:17, 18:26] == 192).all(), "the sixth place is empty"


def test_steps_are_drawn_a_row_each_with_masked_pixels_in_colour(digits, tmp_path, capsys):
    pytest.importorskip("PIL.Image")
    options = ["--num", 3, "--steps", 4, "--schedule", "linear", "--show-steps"]
    printed = said(capsys, "sample", digits, *options, "--out", tmp_path / "s.png")
    assert printed == f"Wrote 3 to {tmp_path / 's.png'}.\n"
    (picture,) = frames(tmp_path / "s.png")
    factor = 512 // (5 * 9)
    masked = holes(picture[::factor, ::factor]).reshape(5, 9, 3, 9).sum(axis=(1, 3))
    assert masked.tolist() == [[count] * 3 for count in (64, 48, 32, 16, 0)]


def test_an_animation_shows_every_step_and_begins_with_nothing(digits, tmp_path, capsys):
    pytest.importorskip("PIL.Image")
    options = ["--num", 2, "--steps", 4, "--schedule", "linear"]
    said(capsys, "sample", digits, *options, "--gif", tmp_path / "s.gif")
    shown = frames(tmp_path / "s.gif")
    factor = 512 // (2 * 9)
    masked = [holes(frame[::factor, ::factor]).sum() for frame in shown]
    assert masked == [2 * 64, 2 * 48, 2 * 32, 2 * 16, 0]
    said(capsys, "sample", digits, *options, "--out", tmp_path / "s.png")
    np.testing.assert_array_equal(shown[-1], frames(tmp_path / "s.png")[0])


def test_what_is_taken_back_is_masked_again_wherever_it_is_shown(
    digits, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    options = ["--num", 1, "--remask", "remdm-rescale:1", "--steps", 8]
    said(capsys, "sample", digits, *options, "--gif", "s.gif")
    factor = 512 // 9
    drawn = np.stack([holes(frame[::factor, ::factor])[:8, :8] for frame in frames("s.gif")])
    assert len(drawn) == 9
    assert (drawn[1:] & ~drawn[:-1]).any(), "something is taken back"
    assert not drawn[-1].any()

    printed = said(capsys, "sample", digits, *options, "--show-steps")
    texts = re.split(r"--- 1, step \d/8\n", printed)[1:]
    assert [text.count("__") for text in texts] == drawn[1:].sum(axis=(1, 2)).tolist()

    said(capsys, "sample", digits, *options, "--show-steps", "--out", "s.png")
    (picture,) = frames("s.png")
    factor = 512 // (9 * 9)
    rows = holes(picture[::factor, ::factor]).reshape(9, 9, 9)[:, :8, :8]
    np.testing.assert_array_equal(rows, drawn)


def test_a_sample_that_takes_fewer_steps_waits_for_the_others(
    digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("PIL.Image")
    drawn = []
    monkeypatch.setattr(drawing, "animation", lambda path, codec, stages: drawn.append(stages))
    options = ["--num", 3, "--reveal", "threshold:0.15"]
    said(capsys, "sample", digits, *options, "--gif", "s.gif", "--out", "s.npy")
    (stages,) = drawn
    steps = [int(np.argmin(masked)) for masked in (stages == 0).any(axis=2).T]
    assert len(set(steps)) > 1
    assert len(stages) == 1 + max(steps)
    for index, number in enumerate(steps):
        assert (stages[number:, index] == stages[number, index]).all()
    np.testing.assert_array_equal(np.load("s.npy"), stages[-1] - 1)


def test_of_many_steps_some_are_shown_and_the_last_always(digits):
    stages = np.arange(200)[:, np.newaxis]
    assert drawing._spread(stages, 64)[[0, -1], 0].tolist() == [0, 199]
    assert len(drawing._spread(stages, 64)) == 64
    np.testing.assert_array_equal(drawing._spread(stages[:5], 64), stages[:5])


def test_the_hole_of_a_picture_is_filled_and_the_rest_is_kept(digits, tmp_path, capsys):
    pillow = pytest.importorskip("PIL.Image")
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    opacity = np.full((8, 8), 255, np.uint8)
    opacity[2:5, 3:] = 0
    pillow.fromarray(np.stack([grey, opacity], axis=-1)).save(tmp_path / "hole.png")
    options = ["--num", 4, "--prompt", tmp_path / "hole.png", "--out", tmp_path / "s.npy"]
    said(capsys, "sample", digits, *options)
    filled = np.load(tmp_path / "s.npy").reshape(4, 8, 8)
    level = np.rint(grey / 255 * 16)
    assert (filled[:, opacity == 255] == level[opacity == 255]).all()
    assert len(np.unique(filled[:, opacity == 0], axis=0)) > 1


def test_ids_are_filled_in_where_they_are_minus_1(numbers, tmp_path, capsys):
    np.save(tmp_path / "p.npy", [3, -1, 0, -1, 6])
    options = ["--num", 20, "--prompt", tmp_path / "p.npy", "--out", tmp_path / "s.npy"]
    said(capsys, "sample", numbers, *options)
    filled = np.load(tmp_path / "s.npy")
    assert (filled[:, [0, 2, 4]] == [3, 0, 6]).all()
    assert len(np.unique(filled, axis=0)) > 1


@pytest.mark.parametrize("option", [["--gif", "s.gif"], ["--out", "s.png"]])
def test_pillow_is_asked_for_by_name_before_anything_is_drawn(
    option, digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setattr(marref, "iterative_decode", None)
    assert cli.main(["sample", str(digits), *option]) == 2
    error = capsys.readouterr().err
    assert 'needs the images extra: pip install ".[images]"' in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_animation_is_written_whole_or_not_at_all(digits, tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image").Image

    def save(self, path, *args, **options):
        path.write_bytes(b"GIF89a")
        raise OSError("no space")

    (tmp_path / "s.gif").write_bytes(b"the one before")
    monkeypatch.setattr(image, "save", save)
    options = ["--num", "1", "--steps", "2", "--gif", str(tmp_path / "s.gif")]
    assert cli.main(["sample", str(digits), *options]) == 2
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the one before"]


def test_top_k_top_p_and_temperature_reach_the_decoder(run, capsys):
    def texts(*options):
        return set(re.split(r"--- \d+\n", said(capsys, "sample", run, "--num", 8, *options))[1:])

    blanks = ["--prompt", "the ____ dog", "--steps", 1]
    for surest in (["--top-k", 1], ["--top-p", 1e-6], ["--temperature", 0]):
        assert len(texts(*blanks, *surest)) == 1
    assert len(texts(*blanks)) == 8


def test_an_output_that_lacks_a_character_gets_an_escape(run, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(sample, "shown", lambda codec, tokens: "Δ")
    assert cli.main(["sample", str(run), "--num", "1"]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"--- 1\n\\u0394\n"


def test_a_reader_that_has_seen_enough_is_no_error(run):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "marref", "sample", str(run), "--num", "1"]
    with open(writing, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_output_that_is_closed_from_the_start_is_no_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    options = ["--num", "1", "--out", str(tmp_path / "s.txt")]
    assert cli.main(["sample", str(run), *options]) == 0
    assert (tmp_path / "s.txt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_line(run, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["sample", str(run), "--num", "1"]) == 2
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert capsys.readouterr().err == "marref: [Errno 28] No space left on device\n"


def test_no_control_character_reaches_the_terminal():
    assert sample.shown(Bytes(), Bytes().encode("a\x1b[2J\tb\n")) == "a�[2J\tb\n"


# Evaluation.


def test_evaluation_prints_a_table_and_the_bound(run, text, capsys):
    printed = said(capsys, "evaluate", run)
    ratios = re.findall(r"^ +(\d+)% +\d\.\d{3} +\d\.\d{3}$", printed, re.MULTILINE)
    assert ratios == ["10", "30", "50", "70", "90", "100"]
    assert re.search(r"at most \d\.\d{3} bits per token, standard error \d\.\d{3}$", printed)
    count = round(len(TEXT) * 0.1) // 16
    assert printed.startswith(f"{count} held-out sequences of 16 tokens, checkpoint of step ")
    assert said(capsys, "evaluate", run) == printed
    other = said(capsys, "evaluate", run, text, "--num", 20)
    assert other.startswith("20 given sequences of 16 tokens")


def test_sequences_that_are_measured_do_not_overlap(run, capsys, monkeypatch):
    taken = []
    original = runs.spread_index

    def spread_index(dataset, count):
        places = np.linspace(0, len(dataset) - 1, count).astype(int)
        taken.append(int(np.diff(places).min()))
        return original(dataset, count)

    monkeypatch.setattr(runs, "spread_index", spread_index)
    said(capsys, "evaluate", run)
    assert taken[0] >= 16


# What is wrong with a command is one line, and nothing is written; tests/test_bad_files.py has the
# table of what is wrong with a file.

BAD = {
    "no data": ("train --out out", "data: received none"),
    "no folder": ("train TEXT", "--out"),
    "an option that is misspelt": ("train TEXT --out out --num-step 3", "nearest: --num-steps"),
    "an underscore": ("train TEXT --out out --num_steps 3", "nearest: --num-steps"),
    "no number": ("train TEXT --out out --num-steps many", "received many, expected an integer"),
    "no real number": ("train TEXT --out out --dropout x", "received x, expected a number"),
    "out of range": ("train TEXT --out out --batch-size 0", "batch_size: received 0"),
    "no dropout": ("train TEXT --out out --dropout 1.5", "dropout: received 1.5"),
    "heads that do not fit": ("train TEXT --out out --num-heads 3", "num_heads"),
    "not finite": ("train TEXT --out out --learning-rate nan", "learning_rate: received nan"),
    "an unknown kind": ("train TEXT --out out --kind words", "kind: received 'words'"),
    "levels of text": ("train TEXT --out out --levels 4", "levels: received for bytes"),
    "windows that are too long": ("train TEXT --out out --length 5000", "length + 1"),
    "a sequence too long": ("train TEXT --out out --seq-len 4", "seq_len: received 4"),
    "no run to go on with": ("train --out out --resume", "holds no run"),
    "other options": ("train --out RUN --resume --num-steps 9", "--num-steps: received with"),
    "other data": ("train HALF --out RUN --resume", "dataset: its data"),
    "no run to sample": ("sample out", "holds no run"),
    "no samples": ("sample RUN --num 0", "received 0, expected an integer >= 1"),
    "an unknown order": ("sample RUN --order left", "invalid choice"),
    "no temperature": ("sample RUN --temperature -1", "temperature: received -1"),
    "no top k": ("sample RUN --top-k 0", "received 0, expected an integer >= 1"),
    "no top p": ("sample RUN --top-p 0", "top_p: received 0"),
    "an animation of text": ("sample RUN --gif s.gif", "--gif: received for characters"),
    "an animation in another format": ("sample RUN --gif s.png", "--gif: suffix"),
    "an animation in no folder": ("sample RUN --gif no/s.gif", "folder does not exist"),
    "noise in random order": (
        "sample RUN --order random --choice-temperature 2",
        "choice_temperature",
    ),
    "an unknown rule": (
        "sample RUN --reveal thresh",
        "--reveal: received 'thresh', expected one of threshold, quota-or-threshold, factor",
    ),
    "an unknown remask": (
        "sample RUN --remask remdm",
        "--remask: received 'remdm', expected one of remdm-cap, remdm-rescale",
    ),
    "a rule without its number": ("sample RUN --reveal threshold:", "expected a number"),
    "a rule with a word": ("sample RUN --reveal factor:two", "received two, expected a number"),
    "a rule with two numbers": ("sample RUN --remask edit:1:2", "received 1:2, expected a number"),
    "a number that the rule has not": (
        "sample RUN --remask p2:3",
        "received 'p2:3', expected p2 without a number",
    ),
    "a rule out of range": (
        "sample RUN --reveal threshold:1.5",
        "--reveal: Threshold: probability: received 1.5, expected a number in [0, 1]",
    ),
    "no entropy": ("sample RUN --reveal entropy-bounded:-1", "bound: received -1.0"),
    "no probability": ("sample RUN --remask remdm-cap:nan", "eta: received nan"),
    "a rule in another order": (
        "sample RUN --reveal threshold --order random",
        'order: received "random", expected "confidence"',
    ),
    "a rule with noise": (
        "sample RUN --reveal threshold --choice-temperature 1",
        "choice_temperature: received 1.0, expected 0",
    ),
    "two that say how many": (
        "sample RUN --reveal threshold --remask remdm-cap",
        "reveal: received Threshold(probability=0.9), expected None with ReMDMCap(eta=0.008)",
    ),
    "blocks taken back": ("sample RUN --block-length 4 --remask p2", "block_length: received 4"),
    "no block": ("sample RUN --block-length 0", "received 0, expected an integer >= 1"),
    "more blocks than steps": ("sample RUN --block-length 2 --steps 3", "each of the 8 blocks"),
    "no min p": ("sample RUN --min-p 0", "min_p: received 0.0, expected a number in (0, 1]"),
    "no ids": ("sample RUN --exclude-ids a,b", "expected integers with commas between them"),
    "an id that is none": ("sample RUN --exclude-ids 0,900", "--exclude-ids: id 900 at [1]"),
    "a huge id": (f"sample RUN --exclude-ids {10**30}", "--exclude-ids: dtype object"),
    "no score temperature": ("sample RUN --score-temperature 0", "score_temperature: received 0"),
    "two temperatures of the order": (
        "sample RUN --order-temperature 1 --choice-temperature 1",
        "order_temperature: received 1.0 with choice_temperature 1.0",
    ),
    "no grid": ("sample RUN --order halton --prompt a_", "expected a square grid"),
    "an unknown schedule": ("sample RUN --schedule sine", "invalid choice"),
    "a prompt without blanks": ("sample RUN --prompt fox", "has no _"),
    "a prompt that is too long": ("sample RUN --prompt fox______________", "at most 16"),
    "a character that is unknown": ("sample RUN --prompt Z_", "'Z' (U+005A)"),
    "an unknown suffix": ("sample RUN --out s.pdf", "suffix"),
    "a folder that does not exist": ("sample RUN --out no/s.npy", "folder does not exist"),
    "a picture of text": ("sample RUN --out s.png", "expected .npy"),
    "no run to measure": ("evaluate out", "holds no run"),
    "a misspelt command": ("trian TEXT --out out", "nearest: train"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line(case, run, text, tmp_path, capsys, monkeypatch):
    command, message = BAD[case]
    (tmp_path / "half.txt").write_text(TEXT[: len(TEXT) // 2])
    paths = {"TEXT": text, "RUN": run, "HALF": "half.txt"}
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path)), sorted(run.rglob("*"))
    try:
        status = cli.main([str(paths.get(word, word)) for word in command.split()])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert (sorted(os.listdir(tmp_path)), sorted(run.rglob("*"))) == before


def test_too_little_memory_is_one_line(text, tmp_path, capsys, monkeypatch):
    def start(*args, **options):
        raise MemoryError

    monkeypatch.setattr(runs, "start", start)
    assert cli.main(["train", str(text), "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert capsys.readouterr().err == "marref: MemoryError\n"


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert (exit_.value.code, capsys.readouterr().out) == (0, f"marref {marref.__version__}\n")


@pytest.mark.parametrize(
    "command", ["train", "sample", "evaluate", "watch", "demo", "check", "golden", "compare"]
)
def test_the_help_of_a_command_ends_with_examples(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"examples:\n  marref {command}" in capsys.readouterr().out
