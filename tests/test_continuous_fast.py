"""The continuous model over packed parameters, held to its definition."""

import dataclasses

import numpy as np
import pytest

from marref import continuous, trees
from marref.continuous import loss, sampling, training
from marref.continuous.fast import network, packed
from marref.continuous.fast import training as fast
from marref.continuous.layers import network as definition
from marref.continuous.layers import silu
from marref.fast import parallel

MODEL = continuous.build(
    image_size=8,
    channels=2,
    patch_size=2,
    encoder_dim=12,
    encoder_layers=2,
    decoder_dim=16,
    decoder_layers=2,
    num_heads=4,
    buffer_size=3,
    num_classes=3,
    diffusion_dim=10,
    diffusion_layers=2,
    diffusion_batch_mul=3,
    noise_schedule="linear",
)
MODELS = {
    "of two widths": MODEL,
    "of one block": dataclasses.replace(MODEL, encoder_layers=1, decoder_layers=1),
    "cosine": dataclasses.replace(MODEL, noise_schedule="cosine"),
    "without classes": dataclasses.replace(MODEL, num_classes=None),
    "one copy": dataclasses.replace(MODEL, diffusion_batch_mul=1),
    "with dropout": dataclasses.replace(MODEL, dropout=0.3),
}


def drawn(model, batch=4, dtype=np.float64, seed=0):
    """Parameters of which none is 0, a batch, and all that is random."""
    rng = np.random.default_rng(seed)
    params = model.init(rng)
    params = trees.map_leaves(
        lambda leaf: (leaf + 0.3 * rng.normal(size=leaf.shape)).astype(dtype), params
    )
    images = rng.normal(size=(batch, model.channels, 8, 8)).astype(dtype)
    return params, images, np.arange(batch) % 3, model.draw(rng, batch)


def assert_equal_up_to_rounding(found, expected, tolerance):
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert list(found) == list(expected)
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        # The gradient of a key bias is 0, and what is found is rounding.
        size = np.abs(leaf).max() if not name.endswith("key.bias") else largest
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=tolerance * size, err_msg=name)


def both(model, batch, dtype, num_parts, num_masked=None):
    params, images, labels, draws = drawn(model, batch, dtype)
    if num_masked is not None:
        draws["num_masked"] = num_masked
    given = None if model.num_classes is None else labels
    value, grads = continuous.loss_and_grads(model, params, images, given, draws)
    labels = model.check_labels(given, batch)
    found = fast.loss_and_grads(model, params, images, labels, draws, num_parts)
    return found, value, grads


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_definition_s(name, num_parts):
    """Within 1e-12 of the largest entry, 4,500 epsilons: the loss of t = 0 has terms of 1e5."""
    found, value, grads = both(MODELS[name], 4, np.float64, num_parts)
    assert found.squared_error + found.bound == pytest.approx(value, rel=1e-12)
    assert_equal_up_to_rounding(found.grads, grads, 1e-12)


@pytest.mark.parametrize("num_masked", [1, 15, 16])
def test_any_number_may_be_masked(num_masked):
    found, value, grads = both(MODEL, 2, np.float64, 2, num_masked)
    assert found.squared_error + found.bound == pytest.approx(value, rel=1e-12)
    assert_equal_up_to_rounding(found.grads, grads, 1e-12)


def test_float32_stays_float32_and_is_as_near():
    """1e-12 in float64 are 4,500 epsilons, and so many of float32 5e-4."""
    found, value, grads = both(MODEL, 4, np.float32, 2)
    assert found.squared_error + found.bound == pytest.approx(value, rel=5e-4)
    assert_equal_up_to_rounding(found.grads, grads, 5e-4)


def test_chunks_of_rows_add_up(monkeypatch):
    monkeypatch.setattr(network, "_ROWS_AT_ONCE", 7)
    found, _, grads = both(MODEL, 4, np.float64, 1)
    assert_equal_up_to_rounding(found.grads, grads, 1e-12)


def test_silu_is_the_definition_and_far_out_too():
    x = np.concatenate([np.linspace(-40, 40, 1001), [-800.0, 800.0]])
    expected, slope = silu.forward(x)
    found, found_slope = network.silu(x.copy())
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    # Near its zero at -1.28 the derivative is a difference of numbers of 0.3.
    np.testing.assert_allclose(found_slope, silu.backward(np.ones_like(x), slope), atol=4e-16)


def test_the_bits_depend_on_the_parts_and_not_on_the_cores(monkeypatch):
    found, _, _ = both(MODEL, 4, np.float32, 2)
    monkeypatch.setattr(parallel, "num_cores", lambda: 1)
    again, _, _ = both(MODEL, 4, np.float32, 2)
    for name, leaf in trees.flatten(found.grads).items():
        np.testing.assert_array_equal(trees.flatten(again.grads)[name], leaf)


def test_training_uses_it(monkeypatch):
    def never(*_):
        raise AssertionError("the definition was run")

    monkeypatch.setattr(loss, "loss_and_grads", never)
    params, images, labels, _ = drawn(MODEL)
    config = training.Config(1, batch_size=2)
    state, _ = continuous.train(MODEL, images, labels, config=config)
    assert params.keys() == state.params.keys()


# Sampling.

SETTINGS = {
    "plain": {},
    "guided": {"guidance_scale": 2.5},
    "linear": {"guidance_scale": 2.5, "guidance": "linear", "temperature": 0.7},
    "one step": {"num_steps": 1, "clip": None},
    "without a class": {"labels": None},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("cores", [1, 2])
def test_samples_are_the_definition_s(setting, cores, monkeypatch):
    """Within 1e-9 in float64: each diffusion step carries on what the ones before were off by."""
    monkeypatch.setattr(parallel, "num_cores", lambda: cores)
    monkeypatch.setattr(parallel, "FEATURES_WORTH_A_THREAD", 1)
    params, _, labels, _ = drawn(MODEL, 3)
    draws = continuous.draw(MODEL, np.random.default_rng(1), 3, 6)
    options = {"labels": labels[:3], "num_steps": 4, "num_diffusion_steps": 6, "draws": draws}
    options |= SETTINGS[setting]
    expected = sampling.sample(MODEL, params, **options)
    found = continuous.sample(MODEL, params, **options)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 5e-4)])
def test_the_packed_network_is_the_definition_s_in_its_dtype_and_far_out_too(dtype, tolerance):
    params = drawn(MODEL, dtype=dtype)[0]["diffusion"]
    rng = np.random.default_rng(3)
    x, z = (rng.normal(size=(9, size)).astype(dtype) for size in (8, 16))
    # SiLU of these is 0, and exp of them overflows.
    params["condition"]["bias"][:3] = -800.0
    times = rng.integers(1000, size=9)
    expected, _ = definition.forward(params, x, times, z)
    y = network.time_forward(params, times, dtype)[0]
    y += z @ params["condition"]["kernel"] + params["condition"]["bias"]
    with np.errstate(all="raise", under="ignore"):
        found = packed.forward(packed.pack(params), x, y)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_the_definition_can_be_asked_for():
    params, _, labels, _ = drawn(MODEL, 2)
    options = {"num_steps": 2, "num_diffusion_steps": 2}
    expected = sampling.sample(MODEL, params, labels[:2], np.random.default_rng(0), **options)
    options["sampler"] = sampling.Sampler
    found = continuous.sample(MODEL, params, labels[:2], np.random.default_rng(0), **options)
    np.testing.assert_array_equal(found, expected)


def test_sampling_does_not_compute_what_the_definition_does(monkeypatch):
    def never(*_):
        raise AssertionError("the definition was run")

    monkeypatch.setattr(continuous.ContinuousMAR, "forward", never)
    params, _, labels, _ = drawn(MODEL, 2)
    options = {"num_steps": 2, "num_diffusion_steps": 2}
    found = continuous.sample(MODEL, params, labels[:2], np.random.default_rng(0), **options)
    assert found.shape == (2, 2, 8, 8)
