"""marref exercise mask-ratio: draw a mask ratio by inverse transform.

Page: docs/masking.md.  Check with: marref exercise check mask_ratio.py
"""

import numpy as np


def one_minus_cosine(u):
    """Turn uniform numbers into ratios with the density p(r) = (2/π)/√(r (2 - r)) on [0, 1].

    u: uniform in [0, 1), any shape; the ratio rises with u
    returns r, of the same shape
    """
    raise NotImplementedError
