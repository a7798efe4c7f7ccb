"""Faults of models with classes: the vector that is added, and guidance."""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref import decoding
from marref.layers import class_embedding
from marref.loss import log_softmax
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage
from marref.verify.faults.feed_forward import with_params

fault = Stage()
guidance_fault = Stage()


def _guided(fault: Fault, guided: Callable[[Array, Array, Array], Array]) -> None:
    """Compute the logits guided(c, u, s) in the place of u + s (c - u)."""

    @fault.sets("guidance").replaces(decoding.guide)
    def _(conditional: Array, unconditional: Array, scale: Array) -> Array:
        scale = scale.astype(conditional.dtype)[:, np.newaxis]
        return guided(conditional, unconditional, scale)


def _scaled(fault: Fault, scale_at: Callable[[Array, float], Array]) -> None:
    """Compute the scale of a step from what is known after it and s, where guidance is linear."""

    @fault.sets("guidance scale").wraps(decoding.scale_at)
    def _(old: Any, known: Array, rule: decoding.Rule) -> Array:
        if rule.guidance != "linear":
            scale: Array = old(known, rule)
            return scale
        return scale_at(known, rule.guidance_scale)


def _last_row_zero(params: Tree) -> Tree:
    table = params["table"].copy()
    table[-1] = 0.0
    return {"table": table}


first_only = fault("class-first-position-only")


@first_only.wraps(class_embedding.forward)
def _(old: Any, params: Tree, x: Array, labels: Array) -> Any:
    """The class's vector is added at the first position only, as if it were a token of its own.
    What is added is right; the first norm of the first block differs at every other position, and
    attention has to carry the class there."""
    _, cache = old(params, x, labels)
    y = x.copy()
    y[:, 0] += cache["output"]
    return y, cache


@first_only.wraps(class_embedding.backward)
def _(old: Any, params: Tree, dy: Array, cache: Tree) -> Any:
    return dy, old(params, dy[:, :1], cache)[1]


fault("class-added-twice").says(
    "The class's vector is added twice, by the embedding and by the model around it. Everything "
    "after the embedding is off, in every sequence."
).of(with_params, class_embedding)(lambda params: {"table": 2.0 * params["table"]})


@fault("class-ignored").wraps(class_embedding.forward)
def _(old: Any, params: Tree, x: Array, labels: Array) -> Any:
    """All sequences have the row of no class: labels do not arrive, or all are dropped. Logits do
    not depend on the labels, which is seen by changing one; guidance changes nothing."""
    return old(params, x, np.full_like(labels, len(params["table"]) - 1))


fault("class-none-first").says(
    "No class is row 0 of the table and class c row c + 1, where marref has no class last. Every "
    "sequence has another class's vector; the table is right but for the order of its rows."
).of(
    with_params, class_embedding, back=lambda grads: {"table": np.roll(grads["table"], 1, axis=0)}
)(lambda params: {"table": np.roll(params["table"], -1, axis=0)})
fault("class-none-zero").says(
    "Sequences of no class have no vector added, instead of the learned one. Those with a class "
    "are right; the last row of the table has no gradient, and guidance moves away from what was "
    "never trained."
).of(with_params, class_embedding)(_last_row_zero)

guidance_fault("guidance-from-conditional").says(
    "Logits are c + s(c - u) instead of u + s(c - u): the weight w of Ho & Salimans 2022, "
    "(1 + w)c - w u, in which plain conditional generation is w = 0 and not s = 1. Guidance is "
    "stronger by 1 than asked for."
).of(_guided)(lambda c, u, s: c + s * (c - u))
guidance_fault("guidance-swapped").says(
    "Logits are c + s(u - c): the logits of the class and those of no class are exchanged. The "
    "larger the scale, the further from the class."
).of(_guided)(lambda c, u, s: c + s * (u - c))


@guidance_fault("guidance-on-probabilities").of(_guided)
def _(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """Probabilities are combined, u + s(c - u), instead of logits, and what is negative is cut off
    at almost 0. Where a token is sure with the class and without, guidance changes nothing; at
    scales above 1 many tokens become impossible."""
    of_class, of_none = (np.exp(log_softmax(logits)) for logits in (conditional, unconditional))
    mixed = of_none + scale * (of_class - of_none)
    logits: Array = np.log(np.maximum(mixed, np.finfo(mixed.dtype).tiny))
    return logits


guidance_fault("guidance-linear-from-zero").says(
    "The linear scale grows from 0 to s, s·r, instead of from 1, 1 + (s - 1)r: the first steps "
    "hardly know the class. Constant guidance is right."
).of(_scaled)(lambda known, s: s * known)
guidance_fault("guidance-linear-constant").says(
    "The scale is s in every step where a linear one is asked for. Early steps are guided too "
    "strongly; constant guidance is right."
).of(_scaled)(lambda known, s: np.full_like(known, s))
