"""The transformer block of continuous MAR: that of `marref.layers.block`, with more dropout.

    h = x + dropout(attention(layer_norm(x)))        weights dropped too
    y = h + dropout(feed_forward(layer_norm(h)))     hidden features dropped too

As in ViT (timm's block, which the code published with Li et al. 2024, arXiv 2406.11838, uses):
dropout also acts on the attention weights, after softmax, and behind the GELU.  Page:
docs/continuous.md.
"""

import numpy as np
import numpy.typing as npt

from marref.continuous.layers import xavier
from marref.layers import dropout, gelu, layer_norm, linear
from marref.layers.attention import merge_heads, softmax, softmax_backward, split_heads
from marref.trees import Array, Tree

PLACES = ("weights", "attention", "hidden", "feed_forward")


def init(
    rng: np.random.Generator, features: int, hidden: int, dtype: npt.DTypeLike = np.float64
) -> Tree:
    """Draw a block: linear layers as Glorot and Bengio, norms as they are.

    Returns
    -------
    dict
        ``attention_norm``, ``attention`` (``query``, ``key``, ``value``, ``output``),
        ``feed_forward_norm``, ``feed_forward`` (``up``, ``down``).
    """
    names = ("query", "key", "value")
    attention = {name: xavier.init(rng, features, features, dtype, fused=3) for name in names}
    attention["output"] = xavier.init(rng, features, features, dtype)
    return {
        "attention_norm": layer_norm.init(features, dtype),
        "attention": attention,
        "feed_forward_norm": layer_norm.init(features, dtype),
        "feed_forward": {
            "up": xavier.init(rng, features, hidden, dtype),
            "down": xavier.init(rng, hidden, features, dtype),
        },
    }


def draw_keep(
    rng: np.random.Generator, shape: tuple[int, int, int], num_heads: int, hidden: int, rate: float
) -> Tree:
    """Draw what dropout keeps; see `marref.layers.dropout.draw`.

    Returns
    -------
    dict
        For each of `PLACES` a boolean array: ``weights`` [batch, num_heads, length, length],
        ``attention`` and ``feed_forward`` [batch, length, features], ``hidden`` [batch, length,
        hidden].
    """
    batch, length, _ = shape
    shapes = ((batch, num_heads, length, length), shape, (batch, length, hidden), shape)
    return {
        name: dropout.draw(rng, of_place, rate)
        for name, of_place in zip(PLACES, shapes, strict=True)
    }


def forward(
    params: Tree,
    x: Array,
    *,
    num_heads: int,
    epsilon: float,
    keep: Tree | None = None,
    dropout_rate: float = 0.0,
    visible: Array | None = None,
) -> tuple[Array, Tree]:
    """Pass the residual stream through one block.

    Parameters
    ----------
    params : dict
    x : array [batch, length, features]
    num_heads, epsilon
        See `marref.layers`.
    keep : dict, optional
        From `draw_keep`.  Without it nothing is dropped.
    dropout_rate : float
    visible : bool array [length, length], optional
        Which positions (columns) each position attends to; without it all.  A score of -∞ has the
        weight 0, and so has its gradient: nothing else changes in `backward`.

    Returns
    -------
    y : array [batch, length, features]
    cache : dict
    """
    kept: Tree = keep or dict.fromkeys(PLACES)
    cache: Tree = {}

    def dropped(x: Array, place: str) -> Array:
        y, cache[f"{place}_dropout"] = dropout.forward(x, kept[place], dropout_rate)
        return y

    normal, cache["attention_norm"] = layer_norm.forward(params["attention_norm"], x, epsilon)
    query, key, value = (
        split_heads(linear.forward(params["attention"][name], normal)[0], num_heads)
        for name in ("query", "key", "value")
    )
    scores = query @ key.mT * query.shape[-1] ** -0.5
    weights = softmax(scores if visible is None else np.where(visible, scores, -np.inf))
    seen = dropped(weights, "weights")
    context = merge_heads(seen @ value)
    branch, _ = linear.forward(params["attention"]["output"], context)
    h = x + dropped(branch, "attention")
    normal_h, cache["feed_forward_norm"] = layer_norm.forward(
        params["feed_forward_norm"], h, epsilon
    )
    up, _ = linear.forward(params["feed_forward"]["up"], normal_h)
    activation, cache["gelu"] = gelu.forward(up, "erf")
    hidden = dropped(activation, "hidden")
    branch, _ = linear.forward(params["feed_forward"]["down"], hidden)
    y = h + dropped(branch, "feed_forward")
    heads = {"query": query, "key": key, "value": value, "weights": weights, "seen": seen}
    inputs = {"normal": normal, "context": context, "normal_h": normal_h, "hidden": hidden}
    return y, {**cache, **heads, **inputs}


def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dy`` back: `forward` read from bottom to top.

    Where dropout acts between two steps, its mask multiplies the gradient at the same place; the
    steps are derived in `marref.layers.attention`, `feed_forward` and `block`.

    Returns
    -------
    dx : array [batch, length, features]
    grads : dict
        Like ``params``.
    """
    dbranch = dropout.backward(dy, cache["feed_forward_dropout"])
    dhidden, ddown = linear.backward(params["feed_forward"]["down"], dbranch, cache["hidden"])
    dup = gelu.backward(dropout.backward(dhidden, cache["hidden_dropout"]), cache["gelu"])
    dnormal, dup_params = linear.backward(params["feed_forward"]["up"], dup, cache["normal_h"])
    dnormal, dnorm_h = layer_norm.backward(
        params["feed_forward_norm"], dnormal, cache["feed_forward_norm"]
    )
    dh = dy + dnormal
    dnormal, dattention = _attention_backward(
        params["attention"], dropout.backward(dh, cache["attention_dropout"]), cache
    )
    dnormal, dnorm = layer_norm.backward(params["attention_norm"], dnormal, cache["attention_norm"])
    return dh + dnormal, {
        "attention_norm": dnorm,
        "attention": dattention,
        "feed_forward_norm": dnorm_h,
        "feed_forward": {"up": dup_params, "down": ddown},
    }


def _attention_backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dy`` back through the output projection, the weights, and query, key and value."""
    query, key, value = (cache[name] for name in ("query", "key", "value"))
    grads = {}
    dcontext, grads["output"] = linear.backward(params["output"], dy, cache["context"])
    dcontext = split_heads(dcontext, query.shape[1])
    dweights = dropout.backward(dcontext @ value.mT, cache["weights_dropout"])
    dscores = softmax_backward(dweights, cache["weights"]) * query.shape[-1] ** -0.5
    dheads = {
        "query": dscores @ key,
        "key": dscores.mT @ query,
        "value": cache["seen"].mT @ dcontext,
    }
    dnormal = np.zeros_like(cache["normal"])
    for name, dhead in dheads.items():
        dinput, grads[name] = linear.backward(params[name], merge_heads(dhead), cache["normal"])
        dnormal += dinput
    return dnormal, {name: grads[name] for name in params}
