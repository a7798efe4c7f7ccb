"""Transformer block, pre-norm (Xiong et al. 2020, arXiv 2002.04745).

    h = x + dropout(attention(layer_norm(x)))
    y = h + dropout(feed_forward(layer_norm(h)))

Each branch reads a normalised copy of the residual stream x and adds to it.  (In Vaswani et al.
2017 the norm came after the sum; then the stream itself is normalised 2·num_layers times on its
way, and deep models need a slow start of the learning rate.)  Page:
docs/feed-forward-and-block.md.
"""

import math

import numpy as np
import numpy.typing as npt

from marref.layers import attention, dropout, feed_forward, layer_norm
from marref.trees import Array, Tree


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


def draw_keep(rng: np.random.Generator | None, shape: tuple[int, ...], rate: float) -> Tree:
    """Draw which features dropout keeps on the two branches; see `marref.layers.dropout.draw`.

    Returns
    -------
    dict
        ``attention`` and ``feed_forward``, each of the shape, or ``None``.
    """
    return {name: dropout.draw(rng, shape, rate) for name in ("attention", "feed_forward")}


def forward(
    params: Tree,
    x: Array,
    *,
    num_heads: int,
    gelu: str,
    epsilon: float,
    keep: Tree | None = None,
    dropout_rate: float = 0.0,
) -> tuple[Array, Tree]:
    """Pass the residual stream through one block.

    Parameters
    ----------
    params : dict
    x : array [batch, length, embed_dim]
    num_heads, gelu, epsilon
        See `attention`, `gelu` and `layer_norm`.
    keep : dict, optional
        From `draw_keep`.  Without it nothing is dropped.
    dropout_rate : float

    Returns
    -------
    y : array [batch, length, embed_dim]
    cache : dict
        The caches of the layers, by their names; ``output`` y.
    """
    keep = keep or {"attention": None, "feed_forward": None}
    cache: Tree = {}
    branch, cache["attention_norm"] = layer_norm.forward(params["attention_norm"], x, epsilon)
    branch, cache["attention"] = attention.forward(params["attention"], branch, num_heads)
    branch, cache["attention_dropout"] = dropout.forward(branch, keep["attention"], dropout_rate)
    h = x + branch
    branch, cache["feed_forward_norm"] = layer_norm.forward(params["feed_forward_norm"], h, epsilon)
    branch, cache["feed_forward"] = feed_forward.forward(params["feed_forward"], branch, gelu)
    branch, cache["feed_forward_dropout"] = dropout.forward(
        branch, keep["feed_forward"], dropout_rate
    )
    y = h + branch
    return y, {**cache, "output": y}


def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
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
        params["feed_forward"], dbranch, cache["feed_forward"]
    )
    dbranch, grads["feed_forward_norm"] = layer_norm.backward(
        params["feed_forward_norm"], dbranch, cache["feed_forward_norm"]
    )
    dh = dy + dbranch
    dbranch = dropout.backward(dh, cache["attention_dropout"])
    dbranch, grads["attention"] = attention.backward(
        params["attention"], dbranch, cache["attention"]
    )
    dbranch, grads["attention_norm"] = layer_norm.backward(
        params["attention_norm"], dbranch, cache["attention_norm"]
    )
    dx = dh + dbranch
    return dx, {name: grads[name] for name in params}
