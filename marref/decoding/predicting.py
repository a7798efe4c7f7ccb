"""First question of a step: what would each masked position be, and how sure is the model?

With z the logits of a position, the ids that are excluded at -inf, and T the temperature:

    p = softmax(z / T)
    token = arg max z, or drawn from what `keep` keeps of p

Page: docs/decoding.md.
"""

from typing import NamedTuple

import numpy as np

from marref import checks
from marref.decoding import ordering
from marref.decoding.rule import Rule
from marref.loss import log_softmax
from marref.trees import Array


class Prediction(NamedTuple):
    """What is predicted at some positions, each array [positions]."""

    tokens: Array
    log_confidence: Array
    score: Array
    """By which positions are ordered, see `marref.decoding.ordering.score`."""


def predict(
    logits: Array, rule: Rule, uniforms: Array | None, held: Array | None = None
) -> Prediction:
    """Predict a token from each row of logits, with the logarithm of its confidence.

    The token is the arg max or, given a number u uniform in [0, 1) for each row, the first id
    whose cumulative probability, of what `keep` keeps, is above u.  Two tokens that are so sure
    that both confidences round to 1 still differ in the logarithm.

    Parameters
    ----------
    logits : array [positions, vocab_size]
    rule : Rule
    uniforms : float64 array [positions] or None
    held : integer array [positions], optional
        The ids that are there now, where ``rule.remask`` looks at them again.

    Returns
    -------
    Prediction
    """
    checks.finite("logits", logits)
    if rule.excluded:
        logits = logits.copy()
        logits[:, rule.excluded] = -np.inf
    # Less the maximum first, so that a division by a small temperature overflows downwards only.
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = log_softmax(over_temperature(shifted, rule.temperature or 1.0))
    tokens = largest = logits.argmax(axis=1)
    if uniforms is not None and rule.temperature > 0:
        kept = keep(logits, np.exp(log_probabilities), rule)
        cumulative = np.cumsum(kept, axis=1, dtype=np.float64)
        bound = uniforms * cumulative[:, -1]
        tokens = (cumulative <= bound[:, np.newaxis]).sum(axis=1)
    if held is not None and rule.remask is not None and rule.remask.looks_again:
        is_held = held != rule.mask_token_id
        tokens = np.where(is_held, rule.remask.looked_at(held, largest), tokens)
    if rule.score_temperature not in (None, rule.temperature or 1.0):
        log_probabilities = log_softmax(over_temperature(shifted, rule.score_temperature))
    log_confidence = log_probabilities[np.arange(len(tokens)), tokens]
    return Prediction(
        tokens, log_confidence, ordering.score(log_probabilities, log_confidence, rule)
    )


def keep(logits: Array, probabilities: Array, rule: Rule) -> Array:
    """Set to 0 the probabilities of the ids that top_k, top_p or min_p does not keep.

    The first two look at the ids in order of falling logits, the lower of equals first, and keep
    the first of them: top_k so many, top_p those before which the sum is not yet p.  min_p keeps
    the ids that are at least min_p times as probable as the most probable one.

    Parameters
    ----------
    logits, probabilities : arrays [positions, vocab_size]
    rule : Rule

    Returns
    -------
    array [positions, vocab_size]
        Not normalised: what is drawn from it is, by its sum.
    """
    kept = probabilities
    if rule.top_k is not None or rule.top_p is not None:
        order = np.argsort(-logits, axis=1, kind="stable")
        falling = np.take_along_axis(probabilities, order, axis=1)
        if rule.top_p is not None:
            sums = np.cumsum(falling, axis=1, dtype=np.float64)
            # In float32 the sum of all is not 1 exactly.
            falling[:, 1:][sums[:, :-1] >= rule.top_p * sums[:, -1:]] = 0.0
        if rule.top_k is not None:
            falling[:, rule.top_k :] = 0.0
        kept = np.empty_like(falling)
        np.put_along_axis(kept, order, falling, axis=1)
    if rule.min_p is not None:
        bound = rule.min_p * probabilities.max(axis=1, keepdims=True)
        kept = np.where(probabilities >= bound, kept, 0.0)
    return kept


def over_temperature(z: Array, temperature: float) -> Array:
    """Compute z/T, with the nearest T that the dtype has: 0 and infinity would give NaN."""
    if temperature == 1.0:
        return z
    limits = np.finfo(z.dtype)
    with np.errstate(over="ignore"):
        scaled: Array = z / float(np.clip(temperature, limits.tiny, limits.max))
    return scaled


def guide(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """Compute u + s (c - u): from no class towards the class, and beyond it with s > 1.

    Softmax of it is proportional to p(token) (p(token | class) / p(token))^s: since the ratio is
    p(class | token) up to a factor, by Bayes, this sharpens how sure a classifier would be.

    Parameters
    ----------
    conditional, unconditional : arrays [positions, vocab_size]
        Logits c and u.
    scale : array [positions]

    Returns
    -------
    array [positions, vocab_size]
    """
    scale = scale.astype(conditional.dtype)[:, np.newaxis]
    guided: Array = unconditional + scale * (conditional - unconditional)
    return guided


def scale_at(known: Array, rule: Rule) -> Array:
    """Compute the guidance scale of a step.

    Parameters
    ----------
    known : array [batch]
        The fraction of each sequence that is known after the step.
    rule : Rule

    Returns
    -------
    array [batch]
        s, or with linear guidance 1 + (s - 1) r.
    """
    if rule.guidance == "constant":
        return np.full_like(known, rule.guidance_scale)
    scale: Array = 1.0 + (rule.guidance_scale - 1.0) * known
    return scale
