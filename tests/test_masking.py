import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import marref
from marref import masking

# The distribution functions, derived by hand from r = f(u).
DISTRIBUTIONS = {
    "one-minus-cosine": lambda r: 2 / np.pi * np.arccos(1 - r),
    "cosine": lambda r: 1 - 2 / np.pi * np.arccos(r),
    "arccos": lambda r: 1 - np.cos(np.pi * r / 2),
    "uniform": lambda r: r,
    "truncated-normal": lambda r: (
        (stats.norm.cdf((r - 1) / 0.25) - stats.norm.cdf(-1.2)) / (0.5 - stats.norm.cdf(-1.2))
    ),
}
MEANS_AND_MEDIANS = {
    "one-minus-cosine": (1 - 2 / np.pi, 1 - np.sqrt(0.5)),
    "cosine": (2 / np.pi, np.sqrt(0.5)),
    "arccos": (2 / np.pi, 2 / 3),
    "uniform": (0.5, 0.5),
    # Mean 1 - 0.25 (φ(0) - φ(1.2)) / (Φ(0) - Φ(-1.2)), median 1 + 0.25 Φ⁻¹((Φ(-1.2) + 0.5)/2).
    "truncated-normal": (
        1 - 0.25 * (stats.norm.pdf(0) - stats.norm.pdf(1.2)) / (0.5 - stats.norm.cdf(-1.2)),
        1 + 0.25 * stats.norm.ppf((stats.norm.cdf(-1.2) + 0.5) / 2),
    ),
}


@pytest.mark.parametrize("schedule", masking.SCHEDULES)
def test_ratios_follow_their_distribution(schedule):
    ratios = marref.sample_mask_ratio(np.random.default_rng(0), schedule, size=100_000)
    assert stats.kstest(ratios, DISTRIBUTIONS[schedule]).pvalue > 1e-3
    mean, median = MEANS_AND_MEDIANS[schedule]
    # Standard errors are below 0.5/sqrt(100000) = 0.0016.
    assert ratios.mean() == pytest.approx(mean, abs=0.006)
    assert np.median(ratios) == pytest.approx(median, abs=0.01)


def test_the_default_is_one_minus_cosine_and_the_cosine_mirrors_it():
    drawn = [marref.sample_mask_ratio(np.random.default_rng(5)) for _ in range(2)]
    u = np.random.default_rng(5).random()
    assert drawn == pytest.approx([1 - np.cos(np.pi * u / 2)] * 2, rel=1e-14)
    mirrored = marref.sample_mask_ratio(np.random.default_rng(5), "cosine")
    assert mirrored == pytest.approx(1 - drawn[0], rel=1e-14)


def test_without_a_generator_ratios_differ():
    ratios = {marref.sample_mask_ratio() for _ in range(10)}
    assert len(ratios) == 10
    assert all(0 <= ratio <= 1 for ratio in ratios)


@st.composite
def batches(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
    ratios = draw(st.floats(0, 1) | hnp.arrays(np.float64, shape[:1], elements=st.floats(0, 1)))
    dtype = draw(st.sampled_from([np.uint8, np.int32, np.int64]))
    return np.ones(shape, dtype), ratios, np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


@given(batch=batches())
def test_every_sequence_has_exactly_the_documented_number_of_masked_positions(batch):
    tokens, ratio, rng = batch
    masked, mask = marref.mask_tokens(tokens, ratio, rng)
    ratios = np.broadcast_to(ratio, tokens.shape[:1])
    expected = [max(1, round(r * tokens.shape[1])) for r in ratios]
    assert mask.sum(axis=1).tolist() == expected
    assert masked.dtype == tokens.dtype
    np.testing.assert_array_equal(masked, np.where(mask, 0, tokens))


def test_every_set_of_positions_is_equally_likely():
    tokens = np.ones((20_000, 4), int)
    _, mask = marref.mask_tokens(tokens, 0.5, np.random.default_rng(0))
    patterns, counts = np.unique(mask, axis=0, return_counts=True)
    assert len(patterns) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_mask_token_may_have_another_id():
    masked, mask = marref.mask_tokens([[1, 2, 3]], 1.0, np.random.default_rng(0), 9)
    assert masked.tolist() == [[9, 9, 9]]
    assert mask.all()


@pytest.mark.parametrize(("length", "masked"), [(3, 2), (5, 2), (7, 4), (9, 4)])
def test_halves_round_to_even(length, masked):
    _, mask = marref.mask_tokens(np.ones((1, length), int), 0.5, np.random.default_rng(0))
    assert mask.sum() == masked


def test_small_ratios_keep_their_digits():
    # 1 - cos(πu/2) is (πu/2)²/2 for small u, and 0 in float64 if it is written so.
    u = np.array([1e-9])
    ratio = masking.SCHEDULES["one-minus-cosine"](u)
    np.testing.assert_allclose(ratio, (np.pi / 2 * u) ** 2 / 2, rtol=1e-13)
