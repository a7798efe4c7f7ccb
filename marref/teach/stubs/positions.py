"""marref exercise positions: the sinusoidal table, in both layouts.

Page: docs/embedding.md.  Check with: marref exercise check positions.py
"""

import numpy as np


def sinusoidal_table(length, embed_dim, positions):
    """Tabulate P.

    length, embed_dim: integers; embed_dim is even, and h = embed_dim/2
    positions: "concatenated", with w_i = 10000^(-i/max(h - 1, 1)), sines first; or "interleaved",
    with w_i = 10000^(-2i/embed_dim), sin(p w_i) at feature 2i and cos(p w_i) at 2i + 1
    returns P [length, embed_dim]
    """
    raise NotImplementedError
