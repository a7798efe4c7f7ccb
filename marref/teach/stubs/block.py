"""marref exercise block: a pre-norm transformer block and its backward, from the layers.

Page: docs/feed-forward-and-block.md.  Check with: marref exercise check block.py
"""

import numpy as np

from marref.layers import attention, dropout, feed_forward, layer_norm


def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    """Compute h = x + dropout(attention(norm(x))), y = h + dropout(feed_forward(norm(h))).

    params: attention_norm, attention, feed_forward_norm, feed_forward, as the layers want them
    x: [batch, length, embed_dim]
    num_heads, gelu, epsilon: arguments of attention, feed_forward and layer_norm
    keep: attention and feed_forward, booleans [batch, length, embed_dim]; with dropout_rate the
    arguments of dropout
    returns y [batch, length, embed_dim], and a cache, in which nobody looks
    """
    raise NotImplementedError


def backward(params, dy, cache):
    """Push dy back.

    params: as above
    dy: [batch, length, embed_dim]
    cache: attention_norm, attention, attention_dropout, feed_forward_norm, feed_forward,
    feed_forward_dropout: what the forward of each layer kept
    returns dx [batch, length, embed_dim], and grads, a dict like params
    """
    raise NotImplementedError
