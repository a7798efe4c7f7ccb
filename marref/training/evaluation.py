"""Evaluation: how many bits a model needs for a token, and the baseline beside it.

`bits_per_token` is the mean at a mask ratio, `masked_bits` the same with its standard error, and
`any_order_bits` bounds the likelihood of whole sequences.  Page: docs/training.md.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.loss import log_softmax, mar_loss
from marref.masking import mask_tokens
from marref.trees import Array

Predict: TypeAlias = Callable[..., Array]
"""Masked tokens [batch, length], and labels [batch] if there are any, to logits."""


def bits_per_token(
    predict: Predict,
    tokens: npt.ArrayLike,
    ratio: float,
    rng: np.random.Generator,
    *,
    labels: npt.ArrayLike | None = None,
    mask_token_id: int = 0,
    batch_size: int = 256,
) -> float:
    """Mean cross-entropy at a fixed mask ratio, in bits per masked token.

    Parameters
    ----------
    predict : callable
        Masked tokens [batch, length] to logits [batch, length, vocab_size]; for a model,
        ``functools.partial(marref.fast.logits, model, params)``.  With labels it takes those of
        the tokens' sequences too.
    tokens : integer array [num_sequences, length]
        Without ``mask_token_id``.
    ratio : float
        In [0, 1]; every sequence has the same number of masked positions.
    rng : numpy.random.Generator
        Draws the masks: the same seed gives the same masks.
    labels : integer array [num_sequences], optional
        The class of every sequence.
    mask_token_id : int
    batch_size : int
        How many sequences are predicted at once; the result does not depend on it.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        There are no sequences, or an argument is none of `marref.masking.mask_tokens`.
    """
    targets, labels = _checked(predict, tokens, labels, mask_token_id, batch_size)
    masked, mask = mask_tokens(targets, ratio, rng, mask_token_id)
    nats = 0.0
    for start in range(0, len(targets), batch_size):
        part = slice(start, start + batch_size)
        logits = _predicted(predict, masked, labels, part)
        loss = mar_loss(logits, targets[part], mask[part])
        nats += float(loss.real) * int(mask[part].sum())
    return nats / (int(mask.sum()) * math.log(2))


class Estimate(NamedTuple):
    """A mean over sequences.

    Parameters
    ----------
    bits : float
    standard_error : float
        The sequences' standard deviation (n - 1) over √n; NaN of a single one.
    """

    bits: float
    standard_error: float


def masked_bits(
    predict: Predict,
    tokens: npt.ArrayLike,
    ratio: float,
    rng: np.random.Generator,
    *,
    labels: npt.ArrayLike | None = None,
    mask_token_id: int = 0,
    batch_size: int = 256,
) -> Estimate:
    """Mean cross-entropy at a fixed mask ratio, in bits per masked token, with its error.

    Parameters
    ----------
    predict, tokens, ratio, rng, labels, mask_token_id, batch_size
        As in `bits_per_token`, whose result this is, up to rounding.

    Returns
    -------
    Estimate

    Raises
    ------
    TypeError, ValueError
        As `bits_per_token`.
    """
    targets, labels = _checked(predict, tokens, labels, mask_token_id, batch_size)
    _, mask = mask_tokens(targets, ratio, rng, mask_token_id)
    return _estimate(bits_behind(predict, targets, mask, labels, mask_token_id, batch_size))


def any_order_bits(
    predict: Predict,
    tokens: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    num_orders: int = 1,
    labels: npt.ArrayLike | None = None,
    mask_token_id: int = 0,
    batch_size: int = 256,
) -> Estimate:
    """Estimate the bound on the likelihood of sequences, in bits per token.

    A model of masked tokens generates in any order o of the L positions, token by token.  With a
    random order, by Jensen's inequality (Uria et al. 2014, arXiv 1310.1757; Hoogeboom et al.
    2022, arXiv 2110.02037, equation 8),

        log p(x) ≥ E_o Σ_{i=1..L} log p(x_{o_i} | x_{o_<i})

    Before place i of the order t = L - i + 1 positions are masked, a uniformly random set S of
    that size, and o_i is any of them with equal probability.  So the right side is

        L · E_t E_S (1/t) Σ_{j∈S} log p(x_j | x outside S)        t uniform in 1..L

    One draw of t and S for a sequence estimates it without bias.

    Parameters
    ----------
    predict, tokens, labels, mask_token_id, batch_size
        As in `bits_per_token`.
    rng : numpy.random.Generator
    num_orders : int
        How many draws of t and S each sequence has.

    Returns
    -------
    Estimate
        Of -1/L of the bound, over log 2: sequences cost at most that many bits for each token.
        The error is that over sequences, the draws included.

    Raises
    ------
    TypeError, ValueError
        As `bits_per_token`.
    """
    targets, labels = _checked(predict, tokens, labels, mask_token_id, batch_size)
    checks.generator("rng", rng)
    bits = np.zeros(len(targets))
    for _ in range(checks.integer("num_orders", num_orders, 1)):
        order = rng.random(targets.shape).argsort(axis=1)
        masked = rng.integers(1, targets.shape[1], size=(len(targets), 1), endpoint=True)
        mask = order < masked
        bits += bits_behind(predict, targets, mask, labels, mask_token_id, batch_size)
    return _estimate(bits / num_orders)


def bits_behind(
    predict: Predict,
    targets: Array,
    mask: Array,
    labels: Array | None = None,
    mask_token_id: int = 0,
    batch_size: int = 256,
) -> npt.NDArray[np.float64]:
    """Compute each sequence's mean cross-entropy behind a mask, in bits per masked token.

    Parameters
    ----------
    predict : callable
        As in `bits_per_token`.
    targets : integer array [num_sequences, length]
    mask : bool array [num_sequences, length]
        With at least one True in each row.
    labels : integer array [num_sequences], optional
    mask_token_id, batch_size : int

    Returns
    -------
    float64 array [num_sequences]
    """
    inputs = np.where(mask, mask_token_id, targets)
    sums = np.zeros(mask.shape)
    for start in range(0, len(targets), batch_size):
        part = slice(start, start + batch_size)
        logits = _predicted(predict, inputs, labels, part)[mask[part]]
        ids = targets[part][mask[part]]
        checks.finite("logits", logits)
        sums[part][mask[part]] = -log_softmax(logits)[np.arange(len(ids)), ids]
    bits: npt.NDArray[np.float64] = sums.sum(axis=1) / (mask.sum(axis=1) * math.log(2))
    return bits


def position_log_frequencies(tokens: npt.ArrayLike, vocab_size: int) -> npt.NDArray[np.float64]:
    """Logarithm of how often each id occurs at each position: the baseline of a model.

    Every count starts at 1 (Laplace), so that no id is impossible.

    Parameters
    ----------
    tokens : integer array [num_sequences, length]
    vocab_size : int

    Returns
    -------
    float64 array [length, vocab_size]
    """
    checks.integer("vocab_size", vocab_size, 2)
    tokens = checks.token_ids("tokens", tokens, vocab_size)
    counts = 1.0 + (tokens[:, :, np.newaxis] == np.arange(vocab_size)).sum(axis=0)
    log_frequencies: npt.NDArray[np.float64] = np.log(counts / counts.sum(axis=1, keepdims=True))
    return log_frequencies


def _checked(
    predict: Predict,
    tokens: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    mask_token_id: int,
    batch_size: int,
) -> tuple[Array, Array | None]:
    """Check what all measurements are given; return the tokens and the labels."""
    checks.integer("batch_size", batch_size, 1)
    checks.function("predict", predict)
    targets = checks.token_ids("tokens", tokens, np.iinfo(np.int64).max)
    if targets.size == 0:
        raise ValueError(f"tokens: shape {list(targets.shape)}, expected at least one sequence")
    checks.no_mask_token("tokens", targets, mask_token_id)
    if labels is not None:
        labels = checks.labels("labels", labels, np.iinfo(np.int64).max)
        checks.shape("labels", labels, (len(targets),))
    return targets, labels


def _predicted(predict: Predict, inputs: Array, labels: Array | None, part: slice) -> Array:
    return predict(inputs[part]) if labels is None else predict(inputs[part], labels[part])


def _estimate(bits: Array) -> Estimate:
    count = len(bits)
    error = float(bits.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(bits.mean()), error)
