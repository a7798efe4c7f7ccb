"""Runs of the continuous model: `marref.training.runs` and the commands, as of discrete MAR."""

import dataclasses
import json

import numpy as np
import pytest

from marref import cli, continuous, data, files
from marref.continuous.pixels import Scale
from marref.continuous.run import RunConfig, RunRecord
from marref.data import Dataset, Pixels
from marref.fast import parallel
from marref.interop import mar
from marref.training import checkpoints, runs

from .test_runs import assert_same_state, no_pictures, stopping_after

__all__ = ["no_pictures"]

SMALL = {
    "encoder_dim": 8,
    "encoder_layers": 1,
    "decoder_dim": 8,
    "decoder_layers": 1,
    "num_heads": 2,
    "buffer_size": 2,
    "diffusion_dim": 8,
    "diffusion_layers": 1,
}
CONFIG = RunConfig(
    num_steps=8, batch_size=4, num_parts=1, checkpoint_every=3, validate_every=2, **SMALL
)
OPTIONS = [
    text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))
]


def pictures(count=30, colours=1, height=4):
    codec = Pixels(height, 4, channels=colours, levels=9)
    levels = np.random.default_rng(0).integers(9, size=(count, codec.length))
    return Dataset(levels, codec, codec.length, labels=np.arange(count) % 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, runs.start(pictures(), out / "run", CONFIG)


def test_a_run_trains_as_the_loop_over_images_does(tmp_path):
    config = dataclasses.replace(CONFIG, validation_fraction=0.0, dtype="float64")
    dataset = pictures(colours=3)
    found = runs.start(dataset, tmp_path, config)
    scale = Scale.of(dataset)
    images = scale.to_images(dataset.rows(np.arange(30)))
    assert images.std() == pytest.approx(1.0)
    state, history = continuous.train(found.model, images, dataset.labels, config=found.config)
    assert_same_state(found.state, state)
    assert [record.squared_error for record in found.history] == [r.squared_error for r in history]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path):
    _, expected = whole
    with pytest.raises(KeyboardInterrupt):
        runs.start(pictures(), tmp_path, CONFIG, on_step=stopping_after(5))
    found = runs.resume(tmp_path, pictures())
    assert_same_state(found.state, expected.state)
    assert found.config == expected.config
    # The norms too: sums over all leaves, whose order a file may change.
    same = [dataclasses.replace(record, tokens_per_second=0.0) for record in found.history]
    assert same == [dataclasses.replace(r, tokens_per_second=0.0) for r in expected.history]


def test_the_history_has_both_parts_and_the_best_by_validation_is_sampled_from(whole):
    out, run = whole
    lines = (out / "run" / "history.csv").read_text("utf-8").splitlines()
    assert lines[0].split(",") == [field.name for field in dataclasses.fields(RunRecord)]
    measured = {r.step: r.validation_error for r in run.history if r.validation_error is not None}
    assert list(measured) == [2, 4, 6, 8]
    assert runs.best(out / "run").step == min(measured, key=measured.get)


def test_validation_is_of_what_was_set_aside_with_all_labels_and_the_same_each_time(whole):
    _, run = whole
    config = run.config
    _, held_out = pictures().split(0.1, config.seed)
    again = [
        continuous.run.validation(config, run.model, held_out, np.arange(3), run.state)
        for _ in range(2)
    ]
    assert again == [run.history[-1].validation_error] * 2
    dropping = dataclasses.replace(run.model, label_drop=1.0, dropout=0.5)
    assert (
        continuous.run.validation(config, dropping, held_out, np.arange(3), run.state) == (again[0])
    )


def test_validation_does_not_depend_on_the_cores(whole, monkeypatch):
    _, run = whole
    config = dataclasses.replace(run.config, batch_size=2)
    _, held_out = pictures().split(0.5, config.seed)
    limits = []
    original = parallel.threads

    def noting(num_threads, **options):
        limits.append((num_threads, options.get("blas_threads", 1)))
        return original(num_threads, **options)

    monkeypatch.setattr(parallel, "threads", noting)
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(parallel, "num_cores", lambda cores=cores: cores)
        found.append(
            continuous.run.validation(config, run.model, held_out, np.arange(15), run.state)
        )
    assert found[0] == found[1]
    assert limits == [(1, 1), (2, 1)]


def test_a_folder_named_digits_does_not_stand_for_the_digits(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    options = [*OPTIONS, "--num-steps", "1", "--batch-size", "2"]
    assert cli.main(["train", "digits", "--continuous", "--out", "run", *options]) == 0


def test_a_checkpoint_says_of_which_model_it_is(whole):
    out, run = whole
    newest = checkpoints.latest(out / "run" / "checkpoints")
    assert newest.model == run.model
    assert newest.config == run.config
    with pytest.raises(ValueError, match="evaluate: received a run of the continuous model"):
        checkpoints.discrete(newest, "evaluate")
    settings = json.loads((out / "run" / "config.json").read_text("utf-8"))
    assert settings["model"] == "continuous"


@pytest.mark.parametrize("line", ["1,2.0,1.0,0.1,50,0.5", "1,2.0,1.0,0.1,50,0.5,0", "x" * 7])
def test_a_line_of_the_history_that_was_not_written_whole_ends_it(whole, tmp_path, line):
    out, _ = whole
    copy = tmp_path / "history.csv"
    text = (out / "run" / "history.csv").read_text("utf-8").splitlines()
    copy.write_text("\n".join([*text[:3], line, *text[4:]]), "utf-8")
    assert [record.step for record in runs._read_history(copy, 8, RunRecord)] == [1, 2]


@pytest.mark.parametrize(
    ("dataset", "changed", "message"),
    [
        (pictures(height=6), {}, "pictures of 6 x 4 pixels, expected square ones"),
        (dataclasses.replace(pictures(), tokens=np.ones((30, 16), int)), {}, "every level is 1"),
        (Dataset(np.ones((9, 4), int), data.Ids(3), 4), {}, "data: ids, expected pictures"),
        (pictures(), {"image_size": 8}, "image_size: received 8, expected 4 as the data"),
        (pictures(), {"patch_size": 3}, "image_size: received 4, expected a multiple of"),
    ],
)
def test_data_that_do_not_fit_are_named(dataset, changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        runs.start(dataset, tmp_path / "run", dataclasses.replace(CONFIG, **changed))
    assert not (tmp_path / "run").exists()


# The commands.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("commands") / "run"
    arguments = ["train", "digits", "--continuous", "--out", str(out), *OPTIONS]
    assert cli.main([*arguments, "--num-steps", "3", "--batch-size", "4"]) == 0
    return out


def test_the_commands_train_resume_and_say_how_it_goes(trained, capsys):
    assert cli.main(["train", "--out", str(trained), "--resume"]) == 0
    assert "Best validation: squared error " in capsys.readouterr().out
    assert (trained / "history.csv").read_text("utf-8").count("\n") == 4


def test_samples_depend_on_their_number_alone(trained, tmp_path, capsys):
    def sampled(*options):
        path = tmp_path / "samples.npy"
        quick = ["--diffusion-steps", "3", "--steps", "2", "--out", str(path), *options]
        assert cli.main(["sample", str(trained), *quick]) == 0
        return np.load(path)

    three = sampled("--num", "3")
    assert three.shape == (3, 64)
    assert three.min() >= 0
    assert three.max() <= 16
    np.testing.assert_array_equal(sampled("--num", "1"), three[:1])
    assert (sampled("--num", "1", "--seed", "1") != three[:1]).any()
    assert (sampled("--num", "1", "--clip", "none") != three[:1]).any()
    assert cli.main(["sample", str(trained), "--num", "1", "--diffusion-steps", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 9


def test_few_pictures_are_made_at_once_where_their_noise_is_large(trained, tmp_path, monkeypatch):
    path = tmp_path / "samples.npy"
    quick = ["--num", "3", "--diffusion-steps", "2", "--steps", "1", "--out", str(path)]
    assert cli.main(["sample", str(trained), *quick]) == 0
    together = np.load(path)
    asked, original = [], continuous.sample

    def sample(*arguments, draws, **options):
        asked.append(len(draws["orders"]))
        return original(*arguments, draws=draws, **options)

    monkeypatch.setattr(continuous, "sample", sample)
    monkeypatch.setattr(cli.continuous, "_MOST_NOISE", 1)
    assert cli.main(["sample", str(trained), *quick]) == 0
    assert asked == [1, 1, 1]
    # Rounding may move a pixel to the next level.
    assert np.abs(np.load(path) - together).max() <= 1


def test_a_class_is_asked_for(trained, monkeypatch, capsys):
    asked = []

    def sample(model, params, labels, *, guidance_scale, **_):
        asked.append((labels, guidance_scale))
        return np.zeros((len(labels or [0]), 1, 8, 8))

    monkeypatch.setattr(continuous, "sample", sample)
    for options in (["--class", "7", "--guidance-scale", "2"], ["--class", "none"], []):
        assert cli.main(["sample", str(trained), "--num", "1", *options]) == 0
    (seven, none, (drawn, _)) = asked
    assert (seven, none) == (([7], 2.0), (None, 1.0))
    assert drawn[0] in range(10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{run}", "--top-k", "3"], "--top-k: received for a run of the continuous"),
        (["sample", "{run}", "--prompt", "x.png"], "--prompt: received for a run of the cont"),
        (["sample", "{run}", "--clip", "0"], "clip: received 0"),
        (["sample", "{run}", "--choice-temperature", "0"], "--choice-temperature: received for"),
        (["sample", "{run}", "--order-temperature", "0"], "--order-temperature: received for"),
        (["evaluate", "{run}"], "evaluate: received a run of the continuous model"),
        (["train", "digits", "--continuous", "--out", "{run}x", "--embed-dim", "8"], "encoder_dim"),
        (["train", "digits", "--out", "{run}x", "--patch-size", "2"], "'patch_size' is unknown"),
        (["train", "--resume", "--out", "{run}", "--continuous"], "--continuous: received with"),
    ],
)
def test_options_of_the_other_model_are_named(trained, arguments, message, capsys):
    assert cli.main([text.format(run=trained) for text in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_discrete_mar_has_no_diffusion_steps(tmp_path, capsys):
    options = ["--num-steps", "1", "--embed-dim", "4", "--num-heads", "1", "--batch-size", "1"]
    assert cli.main(["train", "digits", "--out", str(tmp_path), *options]) == 0
    for option, value in (("--diffusion-steps", "3"), ("--clip", "0")):
        assert cli.main(["sample", str(tmp_path), option, value]) == 2
        assert f"{option}: received for a run of discrete MAR" in capsys.readouterr().err


def test_export_writes_the_published_names(trained, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    assert cli.main(["export", str(trained), str(path)]) == 0
    best = runs.best(trained)
    found = mar.to_params(files.load(path)[0], best.model)
    np.testing.assert_array_equal(found["mask_vector"], best.state.averaged["mask_vector"])
