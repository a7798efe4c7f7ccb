"""Exercises on dropout and the block."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref.layers import attention, block, dropout, feed_forward, layer_norm
from marref.teach.exercise import Exercise, Part, Point, drawn
from marref.trees import Array, Tree

Rng = np.random.Generator


def _dropout_points(rng: Rng) -> Sequence[Point]:
    return [
        {"x": rng.normal(size=shape), "keep": rng.random(shape) >= rate, "rate": rate}
        for shape, rate in (((3, 4), 0.3), ((2, 3, 5), 0.6))
    ]


def _dropout_backward_points(rng: Rng) -> Sequence[Point]:
    return [
        {"dy": rng.normal(size=point["x"].shape), "cache": dropout.forward(**point)[1]}
        for point in _dropout_points(rng)
    ]


def _dropping(mask: Any) -> Any:
    def forward(x: Array, keep: Array, rate: float) -> Any:
        return x * mask(keep, rate), mask(keep, rate)

    return forward


DROPOUT = Exercise(
    "dropout",
    "inverted dropout and its gradient",
    "feed-forward-and-block.md",
    (
        Part(
            "forward",
            dropout.forward,
            ("y", "cache"),
            _dropout_points,
            {"y": "y = x ⊙ m with m = 0 or 1/(1 - p)"},
            {
                "what is kept is not scaled by 1/(1 - p), so that the mean of y shrinks": _dropping(
                    lambda keep, rate: keep.astype(float)
                ),
                "what is kept is divided by p instead of 1 - p": _dropping(
                    lambda keep, rate: keep / rate
                ),
                "what is kept is multiplied by 1 - p instead of divided": _dropping(
                    lambda keep, rate: keep * (1.0 - rate)
                ),
                "what should be kept is dropped, and the other way round": _dropping(
                    lambda keep, rate: ~keep / (1.0 - rate)
                ),
            },
        ),
        Part(
            "backward",
            dropout.backward,
            ("dx",),
            _dropout_backward_points,
            {"dx": "∂y_i/∂x_i = m_i"},
            {
                "dx = dy: the gradient of what is dropped is 0": lambda dy, cache: dy,
                "dx lacks the scale 1/(1 - p) of what is kept": lambda dy, cache: dy * (cache > 0),
                "dx is divided by the scale 1/(1 - p), not multiplied": lambda dy, cache: (
                    dy * (cache > 0) / cache.max()
                ),
            },
        ),
    ),
    (
        "The mean of y over what could be dropped must be x.",
        "m is 1/(1 - p) where a feature is kept and 0 elsewhere; it is the cache.",
        "forward: mask = keep/(1 - rate), y = x mask. backward: dx = dy mask.",
    ),
)


def _block_points(rng: Rng) -> Sequence[Point]:
    points = []
    for batch, length, features, heads, kind in ((1, 3, 4, 2, "erf"), (2, 4, 6, 3, "tanh")):
        shape = (batch, length, features)
        points.append(
            {
                "params": drawn(block.init(rng, features, 1, 1.0), rng),
                "x": rng.normal(size=shape),
                "num_heads": heads,
                "gelu": kind,
                "epsilon": 0.1,
                "keep": block.draw_keep(rng, shape, 0.3),
                "dropout_rate": 0.3,
            }
        )
    return points


def _block_backward_points(rng: Rng) -> Sequence[Point]:
    points = []
    for point in _block_points(rng):
        y, cache = block.forward(**point)
        points.append({"params": point["params"], "dy": rng.normal(size=y.shape), "cache": cache})
    return points


def _without_dropout(params: Tree, dy: Array, cache: Tree) -> Any:
    nothing = {"attention_dropout": None, "feed_forward_dropout": None}
    return block.backward(params, dy, {**cache, **nothing})


def _second_sum_from_dy(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = block.backward(params, dy, cache)
    dbranch = dropout.backward(dy, cache["feed_forward_dropout"])
    dh = dy + _branch_gradient(params, dbranch, cache)
    return dx - dh + dy, grads


def _branch_gradient(params: Tree, dbranch: Array, cache: Tree) -> Array:
    dbranch, _ = feed_forward.backward(params["feed_forward"], dbranch, cache["feed_forward"])
    dbranch, _ = layer_norm.backward(
        params["feed_forward_norm"], dbranch, cache["feed_forward_norm"]
    )
    return dbranch


def _attention_from_dy(params: Tree, dy: Array, cache: Tree) -> Any:
    _, grads = block.backward(params, dy, cache)
    dbranch = dropout.backward(dy, cache["feed_forward_dropout"])
    dh = dy + _branch_gradient(params, dbranch, cache)
    wrong = dropout.backward(dy, cache["attention_dropout"])
    wrong, of_attention = attention.backward(params["attention"], wrong, cache["attention"])
    wrong, of_norm = layer_norm.backward(params["attention_norm"], wrong, cache["attention_norm"])
    return dh + wrong, {**grads, "attention": of_attention, "attention_norm": of_norm}


BLOCK = Exercise(
    "block",
    "a pre-norm transformer block and its backward, from the layers",
    "feed-forward-and-block.md",
    (
        Part("forward", block.forward, ("y", None), _block_points),
        Part(
            "backward",
            block.backward,
            ("dx", "grads"),
            _block_backward_points,
            {"dx": "at x + f(x) the gradient goes both ways, and there are two such sums"},
            {
                "dropout is passed over on the way back: its mask belongs to each branch": (
                    _without_dropout
                ),
                "the second sum is dy + …, where dh + … belongs: what came back through the "
                "feed-forward branch is lost": _second_sum_from_dy,
                "the attention branch gets dy, where dh belongs": _attention_from_dy,
            },
        ),
    ),
    (
        "h = x + dropout(attention(norm(x))), y = h + dropout(feed_forward(norm(h))). What does dh "
        "consist of?",
        "dh = dy + what comes back through dropout, feed-forward and norm from dy; dx = dh + what "
        "comes back through dropout, attention and norm from dh.",
        "Six backwards, last first: dropout, feed_forward, layer_norm, then dropout, attention, "
        "layer_norm, each with its part of params and cache; gradients under the parts' names.",
    ),
    is_long=True,
)
