"""Second question of a step: which masked positions come first?

| order | first come | source |
| --- | --- | --- |
| confidence | the largest p of the predicted token | MaskGIT (arXiv 2202.04200), LLaDA |
| margin | the largest p₍₁₎ - p₍₂₎, the two most probable ids | arXiv 2502.06768; Dream's code |
| entropy | the smallest -Σ p log p | Dream's code |
| random | positions drawn uniformly | MAR (arXiv 2406.11838), LLaDA's code |
| left-to-right | the lowest position | language models |
| halton | those that cover a square grid evenly | Halton-MaskGIT (arXiv 2503.17076) |

Page: docs/decoding.md.
"""

import numpy as np

from marref.decoding.grid import halton
from marref.decoding.rule import Rule
from marref.trees import Array


def score(log_probabilities: Array, log_confidence: Array, rule: Rule) -> Array:
    """Compute what positions are ordered by, the largest first.

    Confidence and margin are taken as logarithms: log (p₁ - p₂) = log p₁ + log1p(-p₂ / p₁).  The
    order is the same, and numbers that are almost 1 keep their digits; in float32 many would be 1
    exactly, ties, and decoding would run from left to right.

    Parameters
    ----------
    log_probabilities : array [positions, vocab_size]
        log p; -inf where an id is excluded.
    log_confidence : array [positions]
        That of the predicted token.
    rule : Rule

    Returns
    -------
    array [positions]
        Of order "margin" log (p₁ - p₂), of "entropy" Σ p log p, else the log-confidence.
    """
    if rule.order == "margin":
        second, first = np.partition(log_probabilities, -2, axis=1)[:, -2:].T
        with np.errstate(divide="ignore"):
            margin: Array = first + np.log1p(-np.exp(second - first))
        return margin
    if rule.order == "entropy":
        # 0 log 0 is 0, and 0 times the lowest number, too.
        finite = np.maximum(log_probabilities, np.finfo(log_probabilities.dtype).min)
        negative: Array = (np.exp(log_probabilities) * finite).sum(axis=1)
        return negative
    return log_confidence


def rank(score: Array, masked: Array, progress: Array, rule: Rule, noise: Array | None) -> Array:
    """Give every position the number by which it is revealed, the largest first.

    Parameters
    ----------
    score : array [batch, length]
    masked : bool array [batch, length]
        Where something may be revealed.
    progress : array [batch]
        k/K in step k of K.
    rule : Rule
    noise : float64 array [batch, length] or None
        See `draw_noise`.

    Returns
    -------
    float64 array [batch, length]
        The score; with a choice temperature c, c (1 - k/K) Gumbel noise more; with an order
        temperature T, score / T and Gumbel noise; in random order the noise; in an order of places
        their negative.  -inf where nothing may be revealed.
    """
    priority = score.astype(np.float64)
    if rule.choice_temperature > 0 and noise is not None:
        priority += rule.choice_temperature * (1.0 - progress)[:, np.newaxis] * noise
    elif rule.order_temperature > 0 and noise is not None:
        priority = _published(priority, rule) / rule.order_temperature + noise
    elif rule.order == "random" and noise is not None:
        priority = noise
    elif (places := places_of(rule.order, score.shape[1])) is not None:
        priority = np.broadcast_to(-places.astype(np.float64), score.shape)
    lowest = np.finfo(np.float64).min
    return np.where(masked, np.maximum(priority, lowest), -np.inf)


def draw_noise(masked: Array, rule: Rule, rng: np.random.Generator | None) -> Array | None:
    """Draw what `rank` needs: uniform numbers for a random order, Gumbel noise for a noisy one.

    Gumbel noise makes the largest of score / T + noise a draw from softmax(score / T), and the
    largest few a draw without replacement (Kool et al. 2019, arXiv 1903.06059).
    """
    if rng is not None and rule.order == "random":
        noise = np.full(masked.shape, np.nan)
        noise[masked] = rng.random(masked.sum())
        return noise
    if rng is not None and (rule.choice_temperature > 0 or rule.order_temperature > 0):
        return rng.gumbel(size=masked.shape)
    return None


def _published(score: Array, rule: Rule) -> Array:
    """Undo the logarithm of confidence and margin."""
    return score if rule.order == "entropy" else np.exp(score)


def choose(priority: Array, count: Array) -> Array:
    """Mark the ``count`` entries of highest priority in each row, of equals the lower position.

    Sorting gives the positions in order of priority; sorting these gives each position its place
    in that order: 0 for the first to be revealed.

    Parameters
    ----------
    priority : array [batch, length]
    count : integer array [batch]

    Returns
    -------
    bool array [batch, length]
    """
    order = np.argsort(-priority, axis=1, kind="stable")
    place = np.argsort(order, axis=1)
    chosen: Array = place < count[:, np.newaxis]
    return chosen


def places_of(order: str, length: int) -> Array | None:
    """Give each position its place in an order that does not look at predictions, else None."""
    if order == "left-to-right":
        return np.arange(length)
    if order == "halton":
        return np.argsort(halton(length))
    return None
