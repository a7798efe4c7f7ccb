"""marref exercise loss: the mean cross-entropy at masked positions, and its gradient.

Page: docs/loss.md.  Check with: marref exercise check loss.py
"""

import numpy as np


def forward(logits, targets, mask):
    """Compute L = -(1/|M|) Σ_{i in M} log softmax(z_i)[y_i], and 0 where nothing is masked.

    logits: z [batch, length, vocab_size], of any size
    targets: y, integers [batch, length]
    mask: booleans [batch, length], True where i is in M
    returns L, and the cache: a dict of mask and, of the masked positions one after the other,
    targets [masked] and log_probabilities log softmax(z) [masked, vocab_size]
    """
    raise NotImplementedError


def backward(cache):
    """Compute the gradient of L with respect to the logits.

    cache: mask, targets, log_probabilities, as above
    returns dlogits [batch, length, vocab_size]
    """
    raise NotImplementedError
