"""marref exercise attention: the core, C = softmax(Q Kᵀ/√d) V, and dQ, dK, dV.

Page: docs/attention.md.  Check with: marref exercise check attention.py
"""

import numpy as np


def attend(query, key, value):
    """Compute C = A V, A = softmax(S) over the keys, S = Q Kᵀ/√d.

    query, key, value: Q, K, V [batch, num_heads, length, head_dim]; d = head_dim
    returns context C [batch, num_heads, length, head_dim], and the cache: a dict of query, key,
    value and weights A [batch, num_heads, length, length], keys last
    """
    raise NotImplementedError


def attend_backward(dcontext, cache):
    """Push dcontext back.

    dcontext: dC [batch, num_heads, length, head_dim]
    cache: query, key, value, weights, as above
    returns dquery, dkey, dvalue: dQ, dK, dV [batch, num_heads, length, head_dim]
    """
    raise NotImplementedError
