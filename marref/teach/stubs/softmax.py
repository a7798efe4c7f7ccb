"""marref exercise softmax: softmax that cannot overflow, and the product with its Jacobian.

Page: docs/attention.md.  Check with: marref exercise check softmax.py
"""

import numpy as np


def softmax(scores):
    """Compute a_j = exp(s_j)/Σ_k exp(s_k) over the last axis, for scores of any size.

    scores: [..., keys]
    returns weights a [..., keys]
    """
    raise NotImplementedError


def softmax_backward(dweights, weights):
    """Push dweights back.

    dweights: da [..., keys]
    weights: a [..., keys]
    returns dscores ds [..., keys]
    """
    raise NotImplementedError
