import contextlib
import copy
import dataclasses
import errno
import importlib.util
import json
import os
import random
import signal
import threading

import numpy as np
import pytest

import marref
from benchmarks import killed
from marref import chance, files, optim, trees
from marref.training import checkpoints, evaluation, loop, runs
from marref.training.config import Config

DATASET = killed.DATASET
CONFIG = Config(
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    num_steps=12,
    batch_size=4,
    checkpoint_every=4,
    validate_every=3,
    num_threads=1,
)


@contextlib.contextmanager
def without_pictures():
    """Matplotlib takes longer than all else here."""
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
        )
        yield patch


@pytest.fixture(autouse=True)
def no_pictures():
    with without_pictures() as patch:
        yield patch


def changed(**options):
    return dataclasses.replace(CONFIG, **options)


def stopping_after(step, error=KeyboardInterrupt):
    def on_step(record):
        if record.step == step:
            raise error

    return on_step


def leaves(state):
    return trees.flatten(
        {"params": state.params, "optimiser": state.optimiser, "average": state.average}
    )


def assert_same_state(found, expected):
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


# One step.


def one_step(config, dtype="float64", number=0):
    config = dataclasses.replace(config, dtype=dtype).resolved(DATASET)
    model = config.model(DATASET.vocab_size)
    return loop.step(config, model, DATASET, loop.init(config, model), number)


@pytest.mark.parametrize("mask_per", ["sequence", "batch"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulating_is_a_larger_batch(parts, mask_per):
    options = {"dropout": 0.0, "mask_per": mask_per}
    whole, record = one_step(changed(batch_size=8, **options))
    parted, parted_record = one_step(changed(batch_size=8 // parts, accumulate=parts, **options))
    assert parted_record.loss == pytest.approx(record.loss, rel=1e-13)
    assert parted_record.grad_norm == pytest.approx(record.grad_norm, rel=1e-12)
    moments = (state.optimiser["first_moment"] for state in (parted, whole))
    for found, expected in zip(*(trees.flatten(tree).values() for tree in moments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_a_step_is_what_its_options_say(decay):
    """Written out with the definitions."""
    config = changed(
        decay=decay,
        weight_decay=0.3,
        learning_rate=0.05,
        warmup_steps=2,
        average_decay=0.75,
        max_norm=0.05,
        label_smoothing=0.2,
        mask_schedule="cosine",
        seed=9,
    ).resolved(DATASET)
    model = config.model(DATASET.vocab_size)
    config = dataclasses.replace(config, dtype="float64")
    state = loop.init(config, model)
    params = trees.map_leaves(np.copy, state.params)
    average, moments = trees.map_leaves(np.copy, params), optim.init(params)
    for number in range(2):
        targets = DATASET.draw(chance.generator(9, "batch", number), 4)
        rng = chance.generator(9, "mask", number)
        ratios = marref.sample_mask_ratio(rng, "cosine", size=4)
        inputs, mask = marref.mask_tokens(targets, ratios, rng)
        loss, grads = marref.model.loss_and_grads(
            model,
            params,
            inputs,
            targets,
            mask,
            chance.generator(9, "dropout", number, 0),
            label_smoothing=0.2,
        )
        grads, norm = optim.clip_by_global_norm(grads, 0.05)
        assert norm > 0.05
        rate = 0.05 * (number + 1) / 3
        everything, _ = optim.step(params, grads, moments, rate, weight_decay=0.3)
        nothing, moments = optim.step(params, grads, moments, rate)
        params = trees.map_leaves(
            lambda leaf, other: leaf if decay == "all" or leaf.ndim == 2 else other,
            everything,
            nothing,
        )
        average = trees.map_leaves(lambda a, leaf: 0.75 * a + 0.25 * leaf, average, params)
        state, record = loop.step(config, model, DATASET, state, number)
        assert (record.step, record.learning_rate) == (number + 1, pytest.approx(rate))
        assert (record.loss, record.grad_norm) == pytest.approx((loss, norm))
    expected = leaves(loop.State(params, moments, average))
    for name, leaf in leaves(state).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-7, atol=1e-9, err_msg=name)


def test_keys_start_as_queries_so_that_attention_starts_near_its_own_place():
    config = changed(embed_dim=32, num_layers=2, num_heads=4).resolved(DATASET)
    model = config.model(DATASET.vocab_size)
    state = loop.init(config, model)
    _, cache = model.forward(state.params, DATASET.rows(np.arange(64)))
    weights = cache["blocks"][0]["attention"]["weights"]
    place = np.arange(weights.shape[-1])
    near = np.abs(place[:, np.newaxis] - place) <= 1
    assert weights[..., near].sum() / weights.sum() > 2.0 * near.mean()
    for block in state.params["blocks"]:
        query, key = (block["attention"][name]["kernel"] for name in ("query", "key"))
        np.testing.assert_array_equal(query, key)
        assert not np.shares_memory(query, key)


def test_without_an_average_there_is_none_and_the_parameters_stand_for_it():
    state, _ = one_step(changed(average_decay=0.0))
    assert state.average is None
    assert state.averaged is state.params
    state, _ = one_step(changed(average_decay=0.5))
    assert state.averaged is state.average


def test_masking_a_batch_alike_hides_as_much_of_every_sequence(monkeypatch):
    seen = []
    original = loop.loss_and_grads

    def looks(model, params, inputs, targets, mask, *args, **kwargs):
        seen.append(set(mask.sum(axis=1).tolist()))
        return original(model, params, inputs, targets, mask, *args, **kwargs)

    monkeypatch.setattr(loop, "loss_and_grads", looks)
    for number in range(5):
        one_step(changed(mask_per="batch", batch_size=16), number=number)
        one_step(changed(mask_per="sequence", batch_size=16), number=number)
    assert {len(counts) for counts in seen[::2]} == {1}
    assert len(set.union(*seen[::2])) > 1
    assert min(len(counts) for counts in seen[1::2]) > 1


# A run in a folder.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with without_pictures():
        return out, runs.start(DATASET, out, CONFIG)


def test_a_run_leaves_its_options_its_history_and_its_checkpoints(whole):
    out, run = whole
    assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "history.csv"]
    settings = json.loads((out / "config.json").read_text())
    assert Config.from_dict(settings["config"]) == run.config == CONFIG.resolved(DATASET)
    unset = [name for name, value in settings["config"].items() if value is None]
    assert unset == ["num_shards"]
    assert settings["vocab_size"] == 6
    lines = (out / "history.csv").read_text().splitlines()
    assert lines[0].split(",") == [field.name for field in dataclasses.fields(runs.RunRecord)]
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, 13))
    validated = {record.step for record in run.history if record.validation_bits is not None}
    assert validated == {3, 6, 9, 12}
    best = min((r.validation_bits, r.step) for r in run.history if r.step in validated)[1]
    last = checkpoints.latest(out / "checkpoints")
    assert_same_state(last.state, run.state)
    assert (last.codec, last.vocab_size) == (DATASET.codec.as_dict(), 6)
    kept = checkpoints.found(out / "checkpoints")
    assert {12, best} <= set(kept)
    assert len(kept) == 3 + (best < min(sorted(kept)[-3:]))


def test_the_best_by_validation_is_kept(tmp_path, monkeypatch):
    bits = iter([5.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(loop, "validation", lambda *_: next(bits))
    runs.start(DATASET, tmp_path, changed(keep=1))
    assert sorted(checkpoints.found(tmp_path / "checkpoints")) == [6, 12]


def test_validation_is_the_mean_over_fixed_masks_of_what_was_set_aside(whole):
    _, run = whole
    _, validation = DATASET.split(run.config.validation_fraction, 0)
    rows = validation.rows(np.arange(len(validation)))
    bits = [
        evaluation.bits_per_token(
            lambda tokens: run.model(run.state.average, tokens),
            rows,
            ratio,
            chance.generator(0, "validation", index),
        )
        for index, ratio in enumerate([0.1, 0.3, 0.5, 0.7, 0.9])
    ]
    assert run.history[-1].validation_bits == pytest.approx(np.mean(bits), rel=1e-5)


def without_speed(history):
    return [dataclasses.replace(record, tokens_per_second=0.0) for record in history]


@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_a_run_that_was_stopped_and_resumed_is_one_that_never_was(whole, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, CONFIG, on_step=stopping_after(step))
    assert max(checkpoints.found(tmp_path / "checkpoints")) == step
    seen = []
    run = runs.resume(tmp_path, DATASET, on_step=seen.append)
    assert_same_state(run.state, whole[1].state)
    assert without_speed(run.history) == without_speed(whole[1].history)
    assert run.history[step:] == seen
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 13


def test_a_run_that_ended_is_its_result(whole):
    out, run = whole
    again = runs.resume(out, DATASET, on_step=lambda record: pytest.fail("took a step"))
    assert_same_state(again.state, run.state)
    assert again.history == run.history


def test_a_run_goes_on_with_the_threads_of_its_start(tmp_path, monkeypatch):
    config = changed(num_threads=None, dropout=0.2)
    monkeypatch.setattr(marref.parallel, "num_cores", lambda: 2)
    monkeypatch.setattr(marref.parallel, "FEATURES_WORTH_A_THREAD", 1)
    two = runs.start(DATASET, tmp_path / "two", config)
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path / "stopped", config, on_step=stopping_after(5))
    monkeypatch.undo()
    assert runs.resume(tmp_path / "stopped", DATASET).config.num_threads == 2
    assert_same_state(checkpoints.latest(tmp_path / "stopped/checkpoints").state, two.state)


def test_runs_that_were_killed_end_like_one_that_was_not(tmp_path):
    report = killed.run(3, 40, tmp_path, random.Random(0))
    assert sum(report.kills) == 3
    assert report.differing == []


def test_a_killed_run_that_forgot_something_would_be_seen(whole, tmp_path, monkeypatch):
    """The comparison of the test above can fail."""
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path / "x", CONFIG, on_step=stopping_after(5))
    load = checkpoints.load

    def forgets(path):
        found = load(path)
        found.state.optimiser["first_moment"]["head"]["bias"][0] += 1e-7
        return found

    monkeypatch.setattr(checkpoints, "load", forgets)
    run = runs.resume(tmp_path / "x", DATASET)
    with pytest.raises(AssertionError):
        assert_same_state(run.state, whole[1].state)
    names = killed.differences(tmp_path / "x", whole[0])
    assert any(name.startswith(os.path.join("checkpoints", "00000012")) for name in names)


def test_a_kill_between_a_checkpoint_and_the_removal_of_an_old_one_leaves_none(
    whole, tmp_path, monkeypatch
):
    clean = checkpoints.clean

    def killed_at_the_end(folder, keep, *, best):
        if 12 in checkpoints.found(folder):
            raise KeyboardInterrupt
        clean(folder, keep, best=best)

    monkeypatch.setattr(checkpoints, "clean", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, changed(keep=1))
    monkeypatch.setattr(checkpoints, "clean", clean)
    history = runs.resume(tmp_path, DATASET).history
    best = min((r.validation_bits, r.step) for r in history if r.validation_bits is not None)[1]
    assert set(checkpoints.found(tmp_path / "checkpoints")) == {12, best}


def test_the_history_is_on_the_disk_before_the_checkpoint_that_it_leads_to(tmp_path, monkeypatch):
    synced, fsync, save = [], os.fsync, checkpoints.save

    def syncs(handle):
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    def saves(*args):
        assert synced[-1] == (tmp_path / "history.csv").stat().st_ino
        return save(*args)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(checkpoints, "save", saves)
    runs.start(DATASET, tmp_path, CONFIG)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_callback_sees_the_state_of_every_step(whole, tmp_path, stopped):
    seen = {}

    def on_state(record, state):
        seen[record.step] = copy.deepcopy(state)

    if stopped:
        with pytest.raises(KeyboardInterrupt):
            runs.start(DATASET, tmp_path, CONFIG, on_state=on_state, on_step=stopping_after(5))
        run = runs.resume(tmp_path, DATASET, on_state=on_state)
    else:
        run = runs.start(DATASET, tmp_path, CONFIG, on_state=on_state)
    assert list(seen) == list(range(1, 13))
    assert_same_state(seen[12], run.state)
    assert_same_state(seen[12], whole[1].state)
    saved = checkpoints.load(checkpoints.found(tmp_path / "checkpoints")[8]).state
    assert_same_state(seen[8], saved)


@pytest.mark.parametrize("name", ["on_step", "on_state"])
def test_a_callback_that_is_none_is_refused_before_anything_is_written(name, whole, tmp_path):
    with pytest.raises(TypeError, match=f"{name}: received int, expected a function"):
        runs.start(DATASET, tmp_path / "run", CONFIG, **{name: 5})
    with pytest.raises(TypeError, match=f"{name}: received int, expected a function"):
        runs.resume(whole[0], DATASET, **{name: 5})
    assert not list(tmp_path.iterdir())


def test_a_callback_that_sees_the_state_may_stop_the_run(tmp_path):
    def on_state(record, state):
        if record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, CONFIG, on_state=on_state)
    assert max(checkpoints.found(tmp_path / "checkpoints")) == 3


# What stops a run.


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, number, error):
    before = signal.getsignal(number)

    def on_step(record):
        if record.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(error) as raised:
        runs.start(DATASET, tmp_path, CONFIG, on_step=on_step)
    assert max(checkpoints.found(tmp_path / "checkpoints")) == 3
    assert signal.getsignal(number) == before
    if error is SystemExit:
        assert raised.value.code == 143


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    def step(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(loop, "step", step)
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, CONFIG)


def test_a_run_can_be_in_another_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(runs.start(DATASET, tmp_path, changed(num_steps=2)))
    )
    thread.start()
    thread.join()
    assert len(results[0].history) == 2


def test_a_run_that_diverges_says_what_to_change_and_keeps_its_last_checkpoint(tmp_path):
    config = changed(num_steps=50, learning_rate=1e30, warmup_steps=40, checkpoint_every=1)
    message = (
        r"training diverged in step \d+: .*; the last good checkpoint is .*0000000\d\..*; "
        r"start anew with a lower learning_rate \(it was 1e\+30\), more warmup_steps \(40\) or a "
        r"lower max_norm \(1\)"
    )
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=message):
        runs.start(DATASET, tmp_path, config)
    for leaf in leaves(checkpoints.latest(tmp_path / "checkpoints").state).values():
        assert np.isfinite(leaf).all()


def test_parameters_that_are_no_longer_finite_are_not_saved(tmp_path, monkeypatch):
    original = loop.step

    def step(*args):
        state, record = original(*args)
        if record.step == 8:
            state.params["head"]["bias"][2] = np.inf
        return state, record

    monkeypatch.setattr(loop, "step", step)
    with pytest.raises(FloatingPointError, match=r"head.bias: inf at \[2\].*00000006"):
        runs.start(DATASET, tmp_path, CONFIG)
    assert 8 not in checkpoints.found(tmp_path / "checkpoints")


def test_an_error_that_is_none_of_these_keeps_its_name(tmp_path, monkeypatch):
    def bad_argument(*_, **__):
        raise ValueError("tokens: id 9 at [0, 0] is not in [0, 6)")

    monkeypatch.setattr(loop, "loss_and_grads", bad_argument)
    with pytest.raises(ValueError, match="tokens: id 9"):
        runs.start(DATASET, tmp_path, CONFIG)


# What can be wrong with a folder.


def test_a_full_disk_leaves_the_last_checkpoint_from_which_the_run_goes_on(
    whole, tmp_path, monkeypatch
):
    fsync, count = os.fsync, 0

    def full(handle):
        nonlocal count
        count += 1
        if count > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*(checkpoints|history).*'"):
        runs.start(DATASET, tmp_path, CONFIG)
    monkeypatch.setattr(os, "fsync", fsync)
    assert 0 < max(checkpoints.found(tmp_path / "checkpoints")) < 12
    assert_same_state(runs.resume(tmp_path, DATASET).state, whole[1].state)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_history_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    history = tmp_path / "history.csv"

    def on_step(record):
        if record.step == 5:
            history.unlink()
            history.symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left on device: '.*history\.csv'"):
        runs.start(DATASET, tmp_path, CONFIG, on_step=on_step)


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "step", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        runs.start(DATASET, tmp_path / "file" / "run", CONFIG)
    original = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return original(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"Read-only file system: .*run"):
        runs.start(DATASET, tmp_path / "run", CONFIG)


def test_a_missing_folder_is_made_and_one_that_vanishes_is_a_clear_error(tmp_path):
    out = tmp_path / "a" / "b"

    def vanishes(record):
        if record.step == 4:
            for path in (out / "checkpoints").iterdir():
                path.unlink()
            (out / "checkpoints").rmdir()

    with pytest.raises(FileNotFoundError, match="checkpoints"):
        runs.start(DATASET, out, CONFIG, on_step=vanishes)


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_with_a_damaged_checkpoint_a_run_goes_on_from_the_one_before(whole, tmp_path, harm):
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, CONFIG, on_step=stopping_after(7))
    newest = checkpoints.found(tmp_path / "checkpoints")[7]
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(content if harm == "flipped" else content[:-9])
    newest_at = {}

    def on_step(record):
        newest_at[record.step] = max(checkpoints.found(tmp_path / "checkpoints"))

    with pytest.warns(RuntimeWarning, match=rf"{newest.name}.*; using the one before it"):
        run = runs.resume(tmp_path, DATASET, on_step=on_step)
    assert newest_at[min(newest_at)] < min(newest_at) <= 7
    assert_same_state(run.state, whole[1].state)
    assert without_speed(run.history) == without_speed(whole[1].history)


@pytest.mark.parametrize("tail", ["8,0.1", "8,0.1,x,0,0,\n", "\x00\x00", "9,1.0,1.0,1.0,1.0,\n"])
def test_what_a_kill_leaves_of_the_history_is_cut_off(whole, tmp_path, tail):
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, CONFIG, on_step=stopping_after(7))
    with (tmp_path / "history.csv").open("a") as file:
        file.write(tail)
    run = runs.resume(tmp_path, DATASET)
    assert without_speed(run.history) == without_speed(whole[1].history)
    assert killed.differences(tmp_path, whole[0]) == []


def test_what_dead_writers_left_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        runs.start(DATASET, tmp_path, CONFIG, on_step=stopping_after(2))
    for folder in (tmp_path, tmp_path / "checkpoints"):
        (folder / f"{files.TEMPORARY_PREFIX}0123").write_text("half")
    runs.resume(tmp_path, DATASET)
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    def on_step(record):
        runs.resume(tmp_path, DATASET)

    with pytest.raises(ValueError, match="another process is training into it"):
        runs.start(DATASET, tmp_path, CONFIG, on_step=on_step)


def test_a_run_is_not_started_over_another_nor_resumed_with_other_data(whole, tmp_path):
    out, _ = whole
    with pytest.raises(ValueError, match="holds a run already; resume it or choose another"):
        runs.start(DATASET, out, CONFIG)
    with pytest.raises(ValueError, match=r"holds no run, since it has no config\.json"):
        runs.resume(tmp_path, DATASET)
    other = killed.counting(killed.FIRST[::-1])
    with pytest.raises(ValueError, match=r"dataset: its data is .* expected .* as in the run"):
        runs.resume(out, other)
    with pytest.raises(ValueError, match="dataset: its vocab_size is 8, expected 6"):
        runs.resume(out, killed.counting(killed.FIRST, num_ids=7))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_a_config_that_is_none_is_one_clear_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: is no"):
        runs.resume(tmp_path, DATASET)


def test_a_picture_of_the_loss_is_drawn_where_matplotlib_is(whole, no_pictures):
    pytest.importorskip("matplotlib")
    no_pictures.undo()
    out, _ = whole
    runs.resume(out, DATASET)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


# The options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps: received 0, expected an integer in"),
        ({"batch_size": 1.5}, "batch_size: received 1.5, expected an integer"),
        ({"accumulate": 0}, "accumulate: received 0"),
        ({"warmup_steps": 12}, r"warmup_steps: received 12, expected an integer in \[0, 11\]"),
        ({"learning_rate": 0.0}, "learning_rate: received 0.0"),
        ({"average_decay": 1.0}, "average_decay: received 1.0"),
        ({"validation_fraction": 1.0}, "validation_fraction: received 1.0"),
        ({"decay": "biases"}, "decay: received 'biases', expected one of matrices, all"),
        ({"mask_per": "token"}, "mask_per: received 'token'"),
        ({"mask_schedule": "all"}, "mask_schedule: received 'all'"),
        ({"dtype": "float16"}, "dtype: received 'float16'"),
        ({"embed_dim": 7}, "embed_dim: received 7, expected an even number"),
        ({"seed": -1}, "seed: received -1"),
        ({"keep": 0}, "keep: received 0"),
        ({"seq_len": 7}, "seq_len: received 7, expected at least the length of the data's"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        runs.start(DATASET, tmp_path / "run", changed(**options))
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_option_names_the_nearest():
    with pytest.raises(ValueError, match="'batchsize' is unknown; nearest: batch_size"):
        Config.from_dict({"batchsize": 3})


def test_options_that_are_given_are_not_resolved():
    given = changed(learning_rate=0.5, warmup_steps=0, average_decay=0.0, seq_len=20)
    assert given.resolved(DATASET) == given
    found = changed(embed_dim=24, num_steps=1000, num_threads=None).resolved(DATASET)
    assert (found.seq_len, found.warmup_steps, found.average_decay) == (8, 50, 0.99)
    assert found.learning_rate == pytest.approx(5e-3 * (64 / 24) ** 0.5)
    assert found.num_threads == 1
