"""marref exercise layer-norm-backward: the three terms of layer norm's gradient.

Page: docs/layer-norm.md.  Check with: marref exercise check layer_norm_backward.py
"""

import numpy as np


def backward(params, dy, cache):
    """Push dy back through y = γ ⊙ x̂ + β.

    params: scale γ [features], bias β [features]
    dy: [..., features]
    cache: normalised x̂ [..., features], inverse_std s = 1/√(σ² + ε) [..., 1]
    returns dx [..., features], and grads: a dict of scale [features] and bias [features]
    """
    raise NotImplementedError
