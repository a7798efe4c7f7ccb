import mpmath
import numpy as np
import pytest
from scipy.special import ndtr

from marref import normal
from marref.layers import gelu
from marref.verify.rounding import in_precision


def distribution(x):
    return normal.distribution_and_density(x)[0]


def density(x):
    return normal.distribution_and_density(x)[1]


GRID = np.linspace(-16, 16, 400_001, dtype=np.float32)


def test_the_float32_distribution_is_within_its_bounds_of_scipys():
    exact = ndtr(GRID.astype(float))
    error = np.abs(distribution(GRID) - exact)
    assert error.max() < 1.2 * 2.0**-23
    # As far as float32 has normal numbers.
    tail = (GRID < 0) & (exact > 2.0**-126)
    assert (error[tail] / exact[tail] / (1 + GRID[tail].astype(float) ** 2 / 2)).max() < 3e-7


def test_both_distributions_and_the_density_are_those_of_50_digits():
    for x in np.random.default_rng(0).normal(0.0, 4.0, 200).astype(np.float32):
        with mpmath.workdps(50):
            phi, exact = mpmath.ncdf(float(x)), mpmath.npdf(float(x))
            scale = 1 + float(x) ** 2 / 2
            fast = mpmath.mpf(float(distribution(np.array([x]))[0]))
            plain = mpmath.mpf(float(distribution(np.array([float(x)]))[0]))
            found = mpmath.mpf(float(density(np.array([float(x)]))[0]))
            assert abs(fast - phi) < 1.2 * 2.0**-23
            assert abs(plain - phi) < 1e-15 * scale * phi + mpmath.mpf(2) ** -53 * (x > 0)
            assert abs(found - exact) < 1e-15 * scale * exact


def test_slope_of_gelu_from_both_is_accurate_in_float32():
    exact = ndtr(GRID.astype(float)) + GRID * density(GRID.astype(float))
    slope = gelu.forward(GRID, "erf")[1]["slope"]
    assert np.abs(slope - exact).max() < 1.4 * 2.0**-23


def test_extreme_and_special_numbers():
    x = np.array([0.0, -0.0, 3.4e38, -3.4e38, 1e-45, np.inf, -np.inf, np.nan], np.float32)
    phi = distribution(x)
    assert phi.dtype == np.float32
    np.testing.assert_array_equal(phi, np.array([0.5, 0.5, 1, 0, 0.5, 1, 0, np.nan], np.float32))
    assert distribution(np.zeros((0, 3), np.float32)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_other_precisions_take_scipys(dtype):
    x = GRID[::1000].astype(dtype)
    np.testing.assert_array_equal(distribution(x), ndtr(x))


def test_emulated_precisions_take_scipys_too():
    x = in_precision(np.linspace(-3, 3, 50), "bfloat16")
    phi = distribution(x)
    assert type(phi) is type(x)
    exact = ndtr(np.asarray(x, float))
    assert (np.abs(np.asarray(phi) - exact) <= 2.0**-8 * exact).all()
