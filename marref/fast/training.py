"""Loss and gradients, computed where they are needed, in slices that threads take.

The loss looks at the masked positions.  So the head and, in the last block, the queries and the
feed-forward layer are computed at these positions.  A batch is cut into slices, which hold down
the memory and give threads something to do; the result is that of the whole batch, up to rounding.
"""

import functools
import math
import operator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from marref import checks, loss
from marref import model as definition
from marref.fast import block, kernels, memory, parallel
from marref.fast.kernels import (
    has_digits,
    linear,
    normalise,
    normalise_backward,
    remove_mean,
)
from marref.fast.packed import Packed, pack, unpack_gradients
from marref.fast.pieces import pieces
from marref.layers import class_embedding, embedding
from marref.model import MAR, check_model
from marref.trees import Array, Tree

# The most features, batch·length·embed_dim, that a thread trains on at a time.
_FEATURES_AT_ONCE = 2**18


def loss_and_grads(
    model: MAR,
    params: Tree,
    tokens: npt.ArrayLike,
    targets: npt.ArrayLike,
    mask: npt.ArrayLike,
    rng: np.random.Generator | None = None,
    *,
    label_smoothing: float = 0.0,
    labels: npt.ArrayLike | None = None,
    num_threads: int | None = None,
) -> tuple[np.inexact, Tree]:
    """Run the model and the loss forward, and both backward.

    Equal to `marref.model.loss_and_grads`, its definition, up to rounding.

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
    label_smoothing : float
        ε in [0, 1) of the loss (1 - ε) L + ε U; see `marref.loss.uniform`.
    labels : integer array [batch], optional
        See `MAR.forward`.
    num_threads : int, optional
        How many threads share the batch; by default as many as pay and there are cores, see
        docs/performance.md.  The same number gives the same bits, another one the same result up
        to rounding.

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
    labels = model.check_labels(labels, len(tokens))
    if rng is not None:
        checks.generator("rng", rng)
    label_smoothing = checks.real("label_smoothing", label_smoothing, "[0, 1)")
    num_threads = parallel.choose(
        num_threads, tokens.size * model.embed_dim, parallel.FEATURES_WORTH_A_THREAD
    )
    if params["head"]["bias"].dtype.kind == "c":
        return definition.loss_and_grads(
            model,
            params,
            tokens,
            targets,
            mask,
            rng,
            label_smoothing=label_smoothing,
            labels=labels,
        )

    memory.keep_by_default()
    at_once = max(1, _FEATURES_AT_ONCE // (tokens.shape[1] * model.embed_dim)) * num_threads
    num_rounds = math.ceil(len(tokens) / at_once)
    slices = parallel.split(len(tokens), num_rounds * num_threads)
    with parallel.threads(
        min(num_threads, len(slices)), blas_threads=max(1, num_threads // len(slices))
    ) as run:
        num_heads, centre = model.num_heads, rng is None or model.dropout == 0.0
        draw = functools.partial(model.draw_keep, rng, tokens.shape)
        of_block = functools.partial(pack, num_heads=num_heads, centre=centre)
        packs = [functools.partial(of_block, block_params) for block_params in params["blocks"]]
        keep, *blocks = run(operator.call, [draw, *packs])
        of_loss = max(int(mask.sum()), 1), label_smoothing
        work = _Work(model, params, blocks, tokens, labels, targets, mask, keep, *of_loss)
        value, dx, sums = _sum_of_slices(run, work, slices)
        unpack = functools.partial(unpack_gradients, num_heads=num_heads, centre=centre)
        block_grads = run(unpack, params["blocks"], [Packed(**packed) for packed in sums["blocks"]])
    table = _table_gradient(params["embedding"]["table"], tokens, dx)
    grads = {"embedding": {"table": table}, "blocks": block_grads}
    grads |= {name: sums[name] for name in ("final_norm", "head")}
    if labels is not None:
        _, grads["class_embedding"] = class_embedding.backward(
            params["class_embedding"], dx, {"labels": labels}
        )
    return value, grads


class _Work(NamedTuple):
    """What all slices of a call share; ``num_masked`` is |M|, of the whole batch."""

    model: MAR
    params: Tree
    blocks: list[Packed]
    tokens: Array
    labels: Array | None
    targets: Array
    mask: Array
    keep: Tree
    num_masked: int
    label_smoothing: float


def _sum_of_slices(
    run: parallel.Run, work: _Work, slices: list[slice]
) -> tuple[np.inexact, Array, Tree]:
    """Add up what the slices do; dx is that of the embeddings of the whole batch.

    One slice a thread at a time: what the others need takes no memory yet.
    """
    dtype = work.params["head"]["bias"].dtype
    value = dtype.type(0)
    sums: list[Tree] = []
    dx = np.empty((*work.tokens.shape, work.model.embed_dim), dtype)
    of_slice = functools.partial(_of_slice, work, dx)
    for first in range(0, len(slices), run.num_threads):
        values, grads = zip(*run(of_slice, slices[first : first + run.num_threads]), strict=True)
        value = sum(values, start=value)
        sums = [_add_up(run, *sums, *grads)]
        del grads  # The next round makes its own.
    return value, dx, sums[0]


def _of_slice(work: _Work, dx: Array, where: slice) -> tuple[np.inexact, Tree]:
    """Compute what some sequences add to the loss and to the gradients; write their dx."""
    model, rows = work.model, block.rows_of(work.mask[where])
    # Weights that would take as much memory as all else that a block keeps are let go.
    keep_weights = model.num_heads * work.tokens.shape[1] < 16 * model.embed_dim
    batch, features = where.stop - where.start, model.embed_dim
    x, _ = embedding.forward(work.params["embedding"], work.tokens[where], model.positions)
    if work.labels is not None:
        x, _ = class_embedding.forward(work.params["class_embedding"], x, work.labels[where])
    x = x.reshape(-1, features)
    embedding_drop = _drop(work, work.keep["embedding"], where, None)
    if embedding_drop is not None:
        x *= embedding_drop
    remove_mean(x)

    caches = []
    for index, packed in enumerate(work.blocks):
        at = rows if index == model.num_layers - 1 else None
        keep = work.keep["blocks"][index]
        drop = block.Drop(**{name: _drop(work, keep[name], where, at) for name in keep})
        x, cache = block.forward(model, packed, x, batch, drop, at, keep_weights=keep_weights)
        caches.append(cache)
    value, dstream, grads = _head(work, x, work.targets[where][work.mask[where]])
    blocks: list[Tree] = []
    for packed in reversed(work.blocks):
        # A cache is let go when it has been read.
        dstream, packed_grads = block.backward(model, packed, dstream, caches.pop())
        blocks.insert(0, packed_grads._asdict())
    remove_mean(dstream)
    if embedding_drop is not None:
        dstream *= embedding_drop
    dx[where] = dstream.reshape(batch, -1, features)
    return value, {"blocks": blocks, **grads}


def _drop(work: _Work, keep: Array | None, where: slice, rows: block.Rows | None) -> Array | None:
    """Compute the mask m of `marref.layers.dropout` for some sequences, at the rows if any."""
    if keep is None:
        return None
    wanted = keep[where].reshape(-1, keep.shape[-1])
    if rows is not None:
        wanted = wanted[rows.at]
    mask: Array = wanted.astype(work.params["head"]["bias"].dtype)
    mask /= 1.0 - work.model.dropout
    return mask


def _head(work: _Work, x: Array, ids: Array) -> tuple[np.inexact, Array, Tree]:
    """Do the head's part, at a few positions at a time: logits are large."""
    scale, bias = work.params["final_norm"]["scale"], work.params["final_norm"]["bias"]
    kernel = work.params["head"]["kernel"]
    scale = scale * math.sqrt(len(scale))
    value = x.dtype.type(0)
    sums: list[Tree] = []
    dx = np.empty_like(x)
    at_once = max(1, kernels.LOGITS_AT_ONCE // work.model.vocab_size)
    for part in parallel.split(len(x), math.ceil(len(x) / at_once)):
        normal, root = normalise(x[part], work.model.layer_norm_epsilon)
        source = normal * scale + bias
        logits = linear(source, kernel, work.params["head"]["bias"])
        part_value, dlogits = _cross_entropy(
            logits, ids[part], work.num_masked, work.label_smoothing
        )
        value += part_value
        dsource = dlogits @ kernel.T
        dscale = math.sqrt(len(scale)) * (dsource * normal).sum(axis=0)
        grads = {
            "final_norm": {"scale": dscale, "bias": dsource.sum(axis=0)},
            "head": {"kernel": source.T @ dlogits, "bias": dlogits.sum(axis=0)},
        }
        dsource *= scale
        dx[part] = normalise_backward(dsource, normal, root)
        sums = [_add_up(parallel.Run(), *sums, grads)]
    return value, dx, sums[0]


def _cross_entropy(
    logits: Array, ids: Array, num_masked: int, label_smoothing: float
) -> tuple[np.inexact, Array]:
    """Compute what some masked positions add to the loss, and dlogits over the logits.

    With e = exp(z), y the target and s = Σ_{k≠y} e_k, which is added up without e_y,

        -log p_y = log1p(s / e_y)     p_y - 1 = -s / (s + e_y)     p_k = e_k / (s + e_y)

    keep their digits where p_y is almost 1.  Only for logits whose exp has digits; the definition
    does the others.  With label smoothing ε, and m the mean of the V logits,

        -(1/V) Σ_k log p_k = log(s + e_y) - m     dz_k = p_k - (1 - ε)[k = y] - ε/V
    """
    smoothing, keep = label_smoothing, 1.0 - label_smoothing
    if not has_digits(logits):
        value, cache = loss.forward(logits, ids, np.ones(len(ids), bool))
        dlogits = loss.backward(cache)
        if smoothing:
            uniform, duniform = loss.uniform(cache)
            value = keep * value + smoothing * uniform
            dlogits = keep * dlogits + smoothing * duniform
        share = len(ids) / num_masked
        return logits.dtype.type(value * share), dlogits * share
    at_target = np.arange(len(ids)), ids
    means = logits.mean(axis=1) if smoothing else 0.0
    np.exp(logits, out=logits)
    of_target = logits[at_target]
    logits[at_target] = 0.0
    others = logits.sum(axis=1)
    factor = 1.0 / (num_masked * (others + of_target))
    logits *= factor[:, np.newaxis]
    logits[at_target] = -others * factor
    losses = np.log1p(others / of_target)
    if smoothing:
        logits -= smoothing / (logits.shape[1] * num_masked)
        logits[at_target] += smoothing / num_masked
        losses = keep * losses + smoothing * (np.log(others + of_target) - means)
    # The dtype said: in a thread NumPy 2.1 turns float32 over an int into float64.
    return logits.dtype.type(losses.sum() / num_masked), logits


def _table_gradient(table: Array, tokens: Array, dx: Array) -> Array:
    """Do as `marref.layers.embedding.backward`: sort the places by token, and add up each run."""
    dtable = np.zeros_like(table)
    order = np.argsort(tokens, axis=None, kind="stable")
    ids, starts = np.unique(tokens.ravel()[order], return_index=True)
    dtable[ids] = np.add.reduceat(dx.reshape(tokens.size, -1)[order], starts, axis=0)
    return dtable


def _add_up(run: parallel.Run, total: Tree, *terms: Tree) -> Tree:
    """Add trees to the first of them, in place."""
    for term in terms:
        run(operator.iadd, *zip(*pieces(total, term), strict=True))
    return total
