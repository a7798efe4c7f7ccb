"""How good generated pictures are: does a classifier see what was asked for, and are they diverse?

A classifier alone is satisfied by one perfect digit, a hundred times.  The two-sample statistic
alone does not say what is wrong.
"""

from typing import NamedTuple

import numpy as np

from marref.trees import Array

NUM_PERMUTATIONS = 500


def nearest_neighbour_classes(images: Array, examples: Array, labels: Array) -> Array:
    """Classify every image as the example nearest to it, by Euclidean distance.

    Parameters
    ----------
    images : array [n, pixels]
    examples : array [m, pixels]
    labels : int64 array [m]
        The classes of the examples.

    Returns
    -------
    int64 array [n]
    """
    nearest: Array = labels[_squared_distances(images, examples).argmin(axis=1)]
    return nearest


class TwoSamples(NamedTuple):
    """Whether two samples may come from one distribution.

    Parameters
    ----------
    statistic : float
        Unbiased: 0 on average if they do, and then of either sign.
    noise : float
        Its standard deviation if they do.
    """

    statistic: float
    noise: float


def two_samples(x: Array, y: Array, rng: np.random.Generator) -> TwoSamples:
    """Estimate the squared maximum mean discrepancy of two samples.

    MMD² = E k(x, x') - 2 E k(x, y) + E k(y, y') is 0 only if both have the same distribution.  The
    estimate leaves out the pairs of a sample with itself, and so is unbiased (Gretton et al. 2012,
    JMLR 13, equation 3); k(a, b) = exp(-|a - b|²/h) with h the median of the squared distances in
    both samples together (ibid., section 8).  The noise is found by dealing both samples out anew,
    `NUM_PERMUTATIONS` times.

    Parameters
    ----------
    x : array [n, pixels]
    y : array [m, pixels]
    rng : numpy.random.Generator
        Deals.

    Returns
    -------
    TwoSamples
    """
    both = np.concatenate([x, y])
    distances = _squared_distances(both, both)
    kernel = np.exp(-distances / np.median(distances[np.triu_indices(len(both), 1)]))
    np.fill_diagonal(kernel, 0.0)

    n, m = len(x), len(y)
    in_first = np.zeros((1 + NUM_PERMUTATIONS, n + m))
    in_first[0, :n] = 1.0
    for row in in_first[1:]:
        row[rng.permutation(n + m)[:n]] = 1.0
    in_second = 1.0 - in_first
    from_first, from_second = in_first @ kernel, in_second @ kernel
    statistics = (
        (from_first * in_first).sum(axis=1) / (n * (n - 1))
        + (from_second * in_second).sum(axis=1) / (m * (m - 1))
        - 2.0 * (from_first * in_second).sum(axis=1) / (n * m)
    )
    return TwoSamples(float(statistics[0]), float(np.std(statistics[1:])))


def _squared_distances(a: Array, b: Array) -> Array:
    """Compute |a - b|² of every pair [n, m], exact for integers."""
    a, b = (x.astype(np.float64) for x in (a, b))
    squared: Array = (a * a).sum(axis=1)[:, np.newaxis] - 2.0 * a @ b.T + (b * b).sum(axis=1)
    return squared
