"""Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1 and section 3.2.2).

For each head, with d = head_dim = embed_dim / num_heads:

    S = Q Kᵀ / √d,     A = softmax(S) over the keys,     C = A V

Q, K and V are linear maps of the input; the heads' C, side by side, pass through a fourth.
Attention is bidirectional: every position sees every other.
"""

import math

import numpy as np
import numpy.typing as npt

from marref.layers import linear
from marref.trees import Array, Index, Tree


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
    std : float
        Standard deviation of the kernels of query, key and value.
    output_std : float
        That of the output kernel, which writes to the residual stream.
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


def forward(params: Tree, x: Array, num_heads: int, rows: Index = ...) -> tuple[Array, Tree]:
    """Let positions gather from all positions.

    Parameters
    ----------
    params : dict
    x : array [batch, length, embed_dim]
    num_heads : int
        Divides embed_dim; head h reads the h-th run of head_dim features.
    rows : index
        Which positions gather: x[rows] is [batch, rows, embed_dim].  All of them unless given.

    Returns
    -------
    y : array [batch, rows, embed_dim]
    cache : dict
        ``input`` x; ``query`` [batch, num_heads, rows, head_dim]; ``key``, ``value``
        [batch, num_heads, length, head_dim]; ``weights`` A [batch, num_heads, rows, length],
        keys last; ``context`` C [batch, rows, embed_dim], the heads side by side.
    """
    query, key, value = (
        _split_heads(linear.forward(params[name], source)[0], num_heads)
        for name, source in (("query", x[rows]), ("key", x), ("value", x))
    )
    weights = weigh(query, key)
    context = _merge_heads(weights @ value)
    y, _ = linear.forward(params["output"], context)
    cache = {"input": x, "query": query, "key": key, "value": value}
    return y, {**cache, "weights": weights, "context": context}


def backward(params: Tree, dy: Array, cache: Tree, rows: Index = ...) -> tuple[Array, Tree]:
    """Push ``dy`` back through output, C = A V, softmax, S = Q Kᵀ/√d and the projections.

    The products are linear in each factor: from C = A V follow dA = dC Vᵀ and dV = Aᵀ dC, from
    S = Q Kᵀ/√d follow dQ = dS K/√d and dK = dSᵀ Q/√d.  For a row a = softmax(s),

        ∂a_j/∂s_i = a_j (δ_ij - a_i)     so     ds_i = a_i (da_i - Σ_j a_j da_j)

    With da_j = dc · v_j the sum is dc · Σ_j a_j v_j = dc · c, over head_dim numbers instead of
    length (Dao et al. 2022, arXiv 2205.14135, appendix B.2).

    The input feeds three projections; their gradients add.

    A bias added to every key moves a whole row of S by a constant, which softmax ignores: the
    gradient of the key bias is exactly 0, and what is computed for it is rounding.

    Returns
    -------
    dx : array [batch, length, embed_dim]
    grads : dict
        Like ``params``.
    """
    x, query, key, value, weights, context = (
        cache[name] for name in ("input", "query", "key", "value", "weights", "context")
    )
    num_heads, head_dim = query.shape[1], query.shape[-1]

    dcontext, doutput = linear.backward(params["output"], dy, context)
    mean = _split_heads(dcontext * context, num_heads).sum(axis=-1, keepdims=True)
    dcontext = _split_heads(dcontext, num_heads)
    dvalue = weights.mT @ dcontext
    dscores = dcontext @ value.mT
    dscores -= mean
    dscores *= weights
    dquery = dscores @ (key / math.sqrt(head_dim))
    dkey = dscores.mT @ (query / math.sqrt(head_dim))

    dx, grads = np.zeros_like(x), {}
    for name, dheads, where in (
        ("query", dquery, rows),
        ("key", dkey, ...),
        ("value", dvalue, ...),
    ):
        dinput, grads[name] = linear.backward(params[name], _merge_heads(dheads), x[where])
        dx[where] += dinput
    return dx, {**grads, "output": doutput}


def weigh(query: Array, key: Array) -> Array:
    """Compute A = softmax(Q Kᵀ / √d), [batch, num_heads, rows, length]."""
    return _softmax(query / math.sqrt(query.shape[-1]) @ key.mT)


def _softmax(scores: Array) -> Array:
    """Softmax over the last axis, written over the scores.

    exp(s_j) / Σ exp(s_k) is the same if all of a row's scores are moved.  Less their maximum, exp
    cannot overflow and the sum cannot vanish.  Within ±50 neither can as it is, in float32 and
    float64; a subclass stands for narrower precisions.
    """
    # Where nothing is masked there may be no rows: hence the initial values.
    smallest, largest = scores.real.min(initial=0.0), scores.real.max(initial=0.0)
    if not (smallest > -50 and largest < 50 and type(scores) is np.ndarray):
        scores -= scores.real.max(axis=-1, keepdims=True)
    weights: Array = np.exp(scores, out=scores)
    # The sum as a product with ones, which NumPy does faster.
    weights /= weights @ np.ones((weights.shape[-1], 1), weights.dtype)
    return weights


def _split_heads(x: Array, num_heads: int) -> Array:
    """[batch, length, embed_dim] -> [batch, num_heads, length, head_dim]."""
    batch, length, embed_dim = x.shape
    return x.reshape(batch, length, num_heads, embed_dim // num_heads).swapaxes(1, 2)


def _merge_heads(x: Array) -> Array:
    """[batch, num_heads, length, head_dim] -> [batch, length, embed_dim]."""
    batch, num_heads, length, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, num_heads * head_dim)
