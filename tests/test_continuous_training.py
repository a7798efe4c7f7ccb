"""Training of the continuous model: its steps by the definitions, its bits, its files, its demo."""

import csv
import dataclasses
import re
import sys
import warnings

import numpy as np
import pytest

import marref
from marref import chance, cli, continuous, demo, files, optim, trees
from marref.continuous import training
from marref.continuous.pixels import Scale
from marref.demo import continuous as continuous_demo
from marref.demo import quality
from marref.fast import optim as fast_optim
from marref.fast import parallel

MODEL = continuous.build(
    image_size=4,
    encoder_dim=8,
    encoder_layers=1,
    decoder_dim=8,
    decoder_layers=1,
    num_heads=2,
    buffer_size=2,
    num_classes=3,
    diffusion_dim=8,
    diffusion_layers=1,
    diffusion_batch_mul=2,
)
CONFIG = continuous.Config(6, batch_size=8, learning_rate=0.01, warmup_steps=2, num_parts=1)
IMAGES = np.random.default_rng(0).normal(size=(20, 1, 4, 4))
LABELS = np.arange(20) % 3


def fit(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return continuous.train(MODEL, IMAGES, LABELS, config=config)


def leaves_of(state):
    parts = {"params": state.params, "optimiser": state.optimiser, "average": state.average}
    return trees.flatten(parts)


def assert_same(found, expected):
    found, expected = leaves_of(found), leaves_of(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_one_seed_is_one_training_run():
    (first, history), (second, _), (other, _) = fit(), fit(), fit(seed=1)
    assert_same(first, second)
    assert (first.params["mask_vector"] != other.params["mask_vector"]).any()
    assert first.params["mask_vector"].dtype == np.float32
    assert [record.step for record in history] == [1, 2, 3, 4, 5, 6]
    assert all(record.loss == record.squared_error + record.bound for record in history)
    assert all(min(record.grad_norm, record.tokens_per_second) > 0 for record in history)


def test_a_step_is_made_of_the_definitions():
    config = dataclasses.replace(CONFIG, dtype="float64", max_norm=0.5, weight_decay=0.3)
    state = training.init(config, MODEL)
    params, average = (trees.map_leaves(np.copy, state.params) for _ in range(2))
    moments, decayed = optim.init(params), training.decayed(params, "published")
    clipped = 0
    for number in range(config.num_steps):
        rng = chance.generator(config.seed, "batch", number)
        chosen = rng.integers(len(IMAGES), size=config.batch_size)
        draws = MODEL.draw(chance.generator(config.seed, "diffusion", number), config.batch_size)
        _, grads = continuous.loss_and_grads(MODEL, params, IMAGES[chosen], LABELS[chosen], draws)
        grads, norm = optim.clip_by_global_norm(grads, 0.5)
        clipped += norm > 0.5
        rate = config.learning_rate_at(number)
        for name, leaf in trees.flatten(params).items():
            leaf *= 1.0 - rate * 0.3 * (name in decayed)
        params, moments = optim.step(params, grads, moments, rate, beta1=0.9, beta2=0.95)
        d = (number + 1) / (number + 10)
        average = trees.map_leaves(lambda a, p, d=d: d * a + (1.0 - d) * p, average, params)
    assert clipped >= 3
    found, _ = continuous.train(MODEL, IMAGES, LABELS, config=config)
    for ours, expected in ((found.params, params), (found.averaged, average)):
        expected = trees.flatten(expected)
        for name, leaf in trees.flatten(ours).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_how_many_cores_there_are_does_not_matter(monkeypatch):
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(parallel, "num_cores", lambda cores=cores: cores)
        found.append(fit(num_parts=3)[0])
    assert_same(*found)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("changes", [{}, {"average_decay": 0.0, "dtype": "float64"}])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, suffix, changes):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    config = dataclasses.replace(CONFIG, **changes)
    path = tmp_path / f"run{suffix}"

    def keep(record, state):
        if record.step == 2:
            continuous.save(path, MODEL, config, state)

    whole, _ = continuous.train(MODEL, IMAGES, LABELS, config=config, on_step=keep)
    model, same_config, state = continuous.load(path)
    assert (model, same_config) == (MODEL, config)
    before = {name: leaf.copy() for name, leaf in leaves_of(state).items()}
    goes_on, history = continuous.train(model, IMAGES, LABELS, config=config, state=state)
    assert [record.step for record in history] == [3, 4, 5, 6]
    assert_same(goes_on, whole)
    for name, leaf in leaves_of(state).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    state, _ = fit()
    continuous.save(path, MODEL, CONFIG, state)
    content = path.read_bytes()

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        continuous.save(path, MODEL, CONFIG, training.init(CONFIG, MODEL))
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    path = tmp_path / "run.npz"
    state, _ = fit()
    continuous.save(path, MODEL, CONFIG, state)
    arrays, metadata = files.load(path)

    for message, changed, changes in (
        ("format 'other'", {}, {"format": "other"}),
        ("image_size: received 0", {}, {"model": {"image_size": 0}}),
        ("step: received 7", {}, {"step": 7}),
        ("is damaged", {}, {"step": 5}),
        ("is damaged", {"params/mask_vector": np.zeros(8, np.float32)}, {}),
    ):
        files.save(path, {**arrays, **changed}, {**metadata, **changes})
        with pytest.raises(ValueError, match=message):
            continuous.load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as arrays"):
        continuous.load(path)


def test_what_decays_is_what_was_published_or_the_kernels():
    params = MODEL.init(np.random.default_rng(0))
    names = set(trees.flatten(params))
    kernels = {name for name in names if name.endswith("kernel")}
    assert training.decayed(params, "kernels") == kernels
    tables = {"class_embedding.table", "encoder_positions.table", "decoder_positions.table"}
    tables |= {"diffusion_positions.table", "mask_vector"}
    transformer = {name for name in kernels if not name.startswith("diffusion.")}
    assert training.decayed(params, "published") == transformer | tables
    assert len(transformer) == 14
    assert len(kernels) == 14 + 9


def test_how_much_is_masked_is_what_the_config_says():
    rng = np.random.default_rng(0)
    counts = [MODEL.draw(rng, 1, mask_schedule="uniform")["num_masked"] for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(counts) / 2000, [0, 0.25, 0.25, 0.25, 0.25], atol=0.04)
    assert {MODEL.draw(rng, 1)["num_masked"] for _ in range(100)} == {3, 4}
    (published, _), (uniform, _) = fit(), fit(mask_schedule="uniform")
    assert (published.params["mask_vector"] != uniform.params["mask_vector"]).any()


def test_only_what_is_named_decays_to_the_bit():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in ("kept", "decays")}
    params["list"] = [params["kept"].copy()]
    grads = trees.map_leaves(lambda leaf: leaf[::-1].copy(), params)
    expected = trees.map_leaves(np.copy, params)
    expected["decays"] *= 1.0 - 0.1 * 0.5
    options = {"beta1": 0.8, "beta2": 0.7}
    expected, _ = marref.adam_step(expected, grads, optim.init(params), 0.1, **options)
    options |= {"max_norm": 100.0, "weight_decay": 0.5, "decay": {"decays"}, "average_decay": 0.0}
    fast_optim.run_step(params, grads, optim.init(params), None, 0.1, **options)
    found = trees.flatten(params)
    for name, leaf in trees.flatten(expected).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_the_learning_rate_rises_and_stays_or_falls():
    for schedule, expected in (
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
    ):
        _, history = fit(schedule=schedule)
        rates = [record.learning_rate for record in history]
        assert rates == pytest.approx(0.01 * np.array(expected))
    of_itself = continuous.Config(40, learning_rate=0.3)
    assert [of_itself.learning_rate_at(step) for step in (0, 1, 2)] == pytest.approx(
        [0.1, 0.2, 0.3]
    )


def test_the_average_reaches_over_a_tenth_of_the_steps_or_is_as_published():
    warm = continuous.Config(2_000_000)
    published = dataclasses.replace(warm, average_warmup=False)
    assert published.average_decay_at(0) == published.average_decay_at(10**6) == 0.9999
    assert [warm.average_decay_at(step) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.9999]
    # How far back the mean of 0, 1, …, 999 lies.
    mean = 0.0
    for step in range(1000):
        mean += (1.0 - warm.average_decay_at(step)) * (step - mean)
    assert 999 - mean == pytest.approx(1000 / 10, rel=0.02)


def test_training_learns_what_there_is_to_learn():
    # A class is one grey level, with a little noise.
    levels = np.array([-1.2, 0.0, 1.2])
    noise = np.random.default_rng(2).normal(0, 0.1, (60, 1, 4, 4))
    labels = np.arange(60) % 3
    images = levels[labels][:, np.newaxis, np.newaxis, np.newaxis] + noise
    model = continuous.build(
        **{
            **dataclasses.asdict(MODEL),
            "encoder_dim": 16,
            "decoder_dim": 16,
            "diffusion_dim": 32,
            "noise_schedule": "linear",
        }
    )
    config = continuous.Config(200, batch_size=16, learning_rate=5e-3, warmup_steps=20)
    state, history = continuous.train(model, images, labels, config=config)
    first, last = (
        np.mean([r.squared_error for r in part]) for part in (history[:5], history[-50:])
    )
    assert first > 0.9
    assert last < 0.2
    asked = np.repeat(np.arange(3), 4)
    made = continuous.sample(
        model, state.averaged, asked, np.random.default_rng(0), num_diffusion_steps=50
    )
    means = made.mean(axis=(1, 2, 3))
    np.testing.assert_array_less(abs(means - levels[asked]), 0.4)


def test_a_scale_that_is_wrong_is_said_once():
    with pytest.warns(UserWarning, match="divide by") as found:
        continuous.train(MODEL, IMAGES * 5, LABELS, config=CONFIG)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit()


def test_diverged_training_says_in_which_step():
    state = training.init(CONFIG, MODEL)
    state.params["mask_vector"][0] = np.nan
    with pytest.raises(FloatingPointError, match="training diverged in step 1: grads: their norm"):
        continuous.train(MODEL, IMAGES, LABELS, config=CONFIG, state=state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps: received 0"),
        ({"warmup_steps": 6}, r"warmup_steps: received 6, expected an integer in \[0, 5\]"),
        ({"average_decay": 1.0}, "average_decay: received 1.0"),
        ({"schedule": "linear"}, "schedule: received 'linear'"),
        ({"mask_schedule": "square"}, "mask_schedule: received 'square'"),
        ({"decay": "all"}, "decay: received 'all', expected one of published, kernels"),
        ({"dtype": "float16"}, "dtype: received 'float16'"),
        ({"num_parts": 0}, "num_parts: received 0"),
    ],
)
def test_a_config_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_word_is_no_truth_value():
    with pytest.raises(TypeError, match="average_warmup: received str, expected bool"):
        dataclasses.replace(CONFIG, average_warmup="false")


def test_what_does_not_fit_is_refused():
    state = training.init(CONFIG, MODEL)

    def refused(error, message, images=IMAGES, labels=LABELS, config=CONFIG, **options):
        with pytest.raises(error, match=message):
            continuous.train(MODEL, images, labels, config=config, **options)

    refused(ValueError, r"images: shape \[20, 1, 2, 2\]", images=IMAGES[:, :, :2, :2])
    refused(ValueError, "labels: class 7", labels=LABELS + 7)
    refused(TypeError, "on_step: received int", on_step=3)
    other = dataclasses.replace(CONFIG, dtype="float64")
    refused(TypeError, "dtype float32, expected float64", config=other, state=state)
    other = dataclasses.replace(CONFIG, average_decay=0.0)
    refused(ValueError, "state.average: received one", config=other, state=state)
    late = state._replace(optimiser={**state.optimiser, "step": np.array(7)})
    refused(ValueError, "state.step: received 7", state=late)


@pytest.fixture
def tiny(monkeypatch):
    """A demo of a moment, in this process."""
    monkeypatch.setattr(continuous_demo, "NUM_OF_EACH", 2)
    monkeypatch.setattr(demo, "NUM_OF_EACH", 2)
    monkeypatch.setattr(quality, "NUM_PERMUTATIONS", 20)
    return ["demo", "--continuous", "--quick", "--steps", "2"]


def test_the_demo_writes_what_it_says_and_can_be_repeated(tiny, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert cli.main([*tiny, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1500 digits of 16 tokens of 2x2 grey values,\n2 steps of 64 digits" in printed
    assert re.search(r"sees the digit that was asked for in \d+% of 20;\n.* right in 99%", printed)
    assert re.search(r"MMD², unbiased.*: -?0\.\d+; of as many real ones\nit is -?0\.\d+", printed)
    model, config, state = continuous.load(out / "checkpoint.npz")
    assert (model.length, model.token_dim, model.num_classes) == (16, 4, 10)
    assert config == dataclasses.replace(continuous_demo.QUICK.config, num_steps=2)
    assert int(state.optimiser["step"]) == 2
    with (out / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["step"] for row in history] == ["1", "2"]
    assert all(float(row["squared_error"]) > 0 and float(row["bound"]) > 0 for row in history)

    again = tmp_path / "again"
    cli.main([*tiny, "--out", str(again)])
    content = (out / "checkpoint.npz").read_bytes()
    assert (again / "checkpoint.npz").read_bytes() == content, "one seed is one result"
    cli.main([*tiny, "--out", str(again), "--seed", "1"])
    assert (again / "checkpoint.npz").read_bytes() != content


def test_the_demo_draws_its_picture(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    cli.main([*tiny, "--out", str(tmp_path)])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_viz_extra_the_demo_says_what_it_would_add(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "tqdm", None)
    monkeypatch.setitem(sys.modules, "marref.plots", None)
    monkeypatch.delattr(marref, "plots", raising=False)
    assert cli.main([*tiny, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert 'pip install ".[viz]"' in printed
    assert re.search(r"step 2/2: squared error \d\.\d+, bound \d\.\d+, learning rate", printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.npz", "history.csv"]


def test_the_digits_are_scaled_and_come_back():
    tokens, _ = demo.rows_and_labels(demo.digits()[0])
    scale = Scale.of(demo.digits()[0])
    images = scale.to_images(tokens)
    assert images.shape == (1500, 1, 8, 8)
    assert images.mean() == pytest.approx(0.0, abs=1e-12)
    assert images.std() == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_array_equal(scale.to_tokens(images), tokens)
    assert scale.to_tokens(np.full((1, 1, 8, 8), 9.0)).max() == 17
    assert scale.to_tokens(np.full((1, 1, 8, 8), -9.0)).min() == 1
