"""Training on data with classes, from the loop to the commands."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest

import marref
from marref import chance, cli, data, masking, trees
from marref.training import checkpoints, evaluation, loop, runs

from .test_cli_train import TINY, said
from .test_runs import CONFIG, assert_same_state, no_pictures, stopping_after  # noqa: F401

RNG = np.random.default_rng(0)
CLASSES = RNG.permutation([0] * 28 + [1] * 8 + [2] * 4)
# The class is what all but one position say.
IDS = np.where(np.arange(6) < 5, CLASSES[:, np.newaxis], RNG.integers(4, size=(40, 6)))
DATASET = data.Dataset(IDS, data.Ids(4), 6, CLASSES, ("ant", "bee", "cat"))


def test_a_step_drops_labels_by_a_draw_of_its_own():
    """Written out with the definition of the loss."""
    config = dataclasses.replace(CONFIG, label_drop=0.5, seed=9).resolved(DATASET)
    model = config.model(DATASET.vocab_size, DATASET.num_classes)
    assert model.num_classes == 3
    state = loop.init(config, model)
    params = trees.map_leaves(np.copy, state.params)
    _, record = loop.step(config, model, DATASET, state, 4)
    index = DATASET.draw_index(chance.generator(9, "batch", 4), 4)
    labels = masking.drop_labels(CLASSES[index], 0.5, chance.generator(9, "label", 4), 3)
    assert 0 < (labels == 3).sum() < 4
    rng = chance.generator(9, "mask", 4)
    ratios = marref.sample_mask_ratio(rng, config.mask_schedule, size=4)
    inputs, mask = marref.mask_tokens(DATASET.rows(index), ratios, rng)
    loss, _ = marref.model.loss_and_grads(
        model,
        params,
        inputs,
        DATASET.rows(index),
        mask,
        chance.generator(9, "dropout", 4, 0),
        labels=labels,
    )
    assert record.loss == pytest.approx(loss, rel=1e-6)


def test_accumulated_batches_have_their_own_labels():
    def one_step(**options):
        config = dataclasses.replace(CONFIG, dropout=0.0, dtype="float64", **options)
        config = config.resolved(DATASET)
        model = config.model(DATASET.vocab_size, 3)
        return loop.step(config, model, DATASET, loop.init(config, model), 0)

    whole, record = one_step(batch_size=8)
    parted, parted_record = one_step(batch_size=2, accumulate=4)
    assert parted_record.loss == pytest.approx(record.loss, rel=1e-13)
    for state in (whole, parted):
        assert state.optimiser["first_moment"]["class_embedding"]["table"].any()
    moments = (state.optimiser["first_moment"] for state in (parted, whole))
    for found, expected in zip(*(trees.flatten(tree).values() for tree in moments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_labels_change_no_other_draw(monkeypatch):
    """A model that does not use them is trained as on the data without them."""
    config = CONFIG.resolved(DATASET)
    model = config.model(DATASET.vocab_size)
    states = [
        loop.step(config, model, dataset, loop.init(config, model), 0)[0]
        for dataset in (DATASET, DATASET.without_labels())
    ]
    assert_same_state(*states)


def test_a_run_with_classes_that_was_stopped_and_resumed_is_one_that_never_was(tmp_path):
    whole = runs.start(DATASET, tmp_path / "whole", CONFIG)
    assert whole.model.num_classes == 3
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path / "stopped", CONFIG, on_step=stopping_after(5))
    run = runs.resume(tmp_path / "stopped", DATASET)
    assert_same_state(run.state, whole.state)
    assert run.history[-1].validation_bits == whole.history[-1].validation_bits
    settings = runs.read_settings(tmp_path / "whole")
    assert settings["data"]["classes"]["names"] == ["ant", "bee", "cat"]
    assert runs.classes_of(settings).counts == tuple(np.bincount(CLASSES))
    newest = checkpoints.latest(tmp_path / "whole" / "checkpoints")
    assert newest.model == whole.model


def test_validation_has_the_true_labels(tmp_path):
    run = runs.start(DATASET, tmp_path, CONFIG)
    _, validation = DATASET.split(CONFIG.validation_fraction, CONFIG.seed)
    predict = functools.partial(marref.fast.logits, run.model, run.state.averaged)

    def bits(labels):
        return np.mean(
            [
                evaluation.bits_per_token(
                    predict,
                    validation.rows(np.arange(len(validation))),
                    ratio,
                    chance.generator(0, "validation", index),
                    labels=labels,
                )
                for index, ratio in enumerate(runs.VALIDATION_RATIOS)
            ]
        )

    assert run.history[-1].validation_bits == pytest.approx(bits(validation.labels), rel=1e-5)
    assert run.history[-1].validation_bits != pytest.approx(bits(None), rel=1e-5)


def test_a_run_is_not_resumed_with_other_labels(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, CONFIG, on_step=stopping_after(2))
    others = (
        dataclasses.replace(DATASET, labels=np.roll(CLASSES, 1)),
        dataclasses.replace(DATASET, class_names=("ant", "bee", "dog")),
        DATASET.without_labels(),
    )
    for other in others:
        with pytest.raises(ValueError, match="dataset: its data"):
            runs.resume(tmp_path, other)


def test_every_measure_takes_the_labels_of_its_part_of_the_data():
    tokens = IDS + 1

    def predict(inputs, labels):
        """Sure of the class's token."""
        assert len(labels) == len(inputs)
        logits = np.zeros((*inputs.shape, 5))
        logits[np.arange(len(labels)), :, labels + 1] = 20.0
        return logits

    options = {"labels": CLASSES, "batch_size": 7}
    rng = np.random.default_rng
    told = tokens[:, :5]
    assert evaluation.bits_per_token(predict, told, 0.5, rng(0), **options) < 1e-6
    assert evaluation.masked_bits(predict, told, 0.5, rng(0), **options).bits < 1e-6
    assert evaluation.any_order_bits(predict, told, rng(0), **options).bits < 1e-6
    with pytest.raises(ValueError, match=r"labels: shape \[3\], expected \[40\]"):
        evaluation.masked_bits(predict, tokens, 0.5, rng(0), labels=CLASSES[:3])


def test_the_loop_over_arrays_learns_what_a_class_says():
    model = marref.build(5, embed_dim=16, num_layers=1, num_heads=2, seq_len=6, num_classes=3)
    params = model.init(np.random.default_rng(0), np.float32, std=0.25)
    trained, history = marref.train(
        model,
        params,
        IDS + 1,
        labels=CLASSES,
        num_steps=150,
        batch_size=16,
        learning_rate=0.01,
        rng=np.random.default_rng(0),
    )
    assert np.isfinite(history[-1].loss)
    tokens = marref.iterative_decode(model, trained, labels=[0, 1, 2], num_steps=6)
    np.testing.assert_array_equal(tokens[:, :5], np.tile([[1], [2], [3]], 5))


# Data.


def test_classes_keep_their_names_and_other_data_are_numbered_as_these():
    classes = data.Classes((3, 4, 5), ("ant", "bee", "cat"))
    other = data.Dataset(IDS[:3], data.Ids(4), 6, np.array([1, 0, 1]), ("bee", "cat"))
    known = other.with_classes(classes)
    assert known.labels.tolist() == [2, 1, 2]
    assert known.num_classes == DATASET.num_classes == 3
    assert other.without_labels().num_classes is None
    unknown = data.Dataset(IDS[:2], data.Ids(4), 6, np.array([1, 0]), ("bees", "cat"))
    with pytest.raises(ValueError, match="labels: class 'bees' is unknown; nearest: bee"):
        unknown.with_classes(classes)
    numbered = data.Dataset(IDS[:2], data.Ids(4), 6, np.array([0, 9]))
    assert numbered.num_classes == 10
    with pytest.raises(ValueError, match="class '9' is unknown, expected 0, 1"):
        numbered.with_classes(data.Classes((2, 2)))


def test_a_label_file_of_names_names_the_classes(tmp_path):
    np.save(tmp_path / "a.npy", IDS[:3])
    (tmp_path / "l.txt").write_text("dog\ncat\ndog\n")
    dataset = data.load(tmp_path / "a.npy", labels=tmp_path / "l.txt")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="class_names: received 1, expected labels"):
        dataclasses.replace(dataset, class_names=("cat",))


# The commands.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    np.save(folder / "a.npy", IDS)
    (folder / "names.txt").write_text("".join(f"{DATASET.class_names[c]}\n" for c in CLASSES))
    arguments = ["train", folder / "a.npy", "--labels", folder / "names.txt", "--out"]
    arguments += [folder / "run", *TINY]
    assert cli.main(list(map(str, arguments))) == 0
    return folder / "run"


def ids_of(tmp_path, capsys, run, *arguments):
    said(capsys, "sample", run, *arguments, "--out", tmp_path / "s.npy")
    return np.load(tmp_path / "s.npy")


def test_a_run_on_data_with_labels_has_classes_and_goes_on_with_them(run, tmp_path, capsys):
    assert runs.best(run).model.num_classes == 3
    assert runs.read_dataset(run).class_names == ("ant", "bee", "cat")
    assert "Data: 240 tokens" in said(capsys, "train", "--out", run, "--resume")
    evaluated = said(capsys, "evaluate", run)
    assert "any-order bound" in evaluated


def test_labels_can_be_left_out(tmp_path, capsys):
    out = tmp_path / "run"
    printed = said(capsys, "train", "digits", "--no-labels", "--out", out, *TINY, "--num-steps", 2)
    assert "classes" not in printed
    assert "classes" not in json.loads((out / "config.json").read_text())["data"]
    assert runs.best(out).model.num_classes is None
    said(capsys, "train", "--out", out, "--resume")


def test_a_sample_is_of_the_class_that_is_asked_for(run, tmp_path, capsys):
    by_name = ids_of(tmp_path, capsys, run, "--class", "bee", "--guidance-scale", 3, "--num", 3)
    checkpoint = runs.best(run)
    for index in range(3):
        expected = marref.iterative_decode(
            checkpoint.model,
            checkpoint.state.averaged,
            labels=[1],
            guidance_scale=3.0,
            num_steps=6,
            order="random",
            rng=chance.generator(0, "sample", index),
        )
        np.testing.assert_array_equal(by_name[index], expected[0] - 1)


def test_without_a_class_samples_have_those_of_the_data_and_none_is_no_class(
    run, monkeypatch, capsys
):
    labels = []
    original = marref.iterative_decode

    def decode(*arguments, **options):
        labels.append(options["labels"])
        return original(*arguments, **options)

    monkeypatch.setattr(marref, "iterative_decode", decode)
    said(capsys, "sample", run, "--num", 200)
    counts = np.bincount(np.concatenate(labels), minlength=3)
    expected = 200 * np.bincount(CLASSES) / len(CLASSES)
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()
    first, labels[:] = labels[:5], []
    said(capsys, "sample", run, "--num", 5)
    assert labels == first
    labels.clear()
    said(capsys, "sample", run, "--num", 1, "--class", "none")
    assert labels == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "bees"], "--class: class 'bees' is unknown; nearest: bee"),
        (["--class", "none", "--guidance-scale", "2"], "guidance_scale=2.0 needs them"),
        (["--guidance-scale", "-1"], "guidance_scale: received -1.0"),
        (["--guidance", "left"], "invalid choice"),
    ],
)
def test_what_is_wrong_with_a_class_is_one_line(run, arguments, message, capsys):
    try:
        status = cli.main(["sample", str(run), *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_class_of_a_run_without_classes_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    said(capsys, "train", "digits", "--no-labels", "--out", out, *TINY, "--num-steps", 1)
    assert cli.main(["sample", str(out), "--class", "7"]) == 2
    assert "--class: received for a run on data without classes" in capsys.readouterr().err
    both = ["train", "digits", "--no-labels", "--labels", "x", "--out", str(tmp_path / "other")]
    assert cli.main(both) == 2
    assert not (tmp_path / "other").exists()


def test_dropped_labels_of_a_narrow_dtype_are_no_class():
    labels = np.full(50, 3, np.uint8)
    dropped = masking.drop_labels(labels, 0.5, np.random.default_rng(0), 256)
    assert dropped.dtype == np.int64
    assert set(dropped.tolist()) == {3, 256}


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (np.array([0, -1, 0]), "class -1 at [1] is not in"),
        (np.array([0, 2**40, 0]), "is not in [0, 1048575]"),
        (np.array([0.0, 1.0, 0.0]), "labels: dtype float64, expected integers"),
    ],
)
def test_a_dataset_refuses_labels_that_are_no_classes(labels, error):
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        data.Dataset(np.zeros((3, 4), np.int64), data.Ids(5), 4, labels=labels)
