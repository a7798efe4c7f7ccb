"""marref exercise diffusion-loss: the two parts of the diffusion loss, and their gradient.

Page: docs/continuous.md.  Check with: marref exercise check diffusion_loss.py
"""

import numpy as np


def loss_forward(steps, output, clean, index, noise):
    """Compute squared error and bound row by row, for t >= 1.

    steps: arrays of all times: low log ṽ, high log β, mean_of_clean c₁, to_clean √(1/ᾱ - 1)
    output: [e, v] [rows, 2·token_dim]
    clean, noise: x and ε [rows, token_dim]
    index: t, integers [rows]
    returns squared_error [rows], bound in bits [rows], and the cache: a dict of error e - ε and
    dv, the derivative by v of each entry of the bound before its mean, both [rows, token_dim]
    """
    raise NotImplementedError


def loss_backward(cache, drows):
    """Push the gradient of each row's loss, the sum of both parts, back to [e, v].

    cache: error and dv, as above
    drows: [rows]
    returns doutput [rows, 2·token_dim]
    """
    raise NotImplementedError
