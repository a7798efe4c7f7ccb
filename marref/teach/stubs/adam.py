"""marref exercise adam: one step of Adam on one array, with decoupled weight decay.

Page: docs/adam.md.  Check with: marref exercise check adam.py
"""

import numpy as np


def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    """Take step t, counted from 1.

    param, grad, m, v: θ, g, and the moments before the step, arrays of one shape
    learning_rate, beta1, beta2, epsilon, weight_decay: η, β₁, β₂, ε, λ
    returns θ, m and v after the step
    """
    raise NotImplementedError
