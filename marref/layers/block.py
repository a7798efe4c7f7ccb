"""Transformer block, pre-norm (Xiong et al. 2020, arXiv 2002.04745).

    h = x + dropout(attention(layer_norm(x)))
    y = h + dropout(feed_forward(layer_norm(h)))

Each branch reads a normalised copy of the residual stream x and adds to it.
"""

import math

import numpy as np
import numpy.typing as npt

from marref.layers import attention, dropout, feed_forward, layer_norm
from marref.layers.dropout import Uniforms
from marref.trees import Array, Index, Tree


def init(
    rng: np.random.Generator,
    embed_dim: int,
    num_layers: int,
    std: float,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw one of ``num_layers`` blocks.

    The 2·num_layers branches add up in the residual stream.  The two kernels that write to it
    are drawn from N(0, std²/(2·num_layers)), so that its variance does not grow with the depth
    (Radford et al. 2019, GPT-2, section 2.3).

    Returns
    -------
    dict
        ``attention_norm``, ``attention``, ``feed_forward_norm``, ``feed_forward``.
    """
    residual_std = std / math.sqrt(2 * num_layers)
    return {
        "attention_norm": layer_norm.init(embed_dim, dtype),
        "attention": attention.init(rng, embed_dim, std, residual_std, dtype),
        "feed_forward_norm": layer_norm.init(embed_dim, dtype),
        "feed_forward": feed_forward.init(rng, embed_dim, std, residual_std, dtype),
    }


def forward(
    params: Tree,
    x: Array,
    *,
    num_heads: int,
    gelu: str,
    epsilon: float,
    dropout_rate: float = 0.0,
    rng: Uniforms | None = None,
    rows: Index = ...,
) -> tuple[Array, Tree]:
    """Pass the residual stream through one block.

    Parameters
    ----------
    params : dict
    x : array [batch, length, embed_dim]
    num_heads, gelu, epsilon
        See `attention`, `gelu` and `layer_norm`.
    dropout_rate : float
    rng : numpy.random.Generator or None
        ``None`` turns dropout off.
    rows : index
        The positions whose y is wanted, as in `attention`: where nothing reads the others, as in
        a last block, they need no query and no feed-forward layer.

    Returns
    -------
    y : array [batch, rows, embed_dim]
    cache : dict
        The caches of the layers, by their names.
    """
    cache: Tree = {}
    branch, cache["attention_norm"] = layer_norm.forward(params["attention_norm"], x, epsilon)
    branch, cache["attention"] = attention.forward(params["attention"], branch, num_heads, rows)
    branch, cache["attention_dropout"] = dropout.forward(branch, dropout_rate, rng)
    x = x[rows] + branch
    branch, cache["feed_forward_norm"] = layer_norm.forward(params["feed_forward_norm"], x, epsilon)
    branch, cache["feed_forward"] = feed_forward.forward(params["feed_forward"], branch, gelu)
    branch, cache["feed_forward_dropout"] = dropout.forward(branch, dropout_rate, rng)
    return x + branch, cache


def backward(
    params: Tree, dy: Array, cache: Tree, *, gelu: str, rows: Index = ...
) -> tuple[Array, Tree]:
    """Push ``dy`` back: `forward` read from bottom to top.

    At x + f(x) the gradient goes both ways: dx = dy + fᵀ(dy), where fᵀ is the backward of f.

    Returns
    -------
    dx : array [batch, length, embed_dim]
    grads : dict
        Like ``params``.
    """
    grads = {}
    dbranch = dropout.backward(dy, cache["feed_forward_dropout"])
    dbranch, grads["feed_forward"] = feed_forward.backward(
        params["feed_forward"], dbranch, cache["feed_forward"], gelu
    )
    dbranch, grads["feed_forward_norm"] = layer_norm.backward(
        params["feed_forward_norm"], dbranch, cache["feed_forward_norm"]
    )
    dy = dy + dbranch
    dbranch = dropout.backward(dy, cache["attention_dropout"])
    dbranch, grads["attention"] = attention.backward(
        params["attention"], dbranch, cache["attention"], rows
    )
    dx, grads["attention_norm"] = layer_norm.backward(
        params["attention_norm"], dbranch, cache["attention_norm"]
    )
    dx[rows] += dy
    return dx, {name: grads[name] for name in params}
