"""Embedding: a learned vector for the token plus a fixed vector for its position.

    x[b, p] = table[tokens[b, p]] + P[p]

P is sinusoidal.  Feature i of position p is, in the two layouts in use,

    "concatenated":  sin(p w_i) for i < h, then cos(p w_i),   w_i = 10000^(-i / max(h - 1, 1)),
                     h = embed_dim / 2 (tensor2tensor's published code)
    "interleaved":   sin(p w_i) at feature 2i, cos(p w_i) at feature 2i + 1,
                     w_i = 10000^(-2i / embed_dim) (Vaswani et al. 2017, section 3.5)
"""

import functools

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from marref import checks
from marref.trees import Array, Tree

LAYOUTS = ("concatenated", "interleaved")


def init(
    rng: np.random.Generator,
    vocab_size: int,
    embed_dim: int,
    std: float,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw the table from N(0, std²).

    Returns
    -------
    dict
        ``table`` [vocab_size, embed_dim].
    """
    return {"table": rng.normal(0.0, std, (vocab_size, embed_dim)).astype(dtype)}


def forward(params: Tree, tokens: Array, layout: str) -> tuple[Array, Array]:
    """Look up the tokens and add the positions.

    Parameters
    ----------
    params : dict
    tokens : integer array [batch, length]
    layout : {"concatenated", "interleaved"}

    Returns
    -------
    x : array [batch, length, embed_dim]
    cache : array
        ``tokens`` themselves.
    """
    table = params["table"]
    positions = sinusoidal_table(tokens.shape[1], table.shape[1], layout)
    return table[tokens] + positions.astype(table.real.dtype), tokens


def backward(params: Tree, dx: Array, cache: Array) -> Tree:
    """Push ``dx`` back to the table; tokens, being integers, have no gradient.

    Row v takes part wherever tokens[b, p] = v, so dtable[v] is the *sum* of dx over all those
    places (an assignment would keep only the last); P is constant.  With the one-hot matrix
    H[b p, v] = [tokens[b, p] = v], which is almost all zeros,

        x = H table + P     so     dtable = Hᵀ dx

    Returns
    -------
    dict
        Like ``params``.
    """
    dtable = np.zeros_like(params["table"])
    ids, rows = cache.ravel(), np.arange(cache.size + 1)
    one_hot = csr_array((np.ones(cache.size, dx.dtype), ids, rows), (cache.size, len(dtable)))
    dtable += one_hot.T @ dx.reshape(cache.size, -1)
    return {"table": dtable}


def sinusoidal_table(length: int, embed_dim: int, layout: str = "concatenated") -> Array:
    """Tabulate P, the sinusoidal positions.

    Parameters
    ----------
    length : int
    embed_dim : int
        Even.
    layout : {"concatenated", "interleaved"}

    Returns
    -------
    float64 array [length, embed_dim]
        Read-only, since it is shared between calls.

    Raises
    ------
    TypeError, ValueError
        A size is no positive integer, ``embed_dim`` is odd, or the layout is unknown.
    """
    length = checks.integer("length", length, 1)
    embed_dim = checks.even("embed_dim", embed_dim)
    return _table(length, embed_dim, checks.choice("layout", layout, LAYOUTS))


@functools.lru_cache(maxsize=16)
def _table(length: int, embed_dim: int, layout: str) -> Array:
    half = embed_dim // 2
    index = np.arange(half)
    concatenated = layout == "concatenated"
    exponent = index / max(half - 1, 1) if concatenated else 2 * index / embed_dim
    angle = np.arange(length)[:, np.newaxis] * 10000.0**-exponent
    waves = np.stack([np.sin(angle), np.cos(angle)], axis=1 if concatenated else 2)
    table = waves.reshape(length, embed_dim)
    table.setflags(write=False)
    return table
