"""Embedding: a learned vector for the token plus a fixed vector for its position.

    x[b, p] = table[tokens[b, p]] + P[p]

P is sinusoidal, see `marref.positions`.  Page: docs/embedding.md.
"""

import numpy as np
import numpy.typing as npt

from marref.positions import sinusoidal_table
from marref.trees import Array, Tree


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


def forward(params: Tree, tokens: Array, positions: str) -> tuple[Array, Tree]:
    """Look up the tokens and add the positions.

    Parameters
    ----------
    params : dict
    tokens : integer array [batch, length]
    positions : {"concatenated", "interleaved"}

    Returns
    -------
    x : array [batch, length, embed_dim]
    cache : dict
        ``tokens`` themselves; ``output`` x.
    """
    table = params["table"]
    waves = sinusoidal_table(tokens.shape[1], table.shape[1], positions)
    x = table[tokens] + waves.astype(table.real.dtype)
    return x, {"tokens": tokens, "output": x}


def backward(params: Tree, dx: Array, cache: Tree) -> Tree:
    """Push ``dx`` back to the table; tokens, being integers, have no gradient.

    Row v takes part wherever tokens[b, p] = v, so its gradient is the *sum* of dx over all those
    places, and P is constant:

        dtable[v] = Σ_{b, p: tokens[b, p] = v} dx[b, p]

    ``np.add.at`` adds once for every place; ``dtable[tokens] += dx`` would keep only the last.

    Returns
    -------
    dict
        Like ``params``.
    """
    dtable = np.zeros_like(params["table"])
    np.add.at(dtable, cache["tokens"], dx)
    return {"table": dtable}
