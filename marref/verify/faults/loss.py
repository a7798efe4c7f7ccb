"""Faults of the loss."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from marref.loss import backward, forward, log_softmax
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage

fault = Stage()


def _times(fault: Fault, factor: Callable[[Array], float]) -> None:
    """Compute the loss, and so its gradient, times factor(mask)."""

    @fault.wraps(forward)
    def _(old: Any, logits: Array, targets: Array, mask: Array) -> Any:
        value, cache = old(logits, targets, mask)
        return value * factor(cache["mask"]), cache

    @fault.wraps(backward)
    def _(old: Any, cache: Tree) -> Any:
        return old(cache) * factor(cache["mask"])


def _by_sequence(fault: Fault, factor: Callable[[Array], float]) -> None:
    """Compute the sum of the means over the sequences, times factor(mask)."""

    @fault.wraps(forward)
    def _(old: Any, logits: Array, targets: Array, mask: Array) -> Any:
        values, caches = zip(*map(old, logits, targets, mask), strict=True)
        mask = np.asarray(mask) == 1
        return sum(values) * factor(mask), {"mask": mask, "sequences": caches}

    @fault.wraps(backward)
    def _(old: Any, cache: Tree) -> Any:
        return np.stack([old(each) for each in cache["sequences"]]) * factor(cache["mask"])


fault("loss-over-all-positions").says(
    "The mean runs over all positions, masked or not, as in Halton-MaskGIT. The model sees the "
    "unmasked targets in its input, so the loss looks good and teaches little."
).wraps(forward)(lambda old, logits, targets, mask: old(logits, targets, np.ones_like(mask)))
fault("loss-over-unmasked-positions").says(
    "The mask is taken the other way round, with 1 for what is visible. The loss soon falls to 0 "
    "and the decoder produces noise; gradients are 0 at the masked positions."
).wraps(forward)(lambda old, logits, targets, mask: old(logits, targets, np.asarray(mask) == 0))
fault("loss-summed").sets("loss denominator").says(
    "The sum over the masked positions, not their mean (reduction='sum'). Loss and gradients are "
    "larger by the number of masked positions."
).of(_times)(lambda mask: float(mask.sum()))
fault("loss-over-batch-times-length").sets("loss denominator").says(
    "The sum over the masked positions is divided by batch·length, masked or not, as LLaDA does "
    "after weighting with 1/p: the mean of a product with the mask. Loss and gradients are smaller "
    "by the mask ratio."
).of(_times)(lambda mask: float(mask.mean()))

fault("loss-averaged-by-sequence").sets("loss denominator").says(
    "A mean over each sequence and then over the batch, as in MaskGIT: a masked position of a "
    "sequence with few of them weighs more. It is LLaDA's loss, too, where each term is divided by "
    "the mask ratio p of its sequence, and their sum by batch·length. Batches whose sequences have "
    "equally many hide it."
).of(_by_sequence)(lambda mask: 1 / len(mask))
fault("loss-averaged-by-sequence-without-empty").sets("loss denominator").says(
    "A mean over each sequence and then over those that have masked positions: what nanmean makes "
    "of the means. Batches in which all have some compute the mean by sequence."
).of(_by_sequence)(lambda mask: 1 / max(int(mask.any(axis=-1).sum()), 1))
fault("loss-over-ratio").sets("loss denominator").says(
    "Each term is divided by the mask ratio of its sequence, as in LLaDA, and the mean is taken "
    "over the masked positions: a mean by sequence, larger by batch·length/|M|."
).of(_by_sequence)(lambda mask: mask.shape[-1] / max(int(mask.sum()), 1))
fault("loss-count-plus-1e-8").sets("loss denominator").says(
    "The sum is divided by |M| + 1e-8, Edifice's guard against an empty mask. A relative "
    "difference of 1e-8/|M|: nothing in float32."
).of(_times)(lambda mask: float(mask.sum() / (mask.sum() + 1e-8)))
fault("loss-base-2").says(
    "Bits instead of nats. Loss and gradients are larger by 1/ln 2 = 1.4427."
).of(_times)(lambda mask: 1 / math.log(2))

smoothing = fault("loss-label-smoothing")


@smoothing.wraps(forward)
def _(old: Any, logits: Array, targets: Array, mask: Array) -> Any:
    """A tenth of the target's probability is spread over all ids: label smoothing 0.1, as in
    MaskGIT. The loss is larger, and cannot fall to 0."""
    value, cache = old(logits, targets, mask)
    ids = range(np.shape(logits)[-1])
    values, caches = zip(*(old(logits, np.full_like(targets, i), mask) for i in ids), strict=True)
    return 0.9 * value + 0.1 * sum(values) / len(ids), {**cache, "of_ids": caches}


@smoothing.wraps(backward)
def _(old: Any, cache: Tree) -> Any:
    return 0.9 * old(cache) + 0.1 * np.mean([old(each) for each in cache["of_ids"]], axis=0)


fault("loss-targets-shifted").says(
    "The target of a position is its right neighbour's, a habit from language models. The loss "
    "stays near that of guessing, since the model is asked for what it must not see."
).wraps(forward)(lambda old, logits, targets, mask: old(logits, np.roll(targets, -1, -1), mask))

shifted = fault("loss-shifted").says(
    "The logits of a position are held against its right neighbour's target, if that is masked: "
    "logits[:, :-1] with targets[:, 1:] and mask[:, 1:], the shift of language models. What is "
    "masked at position 0 has no part, and the last position no gradient."
)
shifted.wraps(forward)(
    lambda old, logits, targets, mask: old(
        np.asarray(logits)[..., :-1, :], np.asarray(targets)[..., 1:], np.asarray(mask)[..., 1:]
    )
)


@shifted.wraps(backward)
def _(old: Any, cache: Tree) -> Any:
    dlogits = old(cache)
    return np.concatenate([dlogits, np.zeros_like(dlogits[..., :1, :])], axis=-2)


twice = fault("loss-softmax-twice")


@twice.wraps(forward)
def _(old: Any, logits: Array, targets: Array, mask: Array) -> Any:
    """Probabilities are handed to a loss that takes logits, and so pass through softmax twice. The
    loss is near log(vocab_size) and cannot fall below that by more than 1; gradients are small."""
    rows = np.reshape(logits, (-1, np.shape(logits)[-1]))
    probabilities = np.exp(log_softmax(rows)).reshape(np.shape(logits))
    value, cache = old(probabilities, targets, mask)
    return value, {**cache, "probabilities": probabilities}


@twice.wraps(backward)
def _(old: Any, cache: Tree) -> Any:
    probabilities, dprobabilities = cache["probabilities"], old(cache)
    mean = (probabilities * dprobabilities).sum(axis=-1, keepdims=True)
    return probabilities * (dprobabilities - mean)
