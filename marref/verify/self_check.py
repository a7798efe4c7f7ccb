"""``marref check``: every gradient of marref, held to numerical derivatives on this machine."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from marref import loss, trees
from marref.fast import loss_and_grads
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
from marref.loss import mar_loss
from marref.masking import mask_tokens
from marref.model import MAR
from marref.trees import Array, Tree
from marref.verify.gradients import METHODS, check_gradients, check_layer

BOUNDS = {"complex-step": 1e-12, "central": 1e-6}
"""The largest error that passes, relative to the largest entry of the gradient."""

_BATCH, _LENGTH, _FEATURES, _HEADS, _VOCAB, _CLASSES = 2, 5, 8, 2, 7, 3
_EPSILON, _DROPOUT = 1e-5, 0.2


class Row(NamedTuple):
    """One line of the report: the errors of one gradient, by method."""

    part: str
    name: str
    shape: tuple[int, ...]
    errors: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound; NaN is not."""
        return all(self.errors[method] <= bound for method, bound in BOUNDS.items())


class Layer(NamedTuple):
    """A layer's forward and backward as functions of one tree of inputs and parameters."""

    forward: Callable[[Tree], tuple[Array, Any]]
    backward: Callable[[Tree, Array, Any], Tree]
    point: Tree


def run(seed: int = 0) -> Iterator[Row]:
    """Check all layers, the loss, and a small model with dropout and classes.

    Parameters
    ----------
    seed : int
        Of inputs and parameters.

    Yields
    ------
    Row
        One for each input and parameter of each part.
    """
    rng = np.random.default_rng(seed)
    for part, layer in _layers(rng).items():
        errors = {method: check_layer(*layer, rng, method=method) for method in METHODS}
        yield from rows_of(part, layer.point, errors)
    yield from _check_loss(rng)
    yield from _check_model(rng)


def rows_of(part: str, point: Tree, errors: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Make the lines of a part from the errors by method and name."""
    for name, leaf in trees.flatten(point).items():
        yield Row(part, name, leaf.shape, {method: errors[method][name] for method in METHODS})


def random_like(params: Tree, rng: np.random.Generator, std: float = 0.5) -> Tree:
    """Draw every leaf from N(0, std²): no bias is 0 and no scale is 1, so that nothing hides."""
    drawn: Tree = trees.map_leaves(lambda leaf: rng.normal(0.0, std, leaf.shape), params)
    return drawn


def _layers(rng: np.random.Generator) -> dict[str, Layer]:
    x = rng.normal(size=(_BATCH, _LENGTH, _FEATURES))
    tokens = rng.integers(_VOCAB, size=(_BATCH, _LENGTH))
    labels = rng.integers(_CLASSES, size=_BATCH, endpoint=True)
    layer = functools.partial(layer_of, x, rng)
    keep = dropout.draw(rng, x.shape, _DROPOUT)
    of_block = functools.partial(
        block.forward,
        num_heads=_HEADS,
        gelu="erf",
        epsilon=_EPSILON,
        keep=block.draw_keep(rng, x.shape, _DROPOUT),
        dropout_rate=_DROPOUT,
    )
    return {
        "embedding": Layer(
            lambda point: embedding.forward(point, tokens, "concatenated"),
            embedding.backward,
            random_like(embedding.init(rng, _VOCAB, _FEATURES, 1.0), rng),
        ),
        "classes": layer(
            class_embedding.init(rng, _CLASSES, _FEATURES, 1.0),
            lambda params, x: class_embedding.forward(params, x, labels),
            class_embedding.backward,
        ),
        "linear": layer(linear.init(rng, _FEATURES, 3, 1.0), linear.forward, linear.backward),
        "layer_norm": layer(
            layer_norm.init(_FEATURES),
            lambda params, x: layer_norm.forward(params, x, _EPSILON),
            layer_norm.backward,
        ),
        "dropout": Layer(
            lambda point: dropout.forward(point["x"], keep, _DROPOUT),
            lambda point, dy, cache: {"x": dropout.backward(dy, cache)},
            {"x": x},
        ),
        "attend": Layer(
            lambda point: attention.attend(**point),
            lambda point, dy, cache: dict(
                zip(point, attention.attend_backward(dy, cache), strict=True)
            ),
            {
                name: rng.normal(size=(_BATCH, _HEADS, _LENGTH, _FEATURES // _HEADS))
                for name in ("query", "key", "value")
            },
        ),
        "attention": layer(
            attention.init(rng, _FEATURES, 1.0, 1.0),
            lambda params, x: attention.forward(params, x, _HEADS),
            attention.backward,
        ),
        "gelu (erf)": _gelu_layer(x, "erf"),
        "gelu (tanh)": _gelu_layer(x, "tanh"),
        "feed_forward": layer(
            feed_forward.init(rng, _FEATURES, 1.0, 1.0),
            lambda params, x: feed_forward.forward(params, x, "erf"),
            feed_forward.backward,
        ),
        "block": layer(block.init(rng, _FEATURES, 2, 1.0), of_block, block.backward),
    }


def layer_of(
    x: Array,
    rng: np.random.Generator,
    params: Tree,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Array, Tree]],
) -> Layer:
    """Take a layer with one input and parameters of its own, which are drawn."""

    def split_forward(point: Tree) -> tuple[Array, Any]:
        result: tuple[Array, Any] = forward(_params(point), point["x"])
        return result

    def split_backward(point: Tree, dy: Array, cache: Any) -> Tree:
        dx, grads = backward(_params(point), dy, cache)
        return {"x": dx, **grads}

    return Layer(split_forward, split_backward, {"x": x, **random_like(params, rng)})


def _gelu_layer(x: Array, kind: str) -> Layer:
    return Layer(
        lambda point: gelu.forward(point["x"], kind),
        lambda point, dy, cache: {"x": gelu.backward(dy, cache)},
        {"x": x},
    )


def _params(point: Tree) -> Tree:
    return {name: child for name, child in point.items() if name != "x"}


def _check_loss(rng: np.random.Generator) -> Iterator[Row]:
    point = {"logits": rng.normal(size=(_BATCH, _LENGTH, _VOCAB))}
    targets = rng.integers(_VOCAB, size=(_BATCH, _LENGTH))
    mask = rng.random((_BATCH, _LENGTH)) < 0.5
    grads = {"logits": loss.backward(loss.forward(point["logits"], targets, mask)[1])}
    errors = {
        method: check_gradients(
            lambda moved: mar_loss(moved["logits"], targets, mask), point, grads, method=method
        )
        for method in METHODS
    }
    yield from rows_of("loss", point, errors)


def _check_model(rng: np.random.Generator) -> Iterator[Row]:
    model = MAR(
        vocab_size=_VOCAB,
        embed_dim=_FEATURES,
        num_layers=2,
        num_heads=_HEADS,
        seq_len=_LENGTH,
        dropout=0.1,
        num_classes=_CLASSES,
    )
    params = random_like(model.init(rng), rng)
    targets = rng.integers(1, _VOCAB, size=(_BATCH, _LENGTH))
    tokens, mask = mask_tokens(targets, 0.6, rng)
    labels = np.array([1, _CLASSES])
    _, grads = loss_and_grads(
        model, params, tokens, targets, mask, np.random.default_rng(0), labels=labels
    )

    def function(moved: Tree) -> Any:
        logits, _ = model.forward(moved, tokens, np.random.default_rng(0), labels)
        return mar_loss(logits, targets, mask)

    errors = {method: check_gradients(function, params, grads, method=method) for method in METHODS}
    yield from rows_of("model", params, errors)
