"""marref exercise gelu: GELU, exact and approximate, and its slope.

Page: docs/gelu.md.  Check with: marref exercise check gelu.py
"""

import numpy as np


def forward(x, gelu):
    """Compute y = x gate(x).

    x: any shape
    gelu: "erf" or "tanh"
    returns y, of the shape of x, and the cache: a dict of slope y′(x), of the shape of x
    """
    raise NotImplementedError


def backward(dy, cache):
    """Push dy back.

    dy: any shape
    cache: slope y′(x), of the same shape
    returns dx, of the same shape
    """
    raise NotImplementedError
