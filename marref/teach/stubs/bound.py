"""marref exercise bound: the any-order bound on the likelihood of a short sequence.

Page: docs/likelihood.md.  Check with: marref exercise check bound.py
"""

import numpy as np


def any_order_bound(log_probabilities):
    """Compute the mean over all orders o of Σ_i log p(x_{o_i} | x_{o_<i}), in nats.

    log_probabilities: [2**length, length]; entry [s, j] is log p(x_j | what is not masked), bit i
    of s saying that position i is masked
    returns a number
    """
    raise NotImplementedError
