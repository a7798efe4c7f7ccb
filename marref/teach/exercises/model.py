"""Exercise on the whole model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref import model
from marref.layers import block, dropout, embedding, linear
from marref.teach.exercise import Exercise, Part, Point, Rng, drawn
from marref.trees import Array, Tree

_MODEL = model.MAR(
    vocab_size=7, embed_dim=4, num_layers=2, num_heads=2, seq_len=5, dropout=0.3, gelu="tanh"
)


def model_backward(params: Tree, dlogits: Array, cache: Tree) -> Tree:
    """Push dlogits back to every parameter; `marref.model.MAR.backward` without its checks."""
    return _MODEL.backward(params, dlogits, cache)


def _model_points(rng: Rng) -> Sequence[Point]:
    params = drawn(_MODEL.init(rng), rng)
    tokens = np.array([[3, 0, 5, 3, 0], [1, 6, 0, 2, 2]])
    logits, cache = _MODEL.forward(params, tokens, rng)
    return [{"params": params, "dlogits": rng.normal(size=logits.shape), "cache": cache}]


def _through(
    order: Any = reversed,
    *,
    with_dropout: bool = True,
    with_norm: bool = True,
    dropout_first: bool = False,
    pass_on: Any = lambda dx, dblock: dblock,
) -> Any:
    """Compute the backward with blocks in an order, passing on, and with steps left out or moved.

    pass_on: what the next block gets, of what this one got and what it returned.
    """

    def backward(params: Tree, dlogits: Array, cache: Tree) -> Tree:
        dx, head = model.head_backward(params, dlogits, cache)
        if not with_norm:
            dx, _ = linear.backward(params["head"], dlogits, cache["head"])
        if dropout_first:
            dx = dropout.backward(dx, cache["embedding_dropout"])
        blocks: list[Any] = [None] * len(params["blocks"])
        for index in order(range(len(blocks))):
            dblock, blocks[index] = block.backward(
                params["blocks"][index], dx, cache["blocks"][index]
            )
            dx = pass_on(dx, dblock)
        if with_dropout and not dropout_first:
            dx = dropout.backward(dx, cache["embedding_dropout"])
        return {
            "embedding": embedding.backward(params["embedding"], dx, cache["embedding"]),
            "blocks": blocks,
            **head,
        }

    return backward


def _blocks_last_first(params: Tree, dlogits: Array, cache: Tree) -> Tree:
    grads = model_backward(params, dlogits, cache)
    return {**grads, "blocks": grads["blocks"][::-1]}


def _all_from_the_norm(params: Tree, dlogits: Array, cache: Tree) -> Tree:
    grads = _through(pass_on=lambda dx, dblock: dx)(params, dlogits, cache)
    dx, _ = model.head_backward(params, dlogits, cache)
    dx, _ = block.backward(params["blocks"][0], dx, cache["blocks"][0])
    dx = dropout.backward(dx, cache["embedding_dropout"])
    return {**grads, "embedding": embedding.backward(params["embedding"], dx, cache["embedding"])}


MODEL = Exercise(
    "model",
    "the whole model's backward, from the layers",
    "architecture.md",
    (
        Part(
            "backward",
            model_backward,
            ("grads",),
            _model_points,
            {
                "grads.embedding.table": "the last of all: what comes out of the first block goes "
                "back through dropout, and is scattered to the table"
            },
            {
                "the blocks are passed in the order of the forward pass, where the last must come "
                "first": _through(lambda blocks: blocks),
                "the blocks' gradients are right, but stand last first, as they were computed": (
                    _blocks_last_first
                ),
                "every block gets the gradient of the final norm, where only the last one does; "
                "the others get the dx of the block after": _all_from_the_norm,
                "the skip is counted twice: block.backward adds what goes past the branches": (
                    _through(pass_on=lambda dx, dblock: dx + dblock)
                ),
                "the dropout after the embedding is passed over": _through(with_dropout=False),
                "the dropout after the embedding comes before the blocks, as in the forward pass; "
                "on the way back it comes after them": _through(dropout_first=True),
                "the final norm is passed over on the way back": _through(with_norm=False),
            },
        ),
    ),
    (
        "logits = linear(layer_norm(x)) after the last block; before the first stand dropout and "
        "the embedding. Read it from bottom to top.",
        "head, final norm, blocks from last to first, dropout, embedding: five kinds of backward, "
        "all in marref.layers; the caches are cache['head'], cache['final_norm'], "
        "cache['blocks'][i], cache['embedding_dropout'] and cache['embedding'].",
        "Collect the blocks' gradients in the order of the blocks, and return a tree like params: "
        "embedding, blocks, final_norm, head.",
    ),
    is_long=True,
)
