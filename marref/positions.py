"""The sinusoidal table P: a fixed vector of sines and cosines for every position.

Feature i of position p is, in the two kinds in use,

    "concatenated":  sin(p w_i) for i < h, then cos(p w_i),   w_i = 10000^(-i / max(h - 1, 1)),
                     h = embed_dim / 2 (tensor2tensor's published code)
    "interleaved":   sin(p w_i) at feature 2i, cos(p w_i) at feature 2i + 1,
                     w_i = 10000^(-2i / embed_dim) (Vaswani et al. 2017, section 3.5)

Page: docs/embedding.md.
"""

import functools

import numpy as np

from marref import checks
from marref.trees import Array

KINDS = ("concatenated", "interleaved")


def sinusoidal_table(length: int, embed_dim: int, positions: str = "concatenated") -> Array:
    """Tabulate P, the sinusoidal positions.

    Parameters
    ----------
    length : int
    embed_dim : int
        Even.
    positions : {"concatenated", "interleaved"}

    Returns
    -------
    float64 array [length, embed_dim]
        Read-only, since it is shared between calls.

    Raises
    ------
    TypeError, ValueError
        A size is no positive integer, ``embed_dim`` is odd, or ``positions`` are of no known kind.
    """
    length = checks.integer("length", length, 1)
    embed_dim = checks.even("embed_dim", embed_dim)
    return _table(length, embed_dim, checks.choice("positions", positions, KINDS))


@functools.lru_cache(maxsize=16)
def _table(length: int, embed_dim: int, positions: str) -> Array:
    half = embed_dim // 2
    index = np.arange(half)
    concatenated = positions == "concatenated"
    exponent = index / max(half - 1, 1) if concatenated else 2 * index / embed_dim
    angle = np.arange(length)[:, np.newaxis] * 10000.0**-exponent
    waves = np.stack([np.sin(angle), np.cos(angle)], axis=1 if concatenated else 2)
    table = waves.reshape(length, embed_dim)
    table.setflags(write=False)
    return table
