"""marref exercise model: the whole model's backward, from the layers.

Page: docs/architecture.md.  Check with: marref exercise check model.py
"""

import numpy as np

from marref.layers import block, dropout, embedding, layer_norm, linear


def backward(params, dlogits, cache):
    """Push dlogits back to every parameter.

    params: embedding, blocks (a list), final_norm, head, as the layers want them
    dlogits: [batch, length, vocab_size]
    cache: embedding, embedding_dropout, blocks (a list), final_norm, head: what the forward of
    each layer kept
    returns grads, a dict like params
    """
    raise NotImplementedError
