"""Exercise on the linear layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref.layers import linear
from marref.teach.exercise import Exercise, Part, Point, drawn
from marref.trees import Array, Tree

Rng = np.random.Generator


def _linear_points(rng: Rng) -> Sequence[Point]:
    return [
        {"params": drawn(linear.init(rng, *sizes, 1.0), rng), "x": rng.normal(size=shape)}
        for sizes, shape in (((4, 4), (3, 4)), ((3, 5), (2, 4, 3)))
    ]


def _linear_backward_points(rng: Rng) -> Sequence[Point]:
    points = []
    for point in _linear_points(rng):
        y, cache = linear.forward(**point)
        points.append({"params": point["params"], "dy": rng.normal(size=y.shape), "cache": cache})
    return points


def _kernel_gradient_averaged(params: Tree, dy: Array, cache: Array) -> Any:
    dx, grads = linear.backward(params, dy, cache)
    return dx, {**grads, "kernel": grads["kernel"] / dy[..., 0].size}


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
            _linear_backward_points,
            {
                "dx": "dx_i = Σ_j dy_j W_ij",
                "grads.kernel": "dW_ij = Σ_rows x_i dy_j",
                "grads.bias": "db_j = Σ_rows dy_j",
            },
            {
                "dW is divided by the number of rows; the rows' gradients add up": (
                    _kernel_gradient_averaged
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
