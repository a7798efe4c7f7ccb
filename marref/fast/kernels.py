"""Norm and attention over packed parameters, in few passes.

Arrays that a function returns are its caller's to write to.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from marref.trees import Array

# Beside numbers of this size, float32 holds all that counts in a sum.
_SAFE_SUMS = 1e-15, 1e15

# exp(2·35) times the largest vocabulary is far below the largest float32.
_SAFE_LOGIT = 35.0

LOGITS_AT_ONCE = 2**21
"""The most logits that a thread has at a time."""

# The attention weights that are worked on at a time: they stay in the processor's cache.
_TILE = 2**18


def normalise(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Compute n = x/ρ with ρ = √(Σx² + nε), for x without a mean; see `marref.fast.packed`.

    Parameters
    ----------
    x : array [..., features]
    epsilon : float

    Returns
    -------
    normal : array [..., features]
    root : array [..., 1]
        ρ.
    """
    squares = np.vecdot(x, x)
    squares += x.shape[-1] * epsilon
    root = np.sqrt(squares, out=squares)[..., np.newaxis]
    return x / root, root


def normalise_backward(dnormal: Array, normal: Array, root: Array) -> Array:
    """Push ``dnormal`` back through n = x/ρ, over ``dnormal`` itself.

    ∂ρ/∂x = x/ρ = n, so dx = dn/ρ - x (x · dn)/ρ³ = (dn - n (n · dn))/ρ.
    """
    along = np.vecdot(normal, dnormal)[..., np.newaxis]
    dnormal -= normal * along
    dnormal /= root
    return dnormal


class Attended(NamedTuple):
    """What `attend_backward` needs; without ``exponentials`` it computes them again."""

    query: Array
    key: Array
    value: Array
    exponentials: Array | None
    sums: Array


def attend(query: Array, key: Array, value: Array, context: Array, *, keep: bool) -> Attended:
    """Compute C = softmax(Q Kᵀ) V; the query has been divided by √head_dim.

    The weights are exponentials over their sums; C is divided by the sums in their place.

    Parameters
    ----------
    query : array [batch, num_heads, queries, head_dim]
    key, value : arrays [batch, num_heads, length, head_dim]
    context : array [batch, num_heads, queries, head_dim]
        C is written to it.
    keep : bool
        Keep the exponentials.

    Returns
    -------
    Attended
        ``exponentials`` [batch, num_heads, queries, length], ``sums``
        [batch, num_heads, queries, 1].
    """
    shape = (*query.shape[:-1], key.shape[-2])
    exponentials = np.empty(shape, query.dtype) if keep else None
    sums = np.empty((*query.shape[:-1], 1), query.dtype)
    for tile in _tiles(shape):
        out = None if exponentials is None else exponentials[tile]
        weights, sums[tile] = weigh(query[tile], key[tile], out)
        np.matmul(weights, value[tile], out=context[tile])
        context[tile] /= sums[tile]
    return Attended(query, key, value, exponentials, sums)


def weigh(query: Array, key: Array, out: Array | None = None) -> tuple[Array, Array]:
    """Compute the exponentials of the scores, and their sums over the keys.

    exp is taken of the scores as they are.  Where that could overflow, or lose terms that count,
    which the sums tell, the maximum of the row comes off first.

    Parameters
    ----------
    query, key : arrays [batch, num_heads, queries or length, head_dim]
    out : array [batch, num_heads, queries, length], optional
        What the exponentials are written to.

    Returns
    -------
    exponentials : array [batch, num_heads, queries, length]
    sums : array [batch, num_heads, queries, 1]
    """
    ones = np.ones((key.shape[-2], 1), key.dtype)
    exponentials = np.matmul(query, key.mT, out=out)
    with np.errstate(over="ignore"):
        np.exp(exponentials, out=exponentials)
        sums = exponentials @ ones
    low, high = _SAFE_SUMS
    smallest = np.minimum.reduce(sums, axis=None, initial=1.0)
    largest = np.maximum.reduce(sums, axis=None, initial=1.0)
    if not (smallest > low and largest < high):
        np.matmul(query, key.mT, out=exponentials)
        exponentials -= exponentials.max(axis=-1, keepdims=True)
        np.exp(exponentials, out=exponentials)
        sums = exponentials @ ones
    return exponentials, sums


def attend_backward(
    dcontext: Array, attended: Attended, context: Array, out: tuple[Array, Array, Array]
) -> None:
    """Push ``dcontext`` back through `attend`; ``dcontext`` is written over.

    With E the exponentials and r their sums, A = E/r.  The definition's formulas
    (`marref.layers.attention.attend_backward`) with G = dC/r become

        dV = Eᵀ G,     dS = E ⊙ (G Vᵀ - m),     m_i = Σ_j A_ij (G Vᵀ)_ij = G_i · C_i

    The last step, because Σ_j A_ij V_j = C_i, sums over head_dim numbers instead of length (Dao et
    al. 2022, arXiv 2205.14135, appendix B.2).

    Parameters
    ----------
    dcontext : array [batch, num_heads, queries, head_dim]
    attended : Attended
    context : array [batch, num_heads, queries, head_dim]
        From `attend`.
    out : tuple of arrays
        What dquery, dkey and dvalue are written to.
    """
    query, key, value, exponentials, sums = attended
    dquery, dkey, dvalue = out
    dcontext /= sums
    mean = np.vecdot(dcontext, context)[..., np.newaxis]
    for tile in _tiles((*query.shape[:-1], key.shape[-2])):
        if exponentials is None:
            weights, _ = weigh(query[tile], key[tile])
        else:
            weights = exponentials[tile]
        np.matmul(weights.mT, dcontext[tile], out=dvalue[tile])
        dscores = dcontext[tile] @ value[tile].mT
        dscores -= mean[tile]
        dscores *= weights
        np.matmul(dscores, key[tile], out=dquery[tile])
        np.matmul(dscores.mT, query[tile], out=dkey[tile])


def _tiles(shape: tuple[int, ...]) -> list[Any]:
    """Cut [batch, num_heads, ...] into sequences, or heads, whose arrays stay in the cache."""
    batch, num_heads, *rest = shape
    of_head = max(1, math.prod(rest))
    if batch * num_heads * of_head <= _TILE:
        return [...]
    heads = max(1, min(num_heads, _TILE // of_head))
    sequences = max(1, _TILE // (num_heads * of_head))
    return [
        (slice(sequence, sequence + sequences), slice(head, head + heads))
        for sequence in range(0, batch, sequences)
        for head in range(0, num_heads, heads)
    ]


def has_digits(logits: Array) -> bool:
    """Whether exp of every logit has all its digits in float32, and so have sums and quotients."""
    smallest = np.minimum.reduce(logits, axis=None, initial=0.0)
    largest = np.maximum.reduce(logits, axis=None, initial=0.0)
    return bool(smallest > -_SAFE_LOGIT and largest < _SAFE_LOGIT)


def linear(x: Array, kernel: Array, bias: Array) -> Array:
    """Compute x W + b for x [rows, features]."""
    y: Array = x @ kernel
    y += bias
    return y


def remove_mean(x: Array) -> Array:
    """Take the mean off x [rows, features], over x; what rounding left of it too.

    The mean is a product with ones, which NumPy does faster than a sum.
    """
    ones = np.ones((x.shape[1], 1), x.dtype)
    for _ in range(2):
        mean = x @ ones
        mean /= x.shape[1]
        x -= mean
    return x


def split_heads(x: Array, batch: int, num_heads: int) -> Array:
    """[batch·length, features] -> [batch, num_heads, length, head_dim], a view."""
    rows, features = x.shape
    heads = x.reshape(batch, rows // batch, num_heads, features // num_heads)
    return heads.swapaxes(1, 2)
