"""Faults of the block: norms, branches, residual stream, dropout.

A block is put together from maps, each with its backward; so the gradients follow by themselves.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from marref import trees
from marref.layers import attention, block, dropout, feed_forward, layer_norm
from marref.model import MAR
from marref.trees import Array, Tree
from marref.verify import trace
from marref.verify.faults.fault import Fault, Stage

fault = Stage()

Map = Callable[[Array, bool], Array]
"""``map(x, back)``: a map of the residual stream or, ``back``, what pushes gradients through it."""

_LAYERS: dict[str, tuple[Any, str]] = {
    "attention_norm": (layer_norm, "epsilon"),
    "attention": (attention, "num_heads"),
    "feed_forward_norm": (layer_norm, "epsilon"),
    "feed_forward": (feed_forward, "gelu"),
}


def chain(*maps: Map) -> Map:
    """Apply one map after the other; gradients go back through the last first."""
    return lambda x, back: functools.reduce(
        lambda x, part: part(x, back), maps[::-1] if back else maps, x
    )


def _plus(first: Map, second: Map) -> Map:
    """Add what two maps make of x; what comes back through them adds, too."""
    return lambda x, back: first(x, back) + second(x, back)


_X = chain()


def _part(name: str, params: Tree, cache: Tree, options: Tree, grads: Tree) -> Map:
    """Make a layer of the block, with its dropout, a map that fills the cache, or the gradients."""
    layer, option = _LAYERS[name]
    dropped = "" if layer is layer_norm else f"{name}_dropout"

    def run(x: Array, back: bool) -> Any:
        if back:
            dy = dropout.backward(x, cache[dropped]) if dropped else x
            dx, grads[name] = layer.backward(params[name], dy, cache[name])
            return dx
        y, cache[name] = layer.forward(params[name], x, options[option])
        if dropped:
            keep = (options.get("keep") or {}).get(name)
            y, cache[dropped] = dropout.forward(y, keep, options.get("dropout_rate", 0.0))
        return y

    return run


def _block_of(fault: Fault, arrange: Callable[..., Map]) -> None:
    """Put the parts of the block together in another way."""

    @fault.replaces(block.forward)
    def _(params: Tree, x: Array, **options: Any) -> tuple[Array, Tree]:
        cache: Tree = {}
        y = arrange(*(_part(name, params, cache, options, {}) for name in _LAYERS))(x, False)
        return y, {**cache, "output": y}

    backward_of(fault, arrange)


def backward_of(fault: Fault, arrange: Callable[..., Map]) -> None:
    """Push gradients back as if the parts were put together in another way."""

    @fault.replaces(block.backward)
    def _(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
        grads: Tree = {}
        dx = arrange(*(_part(name, params, cache, {}, grads) for name in _LAYERS))(dy, True)
        return dx, {name: grads[name] for name in params}


def _post_norm(norm1: Map, f1: Map, norm2: Map, f2: Map) -> Map:
    return chain(_plus(_X, f1), norm1, _plus(_X, f2), norm2)


fault("block-post-norm").says(
    "x = norm(x + branch(x)), the block of the first transformer, of BERT and of MaskGIT; MAR "
    "normalises what the branch reads. The branches read the residual stream as it is, and the "
    "stream itself has the size of the norm's scale."
).of(_block_of)(_post_norm)
hooked = fault("block-post-norm-hooked").says(
    "x = norm(x + branch(x)), and under the names of the norms what these return, as forward hooks "
    "save it. Golden vectors have there what the branches read, which is the same in MAR only."
)
_block_of(hooked, _post_norm)


@hooked.wraps(trace.activations)
def _(old: Callable[..., dict[str, Array]], model: MAR, *args: Any) -> dict[str, Array]:
    named = old(model, *args)
    for name in (f"blocks.{index}" for index in range(model.num_layers)):
        named[f"{name}.attention_norm"] = named[f"{name}.feed_forward_norm"]
        named[f"{name}.feed_forward_norm"] = named[f"{name}.output"]
    return named


fault("block-parallel").says(
    "Attention and feed-forward read the same x and their results are added together, as in GPT-J; "
    "in MAR the feed-forward layer reads what attention has added to. All is right up to the "
    "feed-forward norm."
).of(_block_of)(lambda norm1, f1, norm2, f2: _plus(_plus(_X, chain(norm1, f1)), chain(norm2, f2)))
fault("residual-from-normalised").says(
    "The branch is added to the normalised x instead of x itself: the variable is overwritten by "
    "the norm. The attention layer is right and the residual stream after it is not."
).of(_block_of)(lambda norm1, f1, norm2, f2: chain(norm1, _plus(_X, f1), norm2, _plus(_X, f2)))
fault("residual-around-attention-from-normalised").says(
    "The attention branch is added to the normalised x instead of x itself; the feed-forward "
    "branch is added to the residual stream. Attention is right and the norm after it is not."
).of(_block_of)(
    lambda norm1, f1, norm2, f2: chain(norm1, _plus(_X, f1), _plus(_X, chain(norm2, f2)))
)
fault("residual-around-feed-forward-from-normalised").says(
    "The feed-forward branch is added to the normalised x instead of x itself; the attention "
    "branch is added to the residual stream. All branches of the first block are right, its output "
    "is not."
).of(_block_of)(
    lambda norm1, f1, norm2, f2: chain(_plus(_X, chain(norm1, f1)), norm2, _plus(_X, f2))
)
fault("residual-around-attention-missing").says(
    "x = attention(norm(x)): what the stream held is lost. Attention's output is right, the norm "
    "after it is not."
).of(_block_of)(lambda norm1, f1, norm2, f2: chain(norm1, f1, _plus(_X, chain(norm2, f2))))
fault("residual-around-feed-forward-missing").says(
    "x = feed_forward(norm(x)): what the stream held is lost. All branches of the first block are "
    "right, its output is not."
).of(_block_of)(lambda norm1, f1, norm2, f2: chain(_plus(_X, chain(norm1, f1)), norm2, f2))


def _blocks_read_as(
    fault: Fault, read: Callable[[list[Tree]], list[Tree]], back: Callable[[list[Tree]], list[Tree]]
) -> None:
    """Compute with other blocks; ``back`` takes their gradients to those of the blocks given."""

    @fault.wraps(MAR.forward)
    def _(old: Any, model: MAR, params: Tree, *args: Any, **options: Any) -> Any:
        return old(model, {**params, "blocks": read(params["blocks"])}, *args, **options)

    @fault.wraps(MAR.backward)
    def _(old: Any, *args: Any, **options: Any) -> Tree:
        grads = old(*args, **options)
        return {**grads, "blocks": back(grads["blocks"])}

    @fault.wraps(block.forward)
    def _(old: Any, params: Tree, x: Array, **options: Any) -> Any:
        y, cache = old(params, x, **options)
        return y, {**cache, "params": params}

    @fault.wraps(block.backward)
    def _(old: Any, params: Tree, dy: Array, cache: Tree) -> Any:
        return old(cache["params"], dy, cache)


def _all_into_the_first(grads: list[Tree]) -> list[Tree]:
    zeros = trees.map_leaves(np.zeros_like, grads[0])
    return [trees.map_leaves(lambda *leaves: sum(leaves), *grads)] + [zeros] * (len(grads) - 1)


_blocks_read_as(
    fault("block-parameters-shared")
    .sets("blocks")
    .says(
        "Every block computes with the parameters of the first, as in ALBERT, or as from a list "
        "[block] * n. The first block is right. The gradients of the first are the sums of all, "
        "the others have none."
    ),
    lambda blocks: blocks[:1] * len(blocks),
    _all_into_the_first,
)
_blocks_read_as(
    fault("block-order-reversed")
    .sets("blocks")
    .says(
        "The last block comes first. The embedding is right, the first norm is not; blocks are "
        "counted here as they are computed."
    ),
    lambda blocks: blocks[::-1],
    lambda grads: grads[::-1],
)


@fault("dropout-left-on").wraps(dropout.forward)
def _(old: Any, x: Array, keep: Array | None, rate: float) -> Any:
    """Dropout is active in evaluation: model.eval() was forgotten. A tenth of the features is 0 and
    the others are larger by 1/0.9; a second run differs from the first. The places are drawn, so
    that no two implementations drop the same."""
    if keep is None:
        rate = rate or 0.1
        keep = dropout.draw(np.random.default_rng(0), x.shape, rate)
    return old(x, keep, rate)
