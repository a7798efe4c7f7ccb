"""The layers of MAR: one file each, three pure functions each.

Every layer is a module with ``init(rng, …, dtype) -> params``,
``forward(params, x, …) -> (y, cache)`` and ``backward(params, dy, cache) -> (dx, grads)``.
``d<name>`` is the gradient of the loss with respect to ``<name>`` and has its shape.  ``grads``
is a tree like ``params``; ``cache`` holds what ``backward`` needs, and what a trace of the forward
pass shows.  Layers without parameters
(dropout, GELU) leave ``params`` and ``grads`` out.

Layers trust their callers: arguments are checked once, at the boundary, by `marref.model.MAR`.
"""

from marref.layers import (
    attention,
    block,
    class_embedding,
    dropout,
    embedding,
    feed_forward,
    gelu,
    layer_norm,
    linear,
)

__all__ = [
    "attention",
    "block",
    "class_embedding",
    "dropout",
    "embedding",
    "feed_forward",
    "gelu",
    "layer_norm",
    "linear",
]
