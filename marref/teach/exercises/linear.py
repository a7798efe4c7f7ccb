"""Exercise on the linear layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref.layers import linear
from marref.teach.exercise import Exercise, Part, Point, Rng, after_forward, drawn
from marref.trees import Array, Tree


def _linear_points(rng: Rng) -> Sequence[Point]:
    return [
        {"params": drawn(linear.init(rng, *sizes, 1.0), rng), "x": rng.normal(size=shape)}
        for sizes, shape in (((4, 4), (3, 4)), ((3, 5), (2, 4, 3)))
    ]


def _averaged(over: Any) -> Any:
    def backward(params: Tree, dy: Array, cache: Array) -> Any:
        dx, grads = linear.backward(params, dy, cache)
        return dx, {name: grad / over(dy) for name, grad in grads.items()}

    return backward


def _last_row_only(params: Tree, dy: Array, cache: Array) -> Any:
    dx, _ = linear.backward(params, dy, cache)
    last = dy.reshape(-1, dy.shape[-1])[-1:], cache.reshape(-1, cache.shape[-1])[-1:]
    return dx, linear.backward(params, *last)[1]


def _without_dy(params: Tree, dy: Array, cache: Array) -> Any:
    dx, _ = linear.backward(params, dy, cache)
    _, grads = linear.backward(params, np.ones_like(dy), cache)
    return dx, {**grads, "bias": np.ones_like(grads["bias"])}


def _rows_counted(params: Tree, dy: Array, cache: Array) -> Any:
    return linear.backward(params, dy, cache)[0], linear.backward(
        params, np.ones_like(dy), np.ones_like(cache)
    )[1]


LINEAR = Exercise(
    "linear",
    "y = x W + b, and its three gradients",
    "linear.md",
    (
        Part("forward", linear.forward, ("y", None), _linear_points),
        Part(
            "backward",
            linear.backward,
            ("dx", "grads"),
            after_forward(linear.forward, _linear_points),
            {
                "dx": "dx_i = Σ_j dy_j W_ij",
                "grads.kernel": "dW_ij = Σ_rows x_i dy_j",
                "grads.bias": "db_j = Σ_rows dy_j",
            },
            {
                "divided by the number of rows; the rows' gradients add up": _averaged(
                    lambda dy: dy[..., 0].size
                ),
                "divided by the size of the batch, the first axis; the gradients add up": _averaged(
                    len
                ),
                "only the last row counts, as if in a loop each row replaced the one before; the "
                "rows' gradients add up": _last_row_only,
                "the number of rows: ∂y/∂b = 1 is summed, and dy is missing": _rows_counted,
                "dy is missing: it multiplies ∂y/∂W and ∂y/∂b, before the sum over the rows": (
                    _without_dy
                ),
            },
        ),
    ),
    (
        "Write y_j of one row as a sum. Which x_i, W_ij and b_j does it hold, times what?",
        "dx = dy Wᵀ. All rows share W and b, so that their gradients are sums over all rows: over "
        "every axis but the last.",
        "With the rows stacked to [rows, features], dW = xᵀ dy and db is dy summed over axis 0; x "
        "and dy may have any number of leading axes.",
    ),
)
