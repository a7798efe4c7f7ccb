"""Faults of the embedding, tokens and positions, and of the head."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from marref.layers import embedding
from marref.model import MAR, head_backward, head_forward
from marref.positions import sinusoidal_table
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage
from marref.verify.faults.feed_forward import with_params

fault = Stage()


def mask_row_zero(params: Tree) -> Tree:
    """Put zeros in the row of id 0."""
    return {"table": np.concatenate([np.zeros_like(params["table"][:1]), params["table"][1:]])}


def _positions(fault: Fault, table: Callable[..., Array]) -> None:
    """Compute P = table(old, length, embed_dim, positions), old being the right table."""

    @fault.wraps(sinusoidal_table)
    def _(old: Any, length: int, embed_dim: int, positions: str = "concatenated") -> Array:
        return table(old, length, embed_dim, positions)


def _waves(length: int, exponent: Array, positions: str) -> Array:
    """Sin and cos of p · 10000^(-exponent_i), of either kind."""
    angle = np.arange(length)[:, np.newaxis] * 10000.0**-exponent
    axis = 1 if positions == "concatenated" else 2
    return np.stack([np.sin(angle), np.cos(angle)], axis).reshape(length, 2 * len(exponent))


fault("embedding-times-root-embed-dim").says(
    "Token vectors are multiplied by √embed_dim before the positions are added, as in Vaswani et "
    "al. 2017, section 3.4, and in many transformers after it; MAR adds them as they are. The "
    "embedding differs at every feature, and tokens drown the positions."
).of(with_params, embedding)(
    lambda params: {"table": params["table"] * math.sqrt(params["table"].shape[1])}
)


@fault("embedding-fixed-ramp").of(with_params, embedding, constant="table")
def _(params: Tree) -> Tree:
    """Row v of the table is (v·embed_dim + i)/√embed_dim at feature i and is never trained:
    Edifice's MAR. Rows differ by a constant over the features, which every layer norm takes away,
    so that the logits do not depend on the tokens: one can see it by changing a token."""
    table = params["table"]
    ramp = np.arange(table.size).reshape(table.shape) / math.sqrt(table.shape[1])
    return {"table": ramp.astype(table.dtype)}


fault("embedding-ids-off-by-one").says(
    "Id v has the row of v - 1, and [MASK], id 0, the last, which index -1 means: ids are counted "
    "with [MASK] last and the table's rows with [MASK] first. The embedding differs at every "
    "token."
).of(with_params, embedding, back=lambda grads: {"table": np.roll(grads["table"], -1, axis=0)})(
    lambda params: {"table": np.roll(params["table"], 1, axis=0)}
)
fault("embedding-mask-row-zero").says(
    "The vector of [MASK] is zero and stays so, id 0 being taken for padding. The embedding "
    "differs at masked positions and nowhere else."
).of(with_params, embedding)(mask_row_zero)
fault("positions-interleaved").says(
    "Sines and cosines alternate, with w_i = 10000^(-2i/embed_dim): the formula of Vaswani et al. "
    "2017. MAR's default has all sines first, as in tensor2tensor's code. The embedding differs "
    "from position 0 on, where sines are 0 and cosines 1."
).of(_positions)(lambda old, n, dim, kind: old(n, dim, "interleaved"))
fault("positions-concatenated").says(
    "All sines, then all cosines, with w_i = 10000^(-i/(half - 1)), in a model that asks for the "
    "interleaved layout. The embedding differs from position 0 on."
).of(_positions)(lambda old, n, dim, kind: old(n, dim, "concatenated"))
fault("positions-from-one").says(
    "Positions are counted from 1: every token gets the vector of its right neighbour's place. The "
    "embedding at position p holds the waves of p + 1."
).of(_positions)(lambda old, n, dim, kind: old(n + 1, dim, kind)[1:])


@fault("positions-other-denominator").of(_positions)
def _(old: Any, length: int, dim: int, positions: str) -> Array:
    """The denominator of the frequencies' exponent is that of the other convention: half instead of
    half - 1 (concatenated), or half - 1 instead of half (interleaved). The first frequency and
    position 0 are right; the others are off by more and more."""
    half = dim // 2
    denominator = half if positions == "concatenated" else max(half - 1, 1)
    return _waves(length, np.arange(half) / denominator, positions)


fault("positions-exponent-without-two").says(
    "w_i = 10000^(-i/embed_dim), i counting the pairs of sine and cosine: the 2 of Vaswani's 2i is "
    "lost, and the waves span half the scales. The first frequency and position 0 are right."
).of(_positions)(lambda old, n, dim, kind: _waves(n, np.arange(dim // 2) / dim, kind))


@fault("positions-cosine-first").of(_positions)
def _(old: Any, length: int, dim: int, positions: str) -> Array:
    """Cosines stand where sines belong and the other way round. The embedding differs from position
    0 on; a trained model would not mind, loaded parameters do."""
    table: Array = old(length, dim, positions)
    if positions == "concatenated":
        return np.roll(table, dim // 2, axis=1)
    return table.reshape(length, -1, 2)[..., ::-1].reshape(length, dim)


fault("positions-missing").says(
    "No positions are added. Without them attention is blind to order: permuting the tokens "
    "permutes the logits, and all [MASK] predict the same."
).of(_positions)(lambda old, n, dim, kind: np.zeros((n, dim)))
fault("positions-added-twice").says(
    "The positions are added twice, by the embedding and by the model around it. The embedding is "
    "off by exactly the sinusoidal table."
).of(_positions)(lambda old, n, dim, kind: 2.0 * old(n, dim, kind))

tied = fault("head-tied")


@tied.wraps(head_forward)
@tied.wraps(head_backward)
def _(old: Any, params: Tree, *args: Any, **options: Any) -> Any:
    """The head multiplies by the transposed embedding table instead of a kernel of its own, as
    MaskGIT and Halton-MaskGIT do. All activations are right up to the final norm; the logits are
    not, the head's kernel has no gradient, and the table has that of both."""
    head = {**params["head"], "kernel": params["embedding"]["table"].T}
    return old({**params, "head": head}, *args, **options)


@tied.wraps(MAR.backward)
def _(old: Any, *args: Any, **options: Any) -> Tree:
    grads = old(*args, **options)
    kernel = grads["head"]["kernel"]
    table = grads["embedding"]["table"] + kernel.T
    head = {**grads["head"], "kernel": np.zeros_like(kernel)}
    return {**grads, "embedding": {"table": table}, "head": head}
