"""Reveal schedules: how many tokens the decoder reveals in each of its steps.

A schedule is a function ``(num_masked, num_steps) -> counts``.  With N = num_masked, ``counts`` are
at most min(num_steps, N) integers, each at least 1, with the sum N.

`cosine` and `linear` are MAR's; the others are published beside them.  Most are given by a function
γ, with γ(0) = 1 and γ(1) = 0, of which floor(N γ(k/K)) positions stay masked after step k of K:

| name | γ(r) | character | source |
| --- | --- | --- | --- |
| cosine | cos(πr/2) | few first, many last | MaskGIT, MAR |
| linear | 1 - r, rounded to the nearest | the same in each step | MAR's specification |
| uniform | 1 - r | the same in each step | MaskGIT's code, P2 |
| even | the larger counts first | the same in each step | LLaDA's code |
| square, cubic | 1 - r², 1 - r³ | few first | MaskGIT (section 4.4) |
| square-root | 1 - √r | many first | MaskGIT (section 4.4) |
| log | -log r / log N | many first | MaskGIT's code |
| exp | 1 - N^(r - 1) | few first | MaskGIT's code |
| arccos | arccos(r)·2/π, rounded up | few first | Halton-MaskGIT's code |
"""

import functools
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


def even(num_masked: int, num_steps: int) -> Counts:
    """Reveal floor(N/K) in every step, and one more in the first N mod K steps.

    LLaDA's published code (Nie et al. 2025, arXiv 2502.09992).

    Parameters
    ----------
    num_masked, num_steps : int

    Returns
    -------
    int64 array [min(num_steps, num_masked)]

    Raises
    ------
    TypeError, ValueError
        As `cosine` does.

    Examples
    --------
    >>> even(10, 4)
    array([3, 3, 2, 2])
    """
    num_steps = _effective_steps(num_masked, num_steps)
    share, more = divmod(num_masked, max(num_steps, 1))
    return share + (np.arange(num_steps) < more).astype(np.int64)


def falling(
    gamma: Callable[[npt.NDArray[np.float64], int], npt.NDArray[np.float64]],
    num_masked: int,
    num_steps: int,
) -> Counts:
    """Leave floor(N γ(k/K)) masked after step k, but reveal something in every step.

    MaskGIT's published code has m_k = max(1, min(m_{k-1} - 1, floor(N γ))).  Where γ falls so fast
    that one token is left for several steps, these would reveal nothing: they are not taken.

    The floor is that of the exact number: N γ is raised by N·2⁻⁴⁸ first, more than its error in
    float64, so that a whole number stays one.  The tests hold every N up to 256, with every K up to
    32 and each 16th beyond, to 50-digit arithmetic.

    Parameters
    ----------
    gamma : callable
        Of k/K for k = 1, …, K - 1 [K - 1], and of N, to numbers in [0, 1].
    num_masked, num_steps : int

    Returns
    -------
    int64 array [at most min(num_steps, num_masked)]

    Raises
    ------
    TypeError, ValueError
        As `cosine` does.
    """
    num_steps = _effective_steps(num_masked, num_steps)
    step = np.arange(1, num_steps)
    kept = gamma(step / max(num_steps, 1), num_masked) + 2.0**-48
    bounds = np.floor(num_masked * kept).astype(np.int64)
    masked = np.minimum(np.minimum.accumulate(bounds + step), num_masked) - step
    counts = _counts(num_masked, num_steps, np.maximum(masked, 1))
    return counts[counts > 0]


def arccos(num_masked: int, num_steps: int) -> Counts:
    """Reveal few tokens at first, and a third of them in the first half of the steps.

    Revealed after step k are max(k, floor(N (1 - arccos(k/K)·2/π))): Halton-MaskGIT's published
    code (Besnier et al. 2025, arXiv 2503.17076), whose floor is taken of what is revealed, not of
    what stays masked.  It is that of the exact number, see `falling`.

    Parameters
    ----------
    num_masked, num_steps : int

    Returns
    -------
    int64 array [min(num_steps, num_masked)]

    Raises
    ------
    TypeError, ValueError
        As `cosine` does.

    Examples
    --------
    >>> arccos(256, 8)
    array([20, 21, 21, 23, 25, 28, 35, 83])
    """
    num_steps = _effective_steps(num_masked, num_steps)
    step = np.arange(1, num_steps)
    share = 1.0 - np.arccos(step / max(num_steps, 1)) * (2.0 / np.pi) + 2.0**-48
    revealed = np.maximum(step, np.floor(num_masked * share).astype(np.int64))
    return _counts(num_masked, num_steps, num_masked - revealed)


SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "linear": linear,
    "uniform": functools.partial(falling, lambda r, n: 1.0 - r),
    "even": even,
    "square": functools.partial(falling, lambda r, n: 1.0 - r**2),
    "cubic": functools.partial(falling, lambda r, n: 1.0 - r**3),
    "square-root": functools.partial(falling, lambda r, n: 1.0 - np.sqrt(r)),
    "log": functools.partial(falling, lambda r, n: np.minimum(1.0, -np.log(r) / np.log(max(n, 2)))),
    "exp": functools.partial(falling, lambda r, n: 1.0 - n ** (r - 1.0)),
    "arccos": arccos,
}


def _effective_steps(num_masked: int, num_steps: int) -> int:
    num_masked = checks.integer("num_masked", num_masked, 0, 2**31)
    return min(checks.integer("num_steps", num_steps, 1), num_masked)


def _counts(num_masked: int, num_steps: int, masked: Counts) -> Counts:
    """Turn the numbers masked after steps 1 to K - 1 into the numbers revealed in each step."""
    if num_steps == 0:
        return np.zeros(0, np.int64)
    return -np.diff(masked, prepend=num_masked, append=0)
