"""marref exercise heads: multi-head attention around its core, and all gradients.

Page: docs/attention.md.  Check with: marref exercise check heads.py
"""

import numpy as np

from marref.layers import linear
from marref.layers.attention import attend, attend_backward


def forward(params, x, num_heads):
    """Let every position gather from all positions.

    params: query, key, value, output, each a dict of kernel [embed_dim, embed_dim] and bias
    [embed_dim]
    x: [batch, length, embed_dim]
    num_heads: head h has features h·head_dim to (h + 1)·head_dim - 1
    returns y [batch, length, embed_dim], and a cache, in which nobody looks
    """
    raise NotImplementedError


def backward(params, dy, cache):
    """Push dy back.

    params: as above
    dy: [batch, length, embed_dim]
    cache: input x [batch, length, embed_dim]; query, key, value, weights, as attend keeps them
    [batch, num_heads, length, …]; context C [batch, length, embed_dim], the heads side by side
    returns dx [batch, length, embed_dim], and grads, a dict like params
    """
    raise NotImplementedError
