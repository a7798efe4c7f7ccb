from fractions import Fraction

import mpmath
import numpy as np
import pytest

from marref import decoding, schedules

from . import rules_oracle as book

LARGEST = 512


def masked_after(counts, num_masked):
    return num_masked - np.cumsum(counts, axis=-1)


def scaled_cosines(num_steps):
    """2²⁰⁰ cos(πk/2K) for k = 1, …, K - 1; but for the last 20 bits, which is 50 digits and more.

    cos (k + 1)x = 2 cos x cos kx - cos (k - 1)x makes an error of one grow to at most k, and the
    sum of all to K².
    """
    with mpmath.workdps(70):
        first = int(mpmath.cospi(mpmath.mpf(1) / (2 * num_steps)) * 2**200)
    cosines = [2**200, first]
    while len(cosines) < num_steps:
        cosines.append((first * cosines[-1] >> 199) - cosines[-2])
    if num_steps % 3 == 0:
        cosines[2 * num_steps // 3] = 2**199
    return cosines[1:num_steps]


def test_cosine_is_the_exact_formula_for_every_n_and_k_up_to_512():
    """Against floor(N cos(πk/2K)) in 50 digits.

    c = floor(2⁵³ cos) is exact, so floor(N cos) is known where N c and N (c + 1) lie between the
    same multiples of 2⁵³; where they do not, the 50-digit product decides.
    """
    for num_steps in range(1, LARGEST + 1):
        num_masked = np.arange(num_steps, LARGEST + 1)[:, np.newaxis]
        cosines = scaled_cosines(num_steps)
        scaled = np.array([cosine >> 147 for cosine in cosines], np.int64)
        floors = num_masked * scaled >> 53
        for n, k in np.argwhere(floors != num_masked * (scaled + 1) >> 53):
            floors[n, k] = int(num_masked[n, 0]) * cosines[k] >> 200
        counts = np.array([schedules.cosine(n, num_steps) for n in num_masked[:, 0].tolist()])
        assert counts.min() >= 1
        found = masked_after(counts, num_masked)
        np.testing.assert_array_equal(found, recursion(num_masked, floors), f"K = {num_steps}")


def recursion(num_masked, floors):
    """MaskGIT's m_k = max(1, min(m_{k-1} - 1, floor_k)), and 0 after the last step."""
    before, masked = num_masked[:, 0], np.zeros((len(floors), floors.shape[1] + 1), np.int64)
    for k, floor in enumerate(floors.T):
        masked[:, k] = before = np.maximum(1, np.minimum(before - 1, floor))
    return masked


def test_linear_is_the_exact_formula_for_every_n_and_k_up_to_512():
    """In whole numbers: round half up of (K - k) N / K is floor((2 (K - k) N + K) / 2K)."""
    for num_steps in range(1, LARGEST + 1):
        num_masked = np.arange(num_steps, LARGEST + 1)[:, np.newaxis]
        remaining = np.arange(num_steps - 1, -1, -1)
        counts = np.array([schedules.linear(n, num_steps) for n in num_masked[:, 0].tolist()])
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


STEPS = (*range(1, 33), *range(48, 257, 16))


def power(exponent):
    """floor(N (1 - (k/K)^a)) in whole numbers."""

    def floors(num_masked, step, num_steps):
        return num_masked * (num_steps**exponent - step**exponent) // num_steps**exponent

    return floors


def in_50_digits(near, exact):
    """floor(N γ(k/K)); a number of float64 decides where it is 1e-9 away from an integer.

    What is within 1e-40 of one is that integer, such as N log 2 / log N with N = 4.
    """

    def floors(num_masked, step, num_steps):
        values = num_masked * near(step / num_steps, num_masked)
        found = np.floor(values).astype(np.int64)
        for n, k in np.argwhere(abs(values - np.round(values)) < 1e-9):
            with mpmath.workdps(50):
                number = int(num_masked[n, 0])
                value = number * exact(mpmath.mpf(int(step[k])) / num_steps, number)
                whole = mpmath.nint(value)
                found[n, k] = int(whole if abs(value - whole) < 1e-40 else mpmath.floor(value))
        return found

    return floors


FLOORS = {
    "uniform": power(1),
    "square": power(2),
    "cubic": power(3),
    "square-root": in_50_digits(lambda r, n: 1 - r**0.5, lambda r, n: 1 - mpmath.sqrt(r)),
    "log": in_50_digits(
        lambda r, n: np.minimum(-np.log2(r) / np.log2(n), 1),
        lambda r, n: min(-mpmath.log(r) / mpmath.log(n), 1),
    ),
    "exp": in_50_digits(
        lambda r, n: 1 - np.exp2(np.log2(n) * (r - 1)),
        lambda r, n: 1 - mpmath.exp(mpmath.log(n) * (r - 1)),
    ),
}


@pytest.mark.parametrize("name", FLOORS)
def test_other_schedules_are_maskgit_s_recursion_without_steps_that_reveal_nothing(name):
    """For every N up to 256, with every K up to 32 and each 16th beyond."""
    for num_steps in STEPS:
        num_masked = np.arange(max(num_steps, 2), 257)[:, np.newaxis]
        floors = FLOORS[name](num_masked, np.arange(1, num_steps), num_steps)
        masked = recursion(num_masked, floors)
        for n, left in zip(num_masked[:, 0].tolist(), masked.tolist(), strict=True):
            counts = [before - after for before, after in zip([n, *left], left, strict=False)]
            expected = [count for count in counts if count > 0]
            assert schedules.SCHEDULES[name](n, num_steps).tolist() == expected, (n, num_steps)


def test_arccos_reveals_what_halton_maskgit_s_code_does():
    """Revealed after step k are max(k, floor(N (1 - 2/π arccos(k/K))))."""
    floors = in_50_digits(
        lambda r, n: 1 - 2 / np.pi * np.arccos(r), lambda r, n: 1 - 2 * mpmath.acos(r) / mpmath.pi
    )
    for num_steps in STEPS:
        num_masked = np.arange(max(num_steps, 2), 257)[:, np.newaxis]
        step = np.arange(1, num_steps)
        revealed = np.maximum(step, floors(num_masked, step, num_steps))
        for n, expected in zip(num_masked[:, 0].tolist(), revealed.tolist(), strict=True):
            counts = schedules.arccos(n, num_steps)
            assert np.cumsum(counts).tolist() == [*expected, n], (n, num_steps)
            assert counts.min() >= 1


def test_even_gives_the_larger_counts_first():
    for num_steps in STEPS:
        for num_masked in range(num_steps, 257):
            counts = schedules.SCHEDULES["even"](num_masked, num_steps).tolist()
            assert counts == sorted(counts, reverse=True)
            assert (len(counts), sum(counts)) == (num_steps, num_masked)
            assert counts[0] - counts[-1] <= 1


def test_every_schedule_has_a_test_against_its_formula():
    assert {*FLOORS, "cosine", "linear", "even", "arccos"} == {*schedules.SCHEDULES}


@pytest.mark.parametrize("side", range(1, 13))
def test_halton_visits_the_cells_in_the_order_of_its_fractions(side):
    assert decoding.halton(side * side).tolist() == book.halton(side)


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
