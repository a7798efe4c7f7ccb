import inspect

import numpy as np
import pytest

from marref import optim, trees

from .strategies import both_ways


@both_ways
def test_the_first_step_has_the_size_of_the_learning_rate_whatever_the_gradient(way):
    for size in (1e-3, 1.0, 1e6):
        params = {"w": np.zeros(2)}
        stepped, state = way.adam_step(
            params, {"w": np.array([size, -size])}, optim.init(params), 0.1, epsilon=1e-12
        )
        np.testing.assert_allclose(stepped["w"], [-0.1, 0.1], rtol=1e-8)
        assert state["step"] == 1


@both_ways
def test_two_steps_by_hand(way):
    params, state = {"w": np.array([1.0])}, optim.init({"w": np.array([1.0])})
    options = {"beta1": 0.5, "beta2": 0.75, "epsilon": 0.5, "weight_decay": 0.1}
    # m = 2, v = 4, both corrected to 4 and 16: 1 - 0.1 (4 / (4 + 0.5) + 0.1·1).
    params, state = way.adam_step(params, {"w": np.array([4.0])}, state, 0.1, **options)
    first = 1 - 0.1 * (4 / 4.5 + 0.1)
    assert params["w"] == pytest.approx(first, rel=1e-15)
    # m = 0.5·2 - 0.5·2 = 0, v = 0.75·4 + 0.25·4 = 4: only the decay is left.
    params, state = way.adam_step(params, {"w": np.array([-2.0])}, state, 0.1, **options)
    assert params["w"] == pytest.approx(first * 0.99, rel=1e-15)
    assert state["second_moment"]["w"] == pytest.approx(4.0)


def test_update_is_the_five_formulas_on_one_array():
    """By hand in step 3: m = 3, v = 7, m̂ = 3/(1 - 1/8), v̂ = 7/(1 - 27/64)."""
    settings = {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.75, "epsilon": 0.5}
    arguments = [np.array([number]) for number in (3.0, 4.0, 2.0, 4.0)]
    param, m, v = optim.update(*arguments, t=3, weight_decay=0.2, **settings)
    assert (m, v) == (3.0, 7.0)
    corrected_m, corrected_v = 3 / (7 / 8), 7 / (37 / 64)
    expected = 3 - 0.1 * (corrected_m / (corrected_v**0.5 + 0.5) + 0.2 * 3)
    assert param == pytest.approx(expected, rel=1e-15)
    assert [array.item() for array in arguments] == [3.0, 4.0, 2.0, 4.0]


@both_ways
def test_float32_stays_float32(way):
    params = {"w": np.ones(3, np.float32)}
    stepped, state = way.adam_step(params, params, optim.init(params), 0.1, weight_decay=0.1)
    leaves = trees.flatten({"params": stepped, "m": state["first_moment"]})
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    clipped, _ = optim.clip_by_global_norm(params, 0.1)
    assert clipped["w"].dtype == np.float32


def test_clipping_bounds_the_norm_of_all_arrays_together_and_keeps_the_direction():
    grads = {"a": np.array([3.0]), "b": [np.array([[4.0]])]}
    clipped, norm = optim.clip_by_global_norm(grads, 1.0)
    assert norm == 5.0
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0][0, 0]], [0.6, 0.8], rtol=1e-6)
    untouched, _ = optim.clip_by_global_norm(grads, 10.0)
    assert untouched["a"][0] == 3.0


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    rates = [
        optim.warmup_cosine(step, peak=2.0, warmup_steps=3, total_steps=7) for step in range(8)
    ]
    half = 2.0 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.5, 2.0, half, 1.0, 2.0 - half, 0.0], atol=1e-15)


@both_ways
def test_numpy_scalars_do_not_widen_float32(way):
    params = {"w": np.ones(3, np.float32)}
    options = dict.fromkeys(("beta1", "beta2", "epsilon", "weight_decay"), np.float64(0.1))
    stepped, _ = way.adam_step(params, params, optim.init(params), np.float64(0.1), **options)
    clipped, _ = optim.clip_by_global_norm(params, np.float64(0.1))
    assert stepped["w"].dtype == clipped["w"].dtype == np.float32


def test_the_norm_of_large_float32_gradients_does_not_overflow():
    clipped, norm = optim.clip_by_global_norm({"w": np.array([1e20, 1.0], np.float32)}, 1.0)
    assert norm == pytest.approx(1e20)
    assert clipped["w"][0] == pytest.approx(1.0)
    with pytest.raises(FloatingPointError, match="grads: their norm is nan"):
        optim.clip_by_global_norm({"w": np.array([np.nan])}, 1.0)


@both_ways
def test_defaults_are_those_of_the_paper(way):
    defaults = inspect.signature(way.adam_step).parameters
    found = [defaults[name].default for name in ("beta1", "beta2", "epsilon", "weight_decay")]
    assert found == [0.9, 0.999, 1e-8, 0.0]
