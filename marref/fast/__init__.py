"""The same results sooner: what the public face computes with.

`loss_and_grads`, `adam_step`, `logits` and `iterative_decode` compute what
`marref.model.loss_and_grads`, `marref.optim.step`, `MAR.__call__` and
`marref.decoding.iterative_decode` define, up to rounding.  This package
imports the definition, never the other way round; docs/performance.md says what it does and what
that is worth.
"""

from marref.fast import memory, parallel
from marref.fast.decoding import iterative_decode
from marref.fast.forward import logits
from marref.fast.optim import adam_step
from marref.fast.training import loss_and_grads

__all__ = ["adam_step", "iterative_decode", "logits", "loss_and_grads", "memory", "parallel"]
