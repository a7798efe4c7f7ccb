"""The model at the positions that are needed, in shares that threads take.

The loss and the decoder look at the masked positions.  So the head and, in the last block, the
queries and the feed-forward layer are computed at these positions.  A batch is cut into shares,
which hold down the memory and give threads something to do; the result is that of the whole
batch, up to rounding.
"""

import copy
import math
import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, loss, parallel, trees
from marref.layers import attention, embedding, feed_forward, layer_norm
from marref.layers.dropout import Uniforms
from marref.model import (
    MAR,
    blocks_with_rows,
    body_backward,
    body_forward,
    check_model,
    encode,
    head_backward,
    head_forward,
)
from marref.trees import Array, Index, Tree

# The most logits that a thread has in training.
_LOGITS_AT_ONCE = 2**21

# The most features, batch·length·embed_dim, that a thread trains on at a time.
_SHARE = 2**18


def loss_and_grads(
    model: MAR,
    params: Tree,
    tokens: npt.ArrayLike,
    targets: npt.ArrayLike,
    mask: npt.ArrayLike,
    rng: np.random.Generator | None = None,
    *,
    num_threads: int = 1,
) -> tuple[np.inexact, Tree]:
    """Run the model, the loss, and both backward passes.

    Equal to `MAR.forward`, `marref.loss` and `MAR.backward` one after the other, up to rounding.
    No other positions than the masked ones reach the loss, so the head runs at these only, and
    so does the last block, but for its keys and values.

    Parameters
    ----------
    model : MAR
    params : dict
    tokens : integer array [batch, length]
        The inputs: [MASK] where masked.
    targets : integer array [batch, length]
        The true ids.
    mask : array [batch, length]
        True (or 1) where a position was masked.
    rng : numpy.random.Generator, optional
        Given: dropout is on.
    num_threads : int
        More than 1: that many threads share the batch, see `marref.parallel.threads`.  The same
        number gives the same bits, another one the same result up to rounding.

    Returns
    -------
    loss : scalar
        Nats per masked token, in the dtype of the parameters.
    grads : dict
        A tree like ``params``.

    Raises
    ------
    TypeError, ValueError
        See `MAR.forward` and `marref.loss.mar_loss`.
    """
    check_model(model)
    tokens = model.check_inputs(params, tokens)
    targets = checks.token_ids("targets", targets, model.vocab_size)
    checks.shape("targets", targets, tokens.shape)
    mask = checks.binary_mask("mask", mask, tokens.shape)
    if rng is not None:
        checks.generator("rng", rng)
    num_threads = checks.integer("num_threads", num_threads, 1)

    num_masked = max(int(mask.sum()), 1)

    def share(where: slice, rng: Uniforms | None) -> tuple[np.inexact, Tree]:
        return _loss_and_grads(
            model, params, tokens[where], targets[where], mask[where], rng, num_masked
        )

    at_once = max(1, _SHARE // (tokens.shape[1] * model.embed_dim)) * num_threads
    num_rounds = math.ceil(len(tokens) / at_once)
    wheres = parallel.split(len(tokens), num_rounds * num_threads)
    rngs = [rng, *(copy.deepcopy(rng) for _ in wheres[1:])]
    draws = [
        rng and _Sequences(rng, where, len(tokens)) for rng, where in zip(rngs, wheres, strict=True)
    ]
    value: Any = 0.0
    sums: list[Tree] = []
    with parallel.threads(min(num_threads, len(wheres))) as run:
        # One share a thread at a time: what the others need takes no memory yet.
        for first in range(0, len(wheres), num_threads):
            group = slice(first, first + num_threads)
            values, grads = zip(*run(share, wheres[group], draws[group]), strict=True)
            value += sum(values)
            sums = [_add_up(run, *sums, *grads)]
            del grads  # The next round makes its own.
    return value, sums[0]


def _loss_and_grads(
    model: MAR,
    params: Tree,
    tokens: Array,
    targets: Array,
    mask: Array,
    rng: Uniforms | None,
    num_masked: int,
) -> tuple[np.inexact, Tree]:
    """Compute what some sequences add to the loss and to the gradients, |M| being num_masked."""
    rows, mask_of_rows = _masked_rows(mask)
    # Weights that would take as much memory as all else that a block keeps are let go.
    keep_weights = model.num_heads * tokens.shape[1] < 16 * model.embed_dim
    x, cache = body_forward(model, params, tokens, rng, rows, keep_weights)
    value, drows, head_grads = _head_loss_and_grads(
        model, params, x[mask_of_rows], targets[mask], num_masked
    )
    dx = np.zeros_like(x)
    dx[mask_of_rows] = drows
    return value, {**body_backward(model, params, dx, cache, rows), **head_grads}


def _head_loss_and_grads(
    model: MAR, params: Tree, x: Array, targets: Array, num_masked: int
) -> tuple[np.inexact, Array, Tree]:
    """Do the head's part, at a few positions at a time: logits are large."""

    def of_part(part: slice) -> tuple[np.inexact, Array, Tree]:
        logits, cache = head_forward(model, params, x[part])
        checks.finite("logits", logits)
        value, loss_cache = loss.rows_forward(logits, targets[part], num_masked)
        del logits
        return value, *head_backward(params, loss.rows_backward(loss_cache), cache)

    value: Any = 0.0
    dx = np.empty_like(x)
    sums: list[Tree] = []
    rows_at_once = max(1, _LOGITS_AT_ONCE // model.vocab_size)
    for part in parallel.split(len(x), math.ceil(len(x) / rows_at_once)):
        part_value, dx[part], grads = of_part(part)
        value += part_value
        sums = [_add_up(parallel.one_by_one, *sums, grads)]
        del grads
    return value, dx, sums[0]


def _add_up(run: parallel.Run, total: Tree, *terms: Tree) -> Tree:
    """Add trees to the first of them, in place."""
    for term in terms:
        run(operator.iadd, *zip(*trees.pieces(total, term), strict=True))
    return total


def encode_masked(
    model: MAR, params: Tree, tokens: Array, mask: Array, run: parallel.Run, num_threads: int
) -> Array:
    """Do as `encode`, for the masked positions: -> x [masked, embed_dim], in threads.

    The threads share the sequences or, if there are more threads than sequences, each block.
    """

    def share(part: slice) -> Array:
        rows, mask_of_rows = _masked_rows(mask[part])
        return encode(model, params, tokens[part], rows)[mask_of_rows]

    if num_threads <= len(tokens):
        return np.concatenate(run(share, parallel.split(len(tokens), num_threads)))

    rows, mask_of_rows = _masked_rows(mask)
    x, _ = embedding.forward(params["embedding"], tokens, model.positions)
    for block_params, block_rows in blocks_with_rows(params, rows):
        x = _shared_block(model, block_params, x, block_rows, run, num_threads)
    return x[mask_of_rows]


def _shared_block(
    model: MAR, block_params: Tree, x: Array, rows: Index, run: parallel.Run, num_threads: int
) -> Array:
    """Do as `block_forward` without dropout.  Threads share the heads, and then the positions."""
    source, _ = layer_norm.forward(block_params["attention_norm"], x, model.layer_norm_epsilon)

    def attend(heads: slice) -> Array:
        params = _of_heads(block_params["attention"], heads, model.embed_dim // model.num_heads)
        return attention.forward(params, source, heads.stop - heads.start, rows)[0]

    def feed_forward_branch(part: slice) -> Array:
        norm, kernels = block_params["feed_forward_norm"], block_params["feed_forward"]
        source, _ = layer_norm.forward(norm, x[:, part], model.layer_norm_epsilon)
        return feed_forward.forward(kernels, source, model.gelu)[0]

    x = x[rows] + sum(run(attend, parallel.split(model.num_heads, num_threads)))
    x += np.concatenate(run(feed_forward_branch, parallel.split(x.shape[1], num_threads)), axis=1)
    return x


def _of_heads(params: Tree, heads: slice, head_dim: int) -> Tree:
    """Make views of what an attention layer has for some heads; the outputs of all heads add up."""
    features = slice(heads.start * head_dim, heads.stop * head_dim)
    projections = {
        name: {
            "kernel": params[name]["kernel"][:, features],
            "bias": params[name]["bias"][features],
        }
        for name in ("query", "key", "value")
    }
    kernel, bias = params["output"]["kernel"], params["output"]["bias"]
    bias = bias if heads.start == 0 else np.zeros_like(bias)
    return {**projections, "output": {"kernel": kernel[features], "bias": bias}}


def _masked_rows(mask: Array) -> tuple[tuple[Array, Array], Array]:
    """Choose the positions that the last block has to compute.

    Parameters
    ----------
    mask : bool array [batch, length]

    Returns
    -------
    rows : index
        x[rows] is [batch, rows, ...], with as many rows as any sequence has masked positions:
        its own masked positions in order, and others after them where it has fewer.
    mask_of_rows : bool array [batch, rows]
        ``mask[rows]``: x[rows][mask_of_rows] is x[mask].
    """
    order = np.argsort(~mask, axis=1, kind="stable")[:, : mask.sum(axis=1).max()]
    rows = np.arange(len(mask))[:, np.newaxis], order
    return rows, mask[rows]


class _Sequences:
    """The random numbers of some sequences of a batch, as if those of all of it were drawn."""

    def __init__(self, rng: np.random.Generator, where: slice, batch_size: int) -> None:
        self._rng, self._before, self._after = rng, where.start, batch_size - where.stop

    def random(self, size: tuple[int, ...], dtype: type[np.float32]) -> Array:
        each = math.prod(size[1:])
        _skip(self._rng, self._before * each)
        numbers = self._rng.random(size, dtype)
        _skip(self._rng, self._after * each)
        return numbers


def _skip(rng: np.random.Generator, count: int) -> None:
    """Leave out as many numbers as ``rng.random(count, numpy.float32)`` draws."""
    bits = rng.bit_generator
    if isinstance(bits, np.random.PCG64 | np.random.PCG64DXSM):
        # It draws two of them at a time, and may have the second of a pair in store.
        if bits.state["has_uint32"]:
            rng.random(dtype=np.float32)
            count -= 1
        bits.advance(count // 2)
        count %= 2
    rng.random(count, np.float32)
