"""marref exercise reveal-counts: how many tokens each step reveals, by the cosine.

Page: docs/decoding.md.  Check with: marref exercise check reveal_counts.py
"""

import numpy as np


def cosine(num_masked, num_steps):
    """Count what is revealed in each of K = min(num_steps, N) steps.

    Masked after step k < K are max(1, min(m_{k-1} - 1, floor(N cos(πk/2K)))), in exact arithmetic;
    m_0 = N and m_K = 0.

    num_masked, num_steps: integers; N = num_masked
    returns integers [K], whose sum is N
    """
    raise NotImplementedError
