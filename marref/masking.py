"""Masking for training: how much of a sequence to mask, where, and whose class to hide.

A mask ratio is r = f(u) with u ~ U[0, 1), f its schedule.

| schedule             | f(u)               | density                      | mean  | median |
|----------------------|--------------------|------------------------------|-------|--------|
| ``one-minus-cosine`` | 1 - cos(πu/2)      | (2/π)/√(r(2-r))              | 0.363 | 0.293  |
| ``cosine``           | cos(πu/2)          | (2/π)/√(1-r²)                | 0.637 | 0.707  |
| ``arccos``           | (2/π) arccos(u)    | (π/2) sin(πr/2)              | 0.637 | 0.667  |
| ``uniform``          | u                  | 1                            | 0.5   | 0.5    |
| ``truncated-normal`` | N(1, 0.25²)        | 4φ(4(r-1))/(Φ(0)-Φ(-1.2))    | 0.867 | 0.874  |
|                      | cut to [0.7, 1]    | on [0.7, 1]                  |       |        |

``one-minus-cosine`` is MAR's specification: it favours *small* ratios.  ``cosine`` is its mirror
image and favours large ones (MaskGIT, Chang et al. 2022, arXiv 2202.04200, section 3.3);
``arccos`` is that of Besnier and Chen 2023 (arXiv 2310.14400); ``truncated-normal`` is that of
the MAR paper (Li et al. 2024, arXiv 2406.11838, published code).  Page: docs/masking.md.
"""

import math
from collections.abc import Callable
from typing import overload

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.trees import Array


def _truncated_normal(u: Array) -> Array:
    # scipy.stats takes longer to import than the rest of marref together.
    from scipy.stats import truncnorm

    mean, std, low, high = 1.0, 0.25, 0.7, 1.0
    ratio: Array = truncnorm.ppf(u, (low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    return ratio


def one_minus_cosine(u: Array) -> Array:
    """Compute 1 - cos(πu/2) = 2 sin²(πu/4), which does not cancel for small u."""
    ratio: Array = 2.0 * np.sin(math.pi / 4 * u) ** 2
    return ratio


SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "one-minus-cosine": one_minus_cosine,
    "cosine": lambda u: np.cos(math.pi / 2 * u),
    "arccos": lambda u: 2.0 / math.pi * np.arccos(u),
    "uniform": lambda u: u,
    "truncated-normal": _truncated_normal,
}


@overload
def sample_mask_ratio(
    rng: np.random.Generator | None = None, schedule: str = ..., *, size: None = None
) -> float: ...
@overload
def sample_mask_ratio(
    rng: np.random.Generator | None = None, schedule: str = ..., *, size: int
) -> npt.NDArray[np.float64]: ...
def sample_mask_ratio(
    rng: np.random.Generator | None = None,
    schedule: str = "one-minus-cosine",
    *,
    size: int | None = None,
) -> float | npt.NDArray[np.float64]:
    """Draw the fraction of a sequence to mask.

    Parameters
    ----------
    rng : numpy.random.Generator, optional
        Without one, a new one is seeded by the operating system.
    schedule : {"one-minus-cosine", "cosine", "arccos", "uniform", "truncated-normal"}
        See the table at the head of this module; the default is MAR's specification.
    size : int, optional
        Draw that many, for instance one for each sequence of a batch.

    Returns
    -------
    float, or float64 array [size]
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        ``rng`` is no generator, the schedule is unknown, or size is negative.
    """
    rng = np.random.default_rng() if rng is None else checks.generator("rng", rng)
    transform = SCHEDULES[checks.choice("schedule", schedule, SCHEDULES)]
    if size is None:
        return float(transform(np.asarray(rng.random())))
    return transform(rng.random(checks.integer("size", size, 0)))


def mask_tokens(
    tokens: npt.ArrayLike,
    ratio: npt.ArrayLike,
    rng: np.random.Generator,
    mask_token_id: int = 0,
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Replace a random part of every sequence by [MASK].

    Parameters
    ----------
    tokens : integer array [batch, length]
    ratio : float, or array [batch]
        The fraction to mask, in [0, 1]: one for all, or one for each sequence.
    rng : numpy.random.Generator
    mask_token_id : int
        The id of [MASK].

    Returns
    -------
    masked : integer array [batch, length]
        The tokens, with ``mask_token_id`` where masked.
    mask : boolean array [batch, length]
        True at exactly max(1, round(ratio·length)) positions of each sequence, chosen uniformly
        without replacement.  Halves round to even, as in NumPy, PyTorch and JAX.  At least one,
        because a sequence without a masked position teaches nothing.

    Raises
    ------
    TypeError, ValueError
        ``tokens`` are no integers of shape [batch, length], ``ratio`` does not fit them or lies
        outside [0, 1], ``rng`` is no generator, or ``mask_token_id`` is negative.
    """
    tokens = checks.token_ids("tokens", tokens, np.iinfo(np.int64).max)
    batch, length = tokens.shape
    if length == 0:
        raise ValueError(f"tokens: shape {list(tokens.shape)}, expected length >= 1")
    ratio = checks.array("ratio", ratio)
    if ratio.dtype.kind not in "iuf":
        raise TypeError(f"ratio: dtype {ratio.dtype}, expected real numbers")
    if ratio.shape not in ((), (batch,)):
        raise ValueError(f"ratio: shape {list(ratio.shape)}, expected a scalar or [{batch}]")
    if not ((ratio >= 0) & (ratio <= 1)).all():
        raise ValueError(f"ratio: received {ratio}, expected numbers in [0, 1]")
    checks.generator("rng", rng)
    highest_id = min(np.iinfo(tokens.dtype).max, np.iinfo(np.int64).max)
    mask_token_id = checks.integer("mask_token_id", mask_token_id, 0, int(highest_id))

    counts = np.maximum(1, np.rint(ratio * length))
    # Each row a random order of the positions: those that it sends below the count.
    order = rng.random((batch, length)).argsort(axis=1)
    mask = order < counts[..., np.newaxis]
    return np.where(mask, tokens.dtype.type(mask_token_id), tokens), mask


def drop_labels(
    labels: npt.ArrayLike, rate: float, rng: np.random.Generator, num_classes: int
) -> npt.NDArray[np.int64]:
    """Replace some labels by "no class", so that a model learns to do without.

    Parameters
    ----------
    labels : integer array [batch]
    rate : float
        The probability of each to be replaced, in [0, 1); 0.1 in Li et al. 2024 (arXiv
        2406.11838), of the 0.1 and 0.2 that Ho & Salimans 2022 (arXiv 2207.12598) found best.
    rng : numpy.random.Generator
    num_classes : int
        The label that stands for "no class".

    Returns
    -------
    int64 array [batch]

    Raises
    ------
    TypeError, ValueError
        Labels are no integers in [0, num_classes], or another argument is out of range.
    """
    num_classes = checks.integer("num_classes", num_classes, 1)
    labels = checks.labels("labels", labels, num_classes).astype(np.int64)
    checks.real("rate", rate, "[0, 1)")
    checks.generator("rng", rng)
    return np.where(rng.random(labels.shape) < rate, num_classes, labels)
