"""marref exercise decoding-step: predict, rank by confidence, reveal.

Page: docs/decoding.md.  Check with: marref exercise check decoding_step.py
"""

import numpy as np


def decoding_step(logits, tokens, mask_token_id, count, temperature):
    """Reveal the arg max at the masked positions of highest confidence.

    Confidence is the largest probability of softmax(z/T), [MASK] left out; of equal confidences the
    lower position comes first.

    logits: z [length, vocab_size]
    tokens: integers [length], mask_token_id where masked
    count: how many are revealed
    temperature: T
    returns the tokens after the step, integers [length]
    """
    raise NotImplementedError
