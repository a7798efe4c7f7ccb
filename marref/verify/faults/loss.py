"""Faults of the loss."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from marref import loss
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Patch, replace

_Weights = Callable[[Array], Array]


def _log_softmax(logits: Array) -> Array:
    """Compute log softmax over the last axis, for any shape."""
    rows = loss.log_softmax(logits.reshape(-1, logits.shape[-1]))
    return rows.reshape(logits.shape)


def _patches(forward: Any, backward: Any) -> tuple[Patch, ...]:
    return (
        replace(loss, "forward", forward),
        replace(loss, "backward", backward),
    )


def _weighted(
    weights_of: _Weights,
    *,
    smoothing: float = 0.0,
    shift: int = 0,
) -> tuple[Patch, ...]:
    """Compute L = -Σ_i w_i Σ_k q_ik log p_ik,   dz_i = w_i (p_i - q_i).

    w = weights_of(mask) and q = (1 - smoothing) onehot(target) + smoothing / vocab_size.  With
    ``shift``, the target of position i is that of position i + shift, around the end.
    """

    def forward(logits: Array, targets: Array, mask: Array) -> tuple[Any, Tree]:
        logits, targets = np.asarray(logits), np.asarray(targets)
        weights = weights_of(np.asarray(mask).astype(logits.real.dtype))[..., np.newaxis]
        wanted = np.full(logits.shape, smoothing / logits.shape[-1], logits.real.dtype)
        ids = np.roll(targets, -shift, axis=-1)[..., np.newaxis]
        np.put_along_axis(wanted, ids, wanted[0, 0, 0] + 1.0 - smoothing, axis=-1)
        log_probabilities = _log_softmax(logits)
        cache = {
            "weights": weights,
            "wanted": wanted,
            "log_probabilities": log_probabilities,
        }
        return -(weights * wanted * log_probabilities).sum(), cache

    def backward(cache: Tree) -> Array:
        dlogits: Array = cache["weights"] * (np.exp(cache["log_probabilities"]) - cache["wanted"])
        return dlogits

    return _patches(forward, backward)


def _masked_mean(mask: Array) -> Array:
    """Compute w = mask/|M|: as it should be."""
    weights: Array = mask / max(mask.sum(), 1.0)
    return weights


def _all(mask: Array) -> Array:
    """Compute w = 1/(batch·length)."""
    return np.full_like(mask, 1.0 / mask.size)


def _unmasked(mask: Array) -> Array:
    """Compute w = (1 - mask) / Σ (1 - mask)."""
    return _masked_mean(1.0 - mask)


def _sum(mask: Array) -> Array:
    """Compute w = mask."""
    return mask


def _over_size(mask: Array) -> Array:
    """Compute w = mask/(batch·length)."""
    return mask / mask.size


def _by_sequence(mask: Array) -> Array:
    """Compute w = mask/(batch·|M of the sequence|)."""
    count = np.maximum(mask.sum(axis=-1, keepdims=True), 1.0)
    weights: Array = mask / (count * mask.shape[0])
    return weights


def _count_plus(mask: Array) -> Array:
    """Compute w = mask/(|M| + 1e-8)."""
    weights: Array = mask / (mask.sum() + 1e-8)
    return weights


def _bits(mask: Array) -> Array:
    """Compute w = mask/(|M| ln 2)."""
    return _masked_mean(mask) / math.log(2)


def _twice_forward(logits: Array, targets: Array, mask: Array) -> tuple[Any, Tree]:
    """Compute L = -(1/|M|) Σ log softmax(p)[y],   p = softmax(z)."""
    logits, targets = np.asarray(logits), np.asarray(targets)
    weights = _masked_mean(np.asarray(mask).astype(logits.real.dtype))[..., np.newaxis]
    probabilities = np.exp(_log_softmax(logits))
    log_probabilities = _log_softmax(probabilities)
    wanted = np.zeros(logits.shape, logits.real.dtype)
    np.put_along_axis(wanted, targets[..., np.newaxis], 1.0, axis=-1)
    cache = {
        "probabilities": probabilities,
        "dprobabilities": weights * (np.exp(log_probabilities) - wanted),
    }
    return -(weights * wanted * log_probabilities).sum(), cache


def _twice_backward(cache: Tree) -> Array:
    """dz_k = p_k (dp_k - Σ_j p_j dp_j)."""
    probabilities, dprobabilities = cache["probabilities"], cache["dprobabilities"]
    mean = (probabilities * dprobabilities).sum(axis=-1, keepdims=True)
    dlogits: Array = probabilities * (dprobabilities - mean)
    return dlogits


FAULTS = (
    Fault(
        "loss-over-all-positions",
        "The mean runs over all positions, masked or not, as in Halton-MaskGIT. The model sees "
        "the unmasked targets in its input, so the loss looks good and teaches little.",
        _weighted(_all),
    ),
    Fault(
        "loss-over-unmasked-positions",
        "The mask is taken the other way round, with 1 for what is visible. The loss soon falls "
        "to 0 and the decoder produces noise; gradients are 0 at the masked positions.",
        _weighted(_unmasked),
    ),
    Fault(
        "loss-summed",
        "The sum over the masked positions, not their mean (reduction='sum'). Loss and gradients "
        "are larger by the number of masked positions.",
        _weighted(_sum),
    ),
    Fault(
        "loss-over-batch-times-length",
        "The sum over the masked positions is divided by batch·length, masked or not, as LLaDA "
        "does after weighting with 1/p: the mean of a product with the mask. Loss and gradients "
        "are smaller by the mask ratio.",
        _weighted(_over_size),
    ),
    Fault(
        "loss-averaged-by-sequence",
        "A mean over each sequence and then over the batch, as in MaskGIT: a masked position of "
        "a sequence with few of them weighs more. Batches whose sequences have equally many "
        "hide it.",
        _weighted(_by_sequence),
    ),
    Fault(
        "loss-count-plus-1e-8",
        "The sum is divided by |M| + 1e-8, Edifice's guard against an empty mask. A relative "
        "difference of 1e-8/|M|: nothing in float32.",
        _weighted(_count_plus),
    ),
    Fault(
        "loss-base-2",
        "Bits instead of nats. Loss and gradients are larger by 1/ln 2 = 1.4427.",
        _weighted(_bits),
    ),
    Fault(
        "loss-label-smoothing",
        "A tenth of the target's probability is spread over all ids: label smoothing 0.1, as in "
        "MaskGIT. The loss is larger, and cannot fall to 0.",
        _weighted(_masked_mean, smoothing=0.1),
    ),
    Fault(
        "loss-targets-shifted",
        "The target of a position is its right neighbour's, a habit from language models. The "
        "loss stays near that of guessing, since the model is asked for what it must not see.",
        _weighted(_masked_mean, shift=1),
    ),
    Fault(
        "loss-softmax-twice",
        "Probabilities are handed to a loss that takes logits, and so pass through softmax "
        "twice. The loss is near log(vocab_size) and cannot fall below that by more than 1; "
        "gradients are small.",
        _patches(_twice_forward, _twice_backward),
    ),
)
