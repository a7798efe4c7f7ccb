"""Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1 and section 3.2.2).

For each head, with d = head_dim = embed_dim / num_heads:

    S = Q Kᵀ / √d,     A = softmax(S) over the keys,     C = A V

That is `attend`.  Around it, in `forward`: Q, K and V are linear maps of the input, cut into
heads; the heads' C, side by side, pass through a fourth.  Attention is bidirectional: every
position sees every other.  Page: docs/attention.md.
"""

import math

import numpy as np
import numpy.typing as npt

from marref.layers import linear
from marref.trees import Array, Tree


def init(
    rng: np.random.Generator,
    embed_dim: int,
    std: float,
    output_std: float,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw the four projections.

    Parameters
    ----------
    rng : numpy.random.Generator
    embed_dim : int
    std, output_std : float
        Standard deviations of the kernels of query, key and value, and of the output kernel, which
        writes to the residual stream.
    dtype : dtype

    Returns
    -------
    dict
        ``query``, ``key``, ``value``, ``output``: linear layers [embed_dim, embed_dim].
    """
    params = {
        name: linear.init(rng, embed_dim, embed_dim, std, dtype)
        for name in ("query", "key", "value")
    }
    return {**params, "output": linear.init(rng, embed_dim, embed_dim, output_std, dtype)}


def forward(params: Tree, x: Array, num_heads: int) -> tuple[Array, Tree]:
    """Let every position gather from all positions.

    Parameters
    ----------
    params : dict
    x : array [batch, length, embed_dim]
    num_heads : int
        Divides embed_dim; head h reads the h-th run of head_dim features.

    Returns
    -------
    y : array [batch, length, embed_dim]
    cache : dict
        ``input`` x; ``query``, ``key``, ``value`` and ``weights`` as in `attend`; ``context`` C
        [batch, length, embed_dim], the heads side by side; ``output`` y.
    """
    query, key, value = (
        split_heads(linear.forward(params[name], x)[0], num_heads)
        for name in ("query", "key", "value")
    )
    context_of_heads, cache = attend(query, key, value)
    context = merge_heads(context_of_heads)
    y, _ = linear.forward(params["output"], context)
    return y, {"input": x, **cache, "context": context, "output": y}


def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dy`` back through the output projection, `attend`, and query, key and value.

    The input feeds three projections; their gradients add.  Cutting features into heads moves
    numbers and computes nothing, so their gradients move back the same way.

    A bias added to every key moves a whole row of S by a constant, which softmax ignores: the
    gradient of the key bias is exactly 0, and what is computed for it is rounding.

    Returns
    -------
    dx : array [batch, length, embed_dim]
    grads : dict
        Like ``params``.
    """
    grads = {}
    dcontext, grads["output"] = linear.backward(params["output"], dy, cache["context"])
    num_heads = cache["query"].shape[1]
    dheads = attend_backward(split_heads(dcontext, num_heads), cache)
    dx = np.zeros_like(cache["input"])
    for name, dhead in zip(("query", "key", "value"), dheads, strict=True):
        dinput, grads[name] = linear.backward(params[name], merge_heads(dhead), cache["input"])
        dx += dinput
    return dx, {name: grads[name] for name in params}


def attend(query: Array, key: Array, value: Array) -> tuple[Array, Tree]:
    """Compute C = softmax(Q Kᵀ / √d) V for every head.

    Parameters
    ----------
    query : array [batch, num_heads, queries, head_dim]
    key, value : arrays [batch, num_heads, length, head_dim]

    Returns
    -------
    context : array [batch, num_heads, queries, head_dim]
    cache : dict
        ``query``, ``key``, ``value``, and ``weights`` A [batch, num_heads, queries, length].
    """
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    weights = softmax(scores)
    return weights @ value, {"query": query, "key": key, "value": value, "weights": weights}


def attend_backward(dcontext: Array, cache: Tree) -> tuple[Array, Array, Array]:
    """Push ``dcontext`` back through C = A V, A = softmax(S) and S = Q Kᵀ/√d.

    A product is linear in each factor.  From C_ic = Σ_j A_ij V_jc:

        dA_ij = Σ_c dC_ic V_jc        dA = dC Vᵀ
        dV_jc = Σ_i A_ij dC_ic        dV = Aᵀ dC

    and in the same way, from S = Q Kᵀ/√d, dQ = dS K/√d and dK = dSᵀ Q/√d.

    Returns
    -------
    dquery, dkey, dvalue : arrays
        Of the shapes of query, key and value.
    """
    query, key, value, weights = (cache[name] for name in ("query", "key", "value", "weights"))
    dweights = dcontext @ value.mT
    dvalue = weights.mT @ dcontext
    dscores = softmax_backward(dweights, weights)
    dquery = dscores @ key / math.sqrt(query.shape[-1])
    dkey = dscores.mT @ query / math.sqrt(query.shape[-1])
    return dquery, dkey, dvalue


def softmax(scores: Array) -> Array:
    """Compute a_j = exp(s_j) / Σ_k exp(s_k) over the last axis.

    The result is the same if all of a row's scores are moved.  Less their maximum, exp cannot
    overflow and the sum, of which one term is 1, cannot vanish.
    """
    exponentials = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
    weights: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return weights


def softmax_backward(dweights: Array, weights: Array) -> Array:
    """Push ``dweights`` back through a = softmax(s).

    From log a_j = s_j - log Σ_k exp(s_k), with [i = j] = 1 where i is j, else 0:

        ∂log a_j/∂s_i = [i = j] - exp(s_i)/Σ_k exp(s_k) = [i = j] - a_i
        ∂a_j/∂s_i     = a_j ([i = j] - a_i)
        ds_i          = Σ_j da_j ∂a_j/∂s_i = a_i (da_i - Σ_j a_j da_j)
    """
    mean = (weights * dweights).sum(axis=-1, keepdims=True)
    dscores: Array = weights * (dweights - mean)
    return dscores


def split_heads(x: Array, num_heads: int) -> Array:
    """[batch, length, embed_dim] -> [batch, num_heads, length, head_dim]."""
    batch, length, embed_dim = x.shape
    return x.reshape(batch, length, num_heads, embed_dim // num_heads).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """[batch, num_heads, length, head_dim] -> [batch, length, embed_dim]."""
    batch, num_heads, length, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, num_heads * head_dim)
