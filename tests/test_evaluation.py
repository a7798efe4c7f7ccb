"""Measurements, held to sums over everything that can be drawn."""

import functools
import itertools
import math

import numpy as np
import pytest
from scipy.special import log_softmax

import marref
from marref import training
from marref.training import evaluation

LENGTH, VOCAB_SIZE = 4, 4


@pytest.fixture(scope="module")
def predict():
    model = marref.build(
        vocab_size=VOCAB_SIZE, embed_dim=8, num_layers=1, num_heads=2, seq_len=LENGTH, dropout=0.0
    )
    return functools.partial(model, model.init(np.random.default_rng(0), np.float64, std=1.0))


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(1).integers(1, VOCAB_SIZE, size=(5, LENGTH))


def over_all_orders(predict, targets):
    """-1/L E_o Σ_i log2 p(x_{o_i} | x_{o_<i}), token by token."""
    total = np.zeros(len(targets))
    for order in itertools.permutations(range(LENGTH)):
        known = np.zeros_like(targets)
        for position in order:
            log_p = log_softmax(predict(known)[:, position], axis=-1)
            total -= log_p[np.arange(len(targets)), targets[:, position]]
            known[:, position] = targets[:, position]
    return total / (math.factorial(LENGTH) * LENGTH * math.log(2))


def over_all_subsets(predict, targets):
    """E_t E_S of what `any_order_bits` draws."""
    total = np.zeros(len(targets))
    for size in range(1, LENGTH + 1):
        for masked in itertools.combinations(range(LENGTH), size):
            mask = np.zeros(targets.shape, bool)
            mask[:, masked] = True
            bits = evaluation.bits_behind(predict, targets, mask)
            total += bits / (LENGTH * math.comb(LENGTH, size))
    return total


def test_the_any_order_bound_is_the_mean_over_all_orders(predict, targets):
    found, expected = over_all_subsets(predict, targets), over_all_orders(predict, targets)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", range(3))
def test_the_estimate_of_the_bound_is_unbiased(predict, targets, row):
    """One sequence many times: nothing is random but what is masked."""
    exact = over_all_orders(predict, targets[row : row + 1])[0]
    many = np.repeat(targets[row : row + 1], 20_000, axis=0)
    bits, error = training.any_order_bits(predict, many, np.random.default_rng(row))
    assert 0 < error < 0.02
    assert abs(bits - exact) < 4 * error


def test_more_orders_have_the_same_mean_and_a_smaller_error(predict, targets):
    exact = over_all_orders(predict, targets).mean()
    many = np.tile(targets, (500, 1))
    once = training.any_order_bits(predict, many, np.random.default_rng(0))
    often = training.any_order_bits(predict, many, np.random.default_rng(0), num_orders=16)
    assert often.standard_error < 0.7 * once.standard_error
    assert abs(often.bits - exact) < 4 * often.standard_error


def test_the_bound_is_below_the_likelihood(predict):
    """-L·bits is at most the log of p(x), the mean over orders, which adds up to 1 over all x."""
    every = np.array(list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH)))
    likelihood = np.zeros(len(every))
    for order in itertools.permutations(range(LENGTH)):
        log_p, known = np.zeros(len(every)), np.zeros_like(every)
        for position in order:
            rows = log_softmax(predict(known)[:, position], axis=-1)
            log_p += rows[np.arange(len(every)), every[:, position]]
            known[:, position] = every[:, position]
        likelihood += np.exp(log_p) / math.factorial(LENGTH)
    without_mask = (every > 0).all(axis=1)
    bound = -LENGTH * over_all_orders(predict, every[without_mask])
    gap = np.log2(likelihood[without_mask]) - bound
    assert gap.min() > 0
    assert likelihood.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_masked_bits_are_bits_per_token_with_the_error_over_sequences(predict, ratio):
    tokens = np.random.default_rng(2).integers(1, VOCAB_SIZE, size=(50, LENGTH))
    found = training.masked_bits(predict, tokens, ratio, np.random.default_rng(3), batch_size=7)
    rng = np.random.default_rng(3)
    assert found.bits == pytest.approx(training.bits_per_token(predict, tokens, ratio, rng))
    _, mask = marref.mask_tokens(tokens, ratio, np.random.default_rng(3))
    one_by_one = [
        training.evaluation.bits_behind(predict, tokens[[i]], mask[[i]])[0] for i in range(50)
    ]
    assert found.standard_error == pytest.approx(np.std(one_by_one, ddof=1) / math.sqrt(50))


def test_a_single_sequence_has_no_error(predict, targets):
    found = training.any_order_bits(predict, targets[:1], np.random.default_rng(0))
    assert math.isnan(found.standard_error)


@pytest.mark.parametrize("measure", ["masked_bits", "any_order_bits"])
def test_data_with_masks_or_without_sequences_are_refused(predict, measure):
    options = [0.5] if measure == "masked_bits" else []
    for tokens, message in ([[1, 0, 2, 3]], r"\[MASK\]"), (np.zeros((0, 4), int), "at least one"):
        with pytest.raises(ValueError, match=message):
            getattr(training, measure)(predict, tokens, *options, np.random.default_rng(0))
