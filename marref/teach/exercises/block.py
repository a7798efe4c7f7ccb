"""Exercises on dropout and the block."""

from collections.abc import Sequence
from typing import Any

from marref.layers import attention, block, dropout, feed_forward, layer_norm
from marref.teach.exercise import Exercise, Part, Point, Rng, after_forward, drawn
from marref.trees import Array, Tree


def _dropout_points(rng: Rng) -> Sequence[Point]:
    return [
        {"x": rng.normal(size=shape), "keep": rng.random(shape) >= rate, "rate": rate}
        for shape, rate in (((3, 4), 0.3), ((2, 3, 5), 0.6))
    ]


def _dropping(mask: Any) -> Any:
    def forward(x: Array, keep: Array, rate: float) -> Any:
        return x * mask(keep, rate), mask(keep, rate)

    return forward


def _scale_not_kept(x: Array, keep: Array, rate: float) -> Any:
    return dropout.forward(x, keep, rate)[0], keep.astype(float)


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
            {
                "y": "y = x ⊙ m with m = 0 or 1/(1 - p)",
                "cache": "the cache is m, 0 or 1/(1 - p)",
            },
            {
                "what is kept is not scaled by 1/(1 - p), so that the mean of y shrinks": _dropping(
                    lambda keep, rate: keep.astype(float)
                ),
                "what is kept is divided by the share that is kept in this draw, not by its mean, "
                "1 - p": _dropping(lambda keep, rate: keep / keep.mean()),
                "the cache lacks the scale 1/(1 - p): it is what x is multiplied by": (
                    _scale_not_kept
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
            after_forward(dropout.forward, _dropout_points),
            {"dx": "∂y_i/∂x_i = m_i"},
            {
                "dx = dy: the gradient of what is dropped is 0": lambda dy, cache: dy,
                "dx is divided by m, not multiplied: dy/0 where something is dropped": (
                    lambda dy, cache: dy / cache
                ),
                "dx has the scale twice: it is in m already": lambda dy, cache: (
                    dy * cache * cache.max()
                ),
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


def _with(**changes: Any) -> Any:
    """Compute forward with some arguments changed, each by a function of them all."""

    def forward(**point: Any) -> Any:
        return block.forward(**{**point, **{name: f(point) for name, f in changes.items()}})

    return forward


def _branches_with(
    *, sums_dropped: bool = False, normalised: bool = True, second_from_x: bool = False
) -> Any:
    """Compute with dropout on the sums, without the second norm, or with the second sum from x."""

    def forward(**point: Any) -> Any:
        params, x, epsilon = (point[name] for name in ("params", "x", "epsilon"))

        def added(stream: Array, branch: Array, name: str) -> Array:
            keep, rate = point["keep"][name], point["dropout_rate"]
            if sums_dropped:
                return dropout.forward(stream + branch, keep, rate)[0]
            return stream + dropout.forward(branch, keep, rate)[0]

        branch, _ = layer_norm.forward(params["attention_norm"], x, epsilon)
        branch, _ = attention.forward(params["attention"], branch, point["num_heads"])
        branch = h = added(x, branch, "attention")
        if normalised:
            branch, _ = layer_norm.forward(params["feed_forward_norm"], h, epsilon)
        branch, _ = feed_forward.forward(params["feed_forward"], branch, point["gelu"])
        return added(x if second_from_x else h, branch, "feed_forward"), None

    return forward


_BRANCHES = (("feed_forward", feed_forward), ("attention", attention))


def _backward_with(*, sums_dropped: bool = False, with_norms: bool = True) -> Any:
    """Compute with dropout on the sums instead of the branches, or with the norms passed over."""

    def backward(params: Tree, dy: Array, cache: Tree) -> Any:
        dx, grads = dy, {}
        for name, layer in _BRANCHES:
            norm = f"{name}_norm"
            dropped = dropout.backward(dx, cache[f"{name}_dropout"])
            dlayer, grads[name] = layer.backward(params[name], dropped, cache[name])
            dnorm, grads[norm] = layer_norm.backward(params[norm], dlayer, cache[norm])
            dx = (dropped if sums_dropped else dx) + (dnorm if with_norms else dlayer)
        return dx, grads

    return backward


def _dropouts_swapped(params: Tree, dy: Array, cache: Tree) -> Any:
    swapped = {
        "attention_dropout": cache["feed_forward_dropout"],
        "feed_forward_dropout": cache["attention_dropout"],
    }
    return block.backward(params, dy, {**cache, **swapped})


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
        Part(
            "forward",
            block.forward,
            ("y", None),
            _block_points,
            {"y": "each branch is norm, layer, dropout, and is added to what the norm has read"},
            {
                "dropout acts on the whole sum; it belongs to the branch alone": _branches_with(
                    sums_dropped=True
                ),
                "the feed-forward layer reads h without its norm": _branches_with(normalised=False),
                "the second sum is x + …, where h + … belongs: attention's branch is lost": (
                    _branches_with(second_from_x=True)
                ),
                "dropout is left out": _with(keep=lambda point: None),
                "both branches drop what the first drops": _with(
                    keep=lambda point: dict.fromkeys(point["keep"], point["keep"]["attention"])
                ),
                "the second norm has the parameters of the first": _with(
                    params=lambda point: {
                        **point["params"],
                        "feed_forward_norm": point["params"]["attention_norm"],
                    }
                ),
            },
        ),
        Part(
            "backward",
            block.backward,
            ("dx", "grads"),
            after_forward(block.forward, _block_points),
            {"dx": "at x + f(x) the gradient goes both ways, and there are two such sums"},
            {
                "dropout is passed over on the way back: its mask belongs to each branch": (
                    _without_dropout
                ),
                "the branches have each other's dropout": _dropouts_swapped,
                "the skip passes through dropout too, as if it acted on the sum: it belongs to the "
                "branch alone": _backward_with(sums_dropped=True),
                "the norms are passed over on the way back": _backward_with(with_norms=False),
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
