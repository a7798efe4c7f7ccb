"""Feed-forward layer (Vaswani et al. 2017, eq. 2, with GELU): y = GELU(x W₁ + b₁) W₂ + b₂.

Every position passes through it by itself; the hidden layer is four times as wide.  Page:
docs/feed-forward-and-block.md.
"""

import numpy as np
import numpy.typing as npt

from marref.layers import gelu as gelu_layer
from marref.layers import linear
from marref.trees import Array, Tree


def init(
    rng: np.random.Generator,
    embed_dim: int,
    std: float,
    down_std: float,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw both linear layers.

    Parameters
    ----------
    rng : numpy.random.Generator
    embed_dim : int
        The hidden layer has 4·embed_dim units (Vaswani et al. 2017, section 3.3).
    std, down_std : float
        Standard deviations of the first kernel and of the second, which writes to the residual
        stream.
    dtype : dtype

    Returns
    -------
    dict
        ``up`` [embed_dim, 4·embed_dim] and ``down`` [4·embed_dim, embed_dim], linear layers.
    """
    return {
        "up": linear.init(rng, embed_dim, 4 * embed_dim, std, dtype),
        "down": linear.init(rng, 4 * embed_dim, embed_dim, down_std, dtype),
    }


def forward(params: Tree, x: Array, gelu: str) -> tuple[Array, Tree]:
    """Compute y = GELU(x W₁ + b₁) W₂ + b₂.

    Parameters
    ----------
    params : dict
    x : array [..., embed_dim]
    gelu : {"erf", "tanh"}

    Returns
    -------
    y : array [..., embed_dim]
    cache : dict
        ``input`` x; ``up`` the hidden layer x W₁ + b₁; ``gelu`` the cache of the GELU,
        ``activation`` its output; ``down`` y.
    """
    up, _ = linear.forward(params["up"], x)
    activation, gelu_cache = gelu_layer.forward(up, gelu)
    y, _ = linear.forward(params["down"], activation)
    return y, {"input": x, "up": up, "gelu": gelu_cache, "activation": activation, "down": y}


def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dy`` back through the three steps of `forward`, last first (the chain rule).

    Returns
    -------
    dx : array [..., embed_dim]
    grads : dict
        Like ``params``.
    """
    dactivation, ddown = linear.backward(params["down"], dy, cache["activation"])
    dhidden = gelu_layer.backward(dactivation, cache["gelu"])
    dx, dup = linear.backward(params["up"], dhidden, cache["input"])
    return dx, {"up": dup, "down": ddown}
