"""marref exercise linear: y = x W + b, and its three gradients.

Page: docs/linear.md.  Check with: marref exercise check linear.py
"""

import numpy as np


def forward(params, x):
    """Compute y = x W + b.

    params: kernel W [in, out], bias b [out]
    x: [..., in]
    returns y [..., out], and the cache, which is x
    """
    raise NotImplementedError


def backward(params, dy, cache):
    """Push dy back.

    params: kernel W [in, out], bias b [out]
    dy: [..., out]
    cache: x [..., in]
    returns dx [..., in], and grads: a dict of kernel [in, out] and bias [out]
    """
    raise NotImplementedError
