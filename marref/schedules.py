"""Reveal schedules: how many tokens the decoder reveals in each of its steps.

A schedule is a function ``(num_masked, num_steps) -> counts``.  With N = num_masked and
K = min(num_steps, N), ``counts`` are K integers, each at least 1, with the sum N.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from marref import checks

Counts: TypeAlias = npt.NDArray[np.int64]
Schedule: TypeAlias = Callable[[int, int], Counts]


def cosine(num_masked: int, num_steps: int) -> Counts:
    """Reveal few tokens at first and more and more later.

    Masked after step k of K (Chang et al. 2022, MaskGIT, arXiv 2202.04200, published code; MAR's
    published code has the same):

        m_k = max(1, min(m_{k-1} - 1, floor(N cos(πk/2K)))),     m_0 = N,  m_K = 0

    The floor is that of the exact number.  The cosine is rational only where it is 0, 1/2 or 1
    (Niven's theorem): at k = 2K/3, where floating point may miss 1/2 and lose a token, it is set.
    Elsewhere N cos(…) is no integer, and float64 finds its floor unless it lies within about
    N·2⁻⁵² of one; the tests hold every N and K up to 512 to 50-digit arithmetic.

    The max never acts, since cos(πx/2) >= 1 - x makes the floor at least K - k.  Counts rise
    from step to step but for one token of rounding.

    Parameters
    ----------
    num_masked, num_steps : int

    Returns
    -------
    int64 array [min(num_steps, num_masked)]

    Raises
    ------
    TypeError, ValueError
        ``num_masked`` is no integer in [0, 2³¹], or ``num_steps`` no integer >= 1.

    Examples
    --------
    >>> cosine(256, 8)
    array([ 5, 15, 24, 31, 39, 45, 48, 49])
    """
    num_steps = _effective_steps(num_masked, num_steps)
    step = np.arange(1, num_steps)
    cosines = np.cos(np.pi * step / (2 * num_steps))
    cosines[3 * step == 2 * num_steps] = 0.5
    bounds = np.floor(num_masked * cosines).astype(np.int64)
    # m_k + k = min(m_{k-1} + k - 1, bound_k + k): a running minimum, starting at N.
    masked = np.minimum(np.minimum.accumulate(bounds + step), num_masked) - step
    return _counts(num_masked, num_steps, masked)


def linear(num_masked: int, num_steps: int) -> Counts:
    """Reveal the same number in every step, but for rounding.

    Masked after step k of K: round((1 - k/K)·N), halves away from zero, in integer arithmetic.

    Parameters
    ----------
    num_masked, num_steps : int

    Returns
    -------
    int64 array [min(num_steps, num_masked)]

    Raises
    ------
    TypeError, ValueError
        ``num_masked`` is no integer in [0, 2³¹], or ``num_steps`` no integer >= 1.

    Examples
    --------
    >>> linear(10, 4)
    array([2, 3, 2, 3])
    """
    num_steps = _effective_steps(num_masked, num_steps)
    remaining = num_steps - np.arange(1, num_steps)
    masked = (2 * remaining * num_masked + num_steps) // max(2 * num_steps, 1)
    return _counts(num_masked, num_steps, masked)


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear}


def _effective_steps(num_masked: int, num_steps: int) -> int:
    num_masked = checks.integer("num_masked", num_masked, 0, 2**31)
    return min(checks.integer("num_steps", num_steps, 1), num_masked)


def _counts(num_masked: int, num_steps: int, masked: Counts) -> Counts:
    """Turn the numbers masked after steps 1 to K - 1 into the numbers revealed in each step."""
    if num_steps == 0:
        return np.zeros(0, np.int64)
    return -np.diff(masked, prepend=num_masked, append=0)
