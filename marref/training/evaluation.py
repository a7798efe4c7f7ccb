"""Evaluation: how many bits a model needs for a token, and the baseline beside it."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.loss import mar_loss
from marref.masking import mask_tokens
from marref.trees import Array


def bits_per_token(
    predict: Callable[[Array], Array],
    tokens: npt.ArrayLike,
    ratio: float,
    rng: np.random.Generator,
    *,
    mask_token_id: int = 0,
    batch_size: int = 256,
) -> float:
    """Mean cross-entropy at a fixed mask ratio, in bits per masked token.

    Parameters
    ----------
    predict : callable
        Masked tokens [batch, length] to logits [batch, length, vocab_size]; for a model,
        ``functools.partial(marref.fast.logits, model, params)``.
    tokens : integer array [num_sequences, length]
        Without ``mask_token_id``.
    ratio : float
        In [0, 1]; every sequence has the same number of masked positions.
    rng : numpy.random.Generator
        Draws the masks: the same seed gives the same masks.
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
    checks.integer("batch_size", batch_size, 1)
    checks.function("predict", predict)
    targets = checks.token_ids("tokens", tokens, np.iinfo(np.int64).max)
    if len(targets) == 0:
        raise ValueError(f"tokens: shape {list(targets.shape)}, expected at least one sequence")
    checks.no_mask_token("tokens", targets, mask_token_id)
    masked, mask = mask_tokens(targets, ratio, rng, mask_token_id)
    nats = 0.0
    for start in range(0, len(targets), batch_size):
        part = slice(start, start + batch_size)
        loss = mar_loss(predict(masked[part]), targets[part], mask[part])
        nats += float(loss.real) * int(mask[part].sum())
    return nats / (int(mask.sum()) * math.log(2))


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
