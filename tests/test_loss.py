import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import marref
from marref import loss


@st.composite
def batches(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab_size = draw(st.integers(1, 6))
    logits = rng.normal(0.0, draw(st.sampled_from([0.1, 3.0, 300.0])), (*shape, vocab_size))
    return logits, rng.integers(vocab_size, size=shape), rng.random(shape) < 0.6, rng


def gradient(logits, targets, mask):
    return loss.backward(loss.forward(logits, targets, mask)[1])


@given(batch=batches())
def test_loss_is_the_mean_over_the_masked_positions(batch):
    logits, targets, mask, _ = batch
    losses = []
    for place in np.ndindex(mask.shape):
        if mask[place]:
            row = logits[place]
            log_total = np.logaddexp.reduce(row)
            losses.append(log_total - row[targets[place]])
    expected = math.fsum(losses) / len(losses) if losses else 0.0
    assert marref.mar_loss(logits, targets, mask) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(batch=batches())
def test_changing_an_unmasked_target_or_logit_changes_nothing(batch):
    logits, targets, mask, rng = batch
    other_targets = np.where(mask, targets, rng.integers(logits.shape[-1], size=targets.shape))
    other_logits = np.where(mask[..., np.newaxis], logits, rng.normal(size=logits.shape))
    assert marref.mar_loss(other_logits, other_targets, mask) == marref.mar_loss(
        logits, targets, mask
    )
    np.testing.assert_array_equal(
        gradient(other_logits, other_targets, mask), gradient(logits, targets, mask)
    )


@given(batch=batches(), shift=st.integers(-1000, 1000))
def test_shifting_the_logits_of_a_position_changes_neither_loss_nor_gradient(batch, shift):
    logits, targets, mask, rng = batch
    # Whole numbers and whole shifts, so that the shift itself rounds nothing.
    logits = np.rint(logits)
    shifted = logits + shift * rng.integers(-2, 3, (*mask.shape, 1))
    assert marref.mar_loss(shifted, targets, mask) == marref.mar_loss(logits, targets, mask)
    np.testing.assert_array_equal(gradient(shifted, targets, mask), gradient(logits, targets, mask))


@given(batch=batches())
def test_gradient_rows_sum_to_zero_and_vanish_where_unmasked(batch):
    logits, targets, mask, _ = batch
    dlogits = gradient(logits, targets, mask)
    np.testing.assert_allclose(dlogits.sum(axis=-1), 0.0, atol=1e-15)
    assert (dlogits[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_empty_mask_costs_nothing(dtype):
    logits = np.ones((2, 3, 4), dtype)
    targets, mask = np.zeros((2, 3), int), np.zeros((2, 3), bool)
    value, cache = loss.forward(logits, targets, mask)
    assert value == 0.0
    assert not np.signbit(value)
    assert value.dtype == dtype
    np.testing.assert_array_equal(loss.backward(cache), np.zeros_like(logits))


def test_an_impossible_target_costs_its_distance_not_infinity():
    # exp(-120) is 0 in float32; log-sum-exp never takes its logarithm.
    logits = np.array([120.0, 0.0], np.float32)
    assert marref.mar_loss(logits, 1, True) == np.float32(120.0)


@pytest.mark.parametrize("mask", [[True, False], [1, 0], [1.0, 0.0]])
def test_masks_may_be_booleans_or_zeros_and_ones(mask):
    assert marref.mar_loss(np.zeros((2, 4)), [1, 2], mask) == pytest.approx(math.log(4))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    for leading in [(), (3,), (2, 3), (2, 1, 3)]:
        targets, mask = np.zeros(leading, int), np.ones(leading, bool)
        value = marref.mar_loss(np.zeros((*leading, 8)), targets, mask)
        assert value == pytest.approx(math.log(8), rel=1e-15)


def test_loss_and_gradient_of_a_sure_prediction_keep_their_digits():
    # log(1 + e⁻²⁵ + e⁻²⁴·⁷), where log Σ exp - z_y would round to 6 digits, and to 0 beyond 37.
    for gap in (5.0, 25.0, 40.0, 300.0):
        logits, rest = np.array([gap, 0.0, 0.3]), math.exp(-gap) + math.exp(0.3 - gap)
        value = marref.mar_loss(logits, 0, True)
        assert value == pytest.approx(math.log1p(rest), rel=1e-13)
        others = np.exp([-gap, 0.3 - gap]) / (1 + rest)
        expected = [-others.sum(), *others]
        np.testing.assert_allclose(gradient(logits, 0, True), expected, rtol=1e-13)


@given(batch=batches())
def test_the_uniform_part_is_the_mean_loss_over_all_targets(batch):
    logits, targets, mask, _ = batch
    ids = range(logits.shape[-1])
    value, dlogits = loss.uniform(loss.forward(logits, targets, mask)[1])
    each = [np.full_like(targets, token) for token in ids]
    expected = np.mean([marref.mar_loss(logits, target, mask) for target in each])
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)
    gradients = np.mean([gradient(logits, target, mask) for target in each], axis=0)
    np.testing.assert_allclose(dlogits, gradients, rtol=0, atol=1e-15)
