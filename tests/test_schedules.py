from fractions import Fraction

import mpmath
import numpy as np
import pytest

from marref import schedules

LARGEST = 512


def masked_after(counts, num_masked):
    return num_masked - np.cumsum(counts)


def test_cosine_is_the_exact_formula_for_every_n_and_k_up_to_512():
    """Against floor(N cos(πk/2K)) in 50 digits.

    c = floor(2⁵³ cos) is exact, so floor(N cos) is known where N c and N (c + 1) lie between the
    same multiples of 2⁵³; where they do not, the 50-digit product decides.
    """
    num_masked = np.arange(LARGEST + 1)
    for num_steps in range(1, LARGEST + 1):
        with mpmath.workdps(50):
            cosines = [
                mpmath.mpf(0.5)
                if 3 * k == 2 * num_steps
                else mpmath.cospi(mpmath.mpf(k) / (2 * num_steps))
                for k in range(1, num_steps)
            ]
            scaled = np.array([int(mpmath.floor(c * 2**53)) for c in cosines], np.int64)
            floors = num_masked[:, np.newaxis] * scaled >> 53
            undecided = floors != num_masked[:, np.newaxis] * (scaled + 1) >> 53
            for n, k in np.argwhere(undecided):
                floors[n, k] = int(mpmath.floor(int(n) * cosines[k]))
        before = num_masked.copy()
        expected = np.zeros((LARGEST + 1, num_steps), np.int64)
        for k in range(num_steps - 1):
            expected[:, k] = before = np.maximum(1, np.minimum(before - 1, floors[:, k]))
        for n in range(num_steps, LARGEST + 1):
            counts = schedules.cosine(n, num_steps)
            assert counts.min() >= 1
            np.testing.assert_array_equal(masked_after(counts, n), expected[n], f"N = {n}")


def test_linear_is_the_exact_formula_for_every_n_and_k_up_to_512():
    """In whole numbers: round half up of (K - k) N / K is floor((2 (K - k) N + K) / 2K)."""
    for num_steps in range(1, LARGEST + 1):
        remaining = np.arange(num_steps - 1, -1, -1)
        for num_masked in range(num_steps, LARGEST + 1):
            counts = schedules.linear(num_masked, num_steps)
            expected = (2 * remaining * num_masked + num_steps) // (2 * num_steps)
            np.testing.assert_array_equal(masked_after(counts, num_masked), expected)
            assert counts.min() >= 1


def test_linear_rounds_halves_away_from_zero():
    for num_masked in range(1, 40):
        for num_steps in range(1, num_masked + 1):
            exact = [Fraction(num_masked * (num_steps - k), num_steps) for k in range(1, num_steps)]
            expected = [int(value + Fraction(1, 2)) for value in exact] + [0]
            counts = schedules.linear(num_masked, num_steps)
            assert masked_after(counts, num_masked).tolist() == expected


@pytest.mark.parametrize("schedule", schedules.SCHEDULES.values())
def test_there_are_never_more_steps_than_masked_tokens(schedule):
    for num_masked in range(20):
        for num_steps in range(1, 30):
            counts = schedule(num_masked, num_steps)
            assert len(counts) <= min(num_masked, num_steps)
            assert counts.sum() == num_masked
            assert counts.dtype == np.int64


def test_cosine_counts_rise_but_for_one_token_of_rounding():
    for num_masked in range(1, 200):
        for num_steps in range(1, num_masked + 1):
            counts = schedules.cosine(num_masked, num_steps)
            assert (np.diff(counts) >= -1).all()


def test_known_counts():
    assert schedules.cosine(256, 8).tolist() == [5, 15, 24, 31, 39, 45, 48, 49]
    assert schedules.linear(256, 8).tolist() == [32] * 8
    # cos(π/3) is 1/2: exactly half is left after two thirds of the steps.
    assert schedules.cosine(256, 12)[:8].sum() == 128
    assert all(schedules.cosine(2 * k, k)[: 2 * k // 3].sum() == k for k in range(3, 400, 3))
