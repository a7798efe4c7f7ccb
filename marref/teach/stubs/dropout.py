"""marref exercise dropout: inverted dropout and its gradient.

Page: docs/feed-forward-and-block.md.  Check with: marref exercise check dropout.py
"""

import numpy as np


def forward(x, keep, rate):
    """Drop the features that are not kept, so that the mean of y over all draws is x.

    x: any shape
    keep: booleans of the same shape, True with probability 1 - p
    rate: p
    returns y, of the shape of x, and the cache: m in y = x ⊙ m
    """
    raise NotImplementedError


def backward(dy, cache):
    """Push dy back.

    dy: any shape
    cache: m, of the same shape
    returns dx, of the same shape
    """
    raise NotImplementedError
