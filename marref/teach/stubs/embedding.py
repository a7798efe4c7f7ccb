"""marref exercise embedding: scatter dx to the rows of the table.

Page: docs/embedding.md.  Check with: marref exercise check embedding.py
"""

import numpy as np


def backward(params, dx, cache):
    """Push dx back through x[b, p] = table[tokens[b, p]] + P[p].

    params: table [vocab_size, embed_dim]
    dx: [batch, length, embed_dim]
    cache: tokens, integers [batch, length]
    returns grads: a dict of table [vocab_size, embed_dim]
    """
    raise NotImplementedError
