"""Faults of the embedding: tokens and positions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from marref import model as model_module
from marref.layers import embedding
from marref.model import MAR
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Patch, wrap


def _table(change: Callable[[Array], Array], pull_back: Callable[[Array], Array]) -> list[Patch]:
    """Compute x = f(table)[tokens] + P for a linear f;  dtable = fᵀ(df)."""
    return [
        wrap(
            embedding,
            "forward",
            lambda old: (
                lambda params, tokens, layout: old(
                    {"table": change(params["table"])}, tokens, layout
                )
            ),
        ),
        wrap(
            embedding,
            "backward",
            lambda old: (
                lambda params, dx, cache: {"table": pull_back(old(params, dx, cache)["table"])}
            ),
        ),
    ]


def _times_root(table: Array) -> Array:
    """√embed_dim · table."""
    return table * math.sqrt(table.shape[1])


def _ramp(table: Array) -> Array:
    """table[v, i] = (v·embed_dim + i) / √embed_dim."""
    vocab_size, embed_dim = table.shape
    ramp = np.arange(vocab_size * embed_dim).reshape(vocab_size, embed_dim)
    return (ramp / math.sqrt(embed_dim)).astype(table.dtype)


def _mask_row_zero(table: Array) -> Array:
    """Table with zeros for id 0."""
    rest = np.arange(len(table)) > 0
    return np.where(rest[:, np.newaxis], table, table.dtype.type(0))


def _positions(make: Callable[[Any, int, int, str], Array]) -> tuple[Patch]:
    """Compute P = make(old, length, embed_dim, layout), old being the right table as a function."""

    def wrapped(old: Any) -> Any:
        def sinusoidal_table(length: int, embed_dim: int, layout: str = "concatenated") -> Array:
            return make(old, length, embed_dim, layout)

        return sinusoidal_table

    return (wrap(embedding, "sinusoidal_table", wrapped),)


def _waves(length: int, exponent: Array, layout: str) -> Array:
    """Sin and cos of p · 10000^(-exponent_i), in the layout."""
    angle = np.arange(length)[:, np.newaxis] * 10000.0**-exponent
    stack = np.stack([np.sin(angle), np.cos(angle)], axis=1 if layout == "concatenated" else 2)
    return stack.reshape(length, 2 * len(exponent))


def _other_denominator(old: Any, length: int, embed_dim: int, layout: str) -> Array:
    """w_i = 10000^(-i/half) if concatenated, 10000^(-i/max(half - 1, 1)) if interleaved."""
    half = embed_dim // 2
    denominator = half if layout == "concatenated" else max(half - 1, 1)
    return _waves(length, np.arange(half) / denominator, layout)


def _exponent_without_two(old: Any, length: int, embed_dim: int, layout: str) -> Array:
    """w_i = 10000^(-i/embed_dim)."""
    return _waves(length, np.arange(embed_dim // 2) / embed_dim, layout)


def _cosine_first(old: Any, length: int, embed_dim: int, layout: str) -> Array:
    """Cosines where the layout has sines, and sines where it has cosines."""
    table: Array = old(length, embed_dim, layout)
    if layout == "concatenated":
        return np.roll(table, embed_dim // 2, axis=1)
    return table.reshape(length, -1, 2)[..., ::-1].reshape(length, embed_dim)


# The head tied to the table: z = norm(x) tableᵀ + b.


def _tied_params(params: Tree) -> Tree:
    """Compute W = tableᵀ."""
    head = {"kernel": params["embedding"]["table"].T, "bias": params["head"]["bias"]}
    return {**params, "head": head}


def _tied_head_forward(old: Any) -> Any:
    return lambda model, params, x: old(model, _tied_params(params), x)


def _tied_head_backward(old: Any) -> Any:
    return lambda params, dlogits, cache: old(_tied_params(params), dlogits, cache)


def _move_to_table(grads: Tree) -> Tree:
    """Compute dtable += dWᵀ, dW = 0."""
    kernel = grads["head"]["kernel"]
    table = grads["embedding"]["table"] + kernel.T
    head = {**grads["head"], "kernel": np.zeros_like(kernel)}
    return {**grads, "embedding": {"table": table}, "head": head}


def _tied_backward(old: Any) -> Any:
    return lambda self, params, dlogits, cache: _move_to_table(old(self, params, dlogits, cache))


FAULTS = (
    Fault(
        "embedding-times-root-embed-dim",
        "Token vectors are multiplied by √embed_dim before the positions are added, as in "
        "Vaswani et al. 2017, section 3.4, and in many transformers after it; MAR adds them as "
        "they are. The embedding differs at every feature, and tokens drown the positions.",
        tuple(_table(_times_root, _times_root)),
    ),
    Fault(
        "embedding-fixed-ramp",
        "Row v of the table is (v·embed_dim + i)/√embed_dim at feature i and is never trained: "
        "Edifice's MAR. Rows differ by a constant over the features, which every layer norm "
        "takes away, so that the logits do not depend on the tokens: one can see it by changing "
        "a token.",
        tuple(_table(_ramp, np.zeros_like)),
    ),
    Fault(
        "embedding-mask-row-zero",
        "The vector of [MASK] is zero and stays so, id 0 being taken for padding. The embedding "
        "differs at masked positions and nowhere else.",
        tuple(_table(_mask_row_zero, _mask_row_zero)),
    ),
    Fault(
        "positions-interleaved",
        "Sines and cosines alternate, with w_i = 10000^(-2i/embed_dim): the formula of Vaswani "
        "et al. 2017. MAR's default has all sines first, as in tensor2tensor's code. The "
        "embedding differs from position 0 on, where sines are 0 and cosines 1.",
        _positions(lambda old, length, dim, layout: old(length, dim, "interleaved")),
    ),
    Fault(
        "positions-concatenated",
        "All sines, then all cosines, with w_i = 10000^(-i/(half - 1)), in a model that asks "
        "for the interleaved layout. The embedding differs from position 0 on.",
        _positions(lambda old, length, dim, layout: old(length, dim, "concatenated")),
    ),
    Fault(
        "positions-from-one",
        "Positions are counted from 1: every token gets the vector of its right neighbour's "
        "place. The embedding at position p holds the waves of p + 1.",
        _positions(lambda old, length, dim, layout: old(length + 1, dim, layout)[1:]),
    ),
    Fault(
        "positions-other-denominator",
        "The denominator of the frequencies' exponent is that of the other convention: half "
        "instead of half - 1 (concatenated), or half - 1 instead of half (interleaved). The "
        "first frequency and position 0 are right; the others are off by more and more.",
        _positions(_other_denominator),
    ),
    Fault(
        "positions-exponent-without-two",
        "w_i = 10000^(-i/embed_dim), i counting the pairs of sine and cosine: the 2 of "
        "Vaswani's 2i is lost, and the waves span half the scales. The first frequency and "
        "position 0 are right.",
        _positions(_exponent_without_two),
    ),
    Fault(
        "positions-cosine-first",
        "Cosines stand where sines belong and the other way round. The embedding differs from "
        "position 0 on; a trained model would not mind, loaded parameters do.",
        _positions(_cosine_first),
    ),
    Fault(
        "positions-missing",
        "No positions are added. Without them attention is blind to order: permuting the tokens "
        "permutes the logits, and all [MASK] predict the same.",
        _positions(lambda old, length, dim, layout: np.zeros((length, dim))),
    ),
    Fault(
        "positions-added-twice",
        "The positions are added twice, by the embedding and by the model around it. The "
        "embedding is off by exactly the sinusoidal table.",
        _positions(lambda old, length, dim, layout: 2.0 * old(length, dim, layout)),
    ),
    Fault(
        "head-tied",
        "The head multiplies by the transposed embedding table instead of a kernel of its own, "
        "as MaskGIT and Halton-MaskGIT do. All activations are right up to the final norm; the "
        "logits are not, the head's kernel has no gradient, and the table has that of both.",
        (
            wrap(model_module, "head_forward", _tied_head_forward),
            wrap(model_module, "head_backward", _tied_head_backward),
            wrap(MAR, "backward", _tied_backward),
        ),
    ),
)
