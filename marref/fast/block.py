"""One block of the model over packed parameters, forward and backward.

The residual stream has no mean over the features (`marref.fast.packed`).  The last block is
computed at some positions only: nothing reads the others.
"""

import functools
from typing import NamedTuple, Protocol

import numpy as np

from marref.fast import gelu as fast_gelu
from marref.fast.kernels import (
    Attended,
    attend,
    attend_backward,
    linear,
    normalise,
    normalise_backward,
    remove_mean,
    split_heads,
)
from marref.fast.packed import Packed
from marref.trees import Array


class Blocks(Protocol):
    """What a model says of its blocks: one of MAR, or of the continuous model."""

    @property
    def num_heads(self) -> int:
        """Of attention."""

    @property
    def layer_norm_epsilon(self) -> float:
        """Of both norms."""

    @property
    def gelu(self) -> str:
        """Of the feed-forward layer."""


class Rows(NamedTuple):
    """The positions that a last block computes, of arrays [batch·length, features].

    Attention works on a rectangle: on as many rows of every sequence as any has wanted positions,
    its own in order, and others after them where it has fewer; none twice.

    Parameters
    ----------
    rectangle : integer array [batch, rows]
        Where they are.
    wanted : bool array [batch, rows]
        Which of them are wanted.
    """

    rectangle: Array
    wanted: Array

    @property
    def at(self) -> Array:
        """Where the wanted positions are, in order."""
        at: Array = self.rectangle[self.wanted]
        return at


def rows_of(mask: Array) -> Rows:
    """Make the rows for the positions of a mask [batch, length]."""
    batch, length = mask.shape
    counts = mask.sum(axis=1)
    order = np.argsort(~mask, axis=1, kind="stable")[:, : counts.max()]
    wanted = np.arange(order.shape[1]) < counts[:, np.newaxis]
    return Rows(order + length * np.arange(batch)[:, np.newaxis], wanted)


class Drop(NamedTuple):
    """The dropout masks m of the two branches of a block, or ``None``: at the rows in the last."""

    attention: Array | None
    feed_forward: Array | None


class Cache(NamedTuple):
    """What `backward` needs of `forward`."""

    normal: Array
    root: Array
    attended: Attended
    context: Array
    second_normal: Array
    second_root: Array
    activation: Array
    slope: Array
    drop: Drop
    rows: Rows | None


def forward(
    model: Blocks,
    packed: Packed,
    x: Array,
    batch: int,
    drop: Drop,
    rows: Rows | None,
    *,
    keep_weights: bool,
) -> tuple[Array, Cache]:
    """Pass the residual stream through one block.

    Parameters
    ----------
    model : Blocks
    packed : Packed
    x : array [batch·length, embed_dim]
        Without a mean over the features; written over unless there are ``rows``.
    batch : int
    drop : Drop
    rows : Rows or None
        ``None``: all positions.
    keep_weights : bool
        False lets the attention weights go, and `backward` computes them again.

    Returns
    -------
    y : array [batch·length, embed_dim], or [wanted positions, embed_dim] with ``rows``
    cache : Cache
    """
    normal, root = normalise(x, model.layer_norm_epsilon)
    query, key, value = _project(packed, normal, rows)
    merged = np.empty(query.shape, query.dtype)
    query, key, value, context = (
        split_heads(part, batch, model.num_heads) for part in (query, key, value, merged)
    )
    attended = attend(query, key, value, context, keep=keep_weights)
    if rows is not None:
        x = x[rows.at]
    branch = linear(_wanted(merged, rows), packed.output_kernel, packed.output_bias)
    _add_branch(x, branch, drop.attention)

    second_normal, second_root = normalise(x, model.layer_norm_epsilon)
    hidden = linear(second_normal, packed.up_kernel, packed.up_bias)
    activation, slope = fast_gelu.value_and_slope(hidden, model.gelu)
    _add_branch(x, linear(activation, packed.down_kernel, packed.down_bias), drop.feed_forward)
    return x, Cache(
        normal,
        root,
        attended,
        merged,
        second_normal,
        second_root,
        activation,
        slope,
        drop,
        rows,
    )


def backward(model: Blocks, packed: Packed, dx: Array, cache: Cache) -> tuple[Array, Packed]:
    """Push ``dx`` back through `forward`; it is written over.

    Means over the features that dx may have do not matter: at its end dx meets what has no mean.

    Returns
    -------
    dx : array [batch·length, embed_dim]
    grads : Packed
    """
    dbranch = _branch_gradient(dx, cache.drop.feed_forward)
    ddown = cache.activation.T @ dbranch, dbranch.sum(axis=0)
    dhidden = dbranch @ packed.down_kernel.T
    dhidden *= cache.slope
    dup = cache.second_normal.T @ dhidden, dhidden.sum(axis=0)
    dnormal = dhidden @ packed.up_kernel.T
    dx += normalise_backward(dnormal, cache.second_normal, cache.second_root)

    dbranch = _branch_gradient(dx, cache.drop.attention)
    doutput = _wanted(cache.context, cache.rows).T @ dbranch, dbranch.sum(axis=0)
    dcontext = dbranch @ packed.output_kernel.T
    if cache.rows is not None:
        dcontext = _spread(dcontext, cache.rows.wanted.ravel(), len(cache.context))
        dx = _spread(dx, cache.rows.at, len(cache.normal))
    dqkv, dnormal = _attention_backward(model, packed, dcontext, cache)
    dx += normalise_backward(dnormal, cache.normal, cache.root)
    return dx, Packed(*dqkv, *doutput, *dup, *ddown)


def passed(model: Blocks, packed: Packed, x: Array, batch: int) -> Array:
    """Do as `forward` at all positions, and keep nothing; ``x`` is written over."""
    features = x.shape[1]
    normal, _ = normalise(x, model.layer_norm_epsilon)
    qkv = linear(normal, packed.qkv_kernel, packed.qkv_bias)
    return finished(model, packed, x, attended(model, batch, qkv[:, :features], qkv[:, features:]))


def passed_at(
    model: Blocks, packed: Packed, x: Array, key_value: Array, batch: int, rows: Rows
) -> Array:
    """Do as `forward` at some rows, and keep nothing.

    Parameters
    ----------
    model, packed, batch
        As of `forward`.
    x : array [batch·length, features]
    key_value : array [batch·length, 2·features]
        From `key_value_of`.
    rows : Rows

    Returns
    -------
    array [wanted positions, features]
    """
    features = x.shape[1]
    x = x[rows.rectangle.ravel()]
    normal, _ = normalise(x, model.layer_norm_epsilon)
    query = linear(normal, packed.qkv_kernel[:, :features], packed.qkv_bias[:features])
    context = attended(model, batch, query, key_value)
    if not rows.wanted.all():
        x, context = x[rows.wanted.ravel()], context[rows.wanted.ravel()]
    return finished(model, packed, x, context)


def key_value_of(model: Blocks, packed: Packed, x: Array) -> Array:
    """Compute key and value alone: [batch·length, 2·features]."""
    features = x.shape[1]
    normal, _ = normalise(x, model.layer_norm_epsilon)
    return linear(normal, packed.qkv_kernel[:, features:], packed.qkv_bias[features:])


def attended(model: Blocks, batch: int, query: Array, key_value: Array) -> Array:
    """Compute the context of the queries [batch·queries, features]."""
    context = np.empty(query.shape, query.dtype)
    features = query.shape[1]
    parts = query, key_value[:, :features], key_value[:, features:], context
    attend(*(split_heads(part, batch, model.num_heads) for part in parts), keep=False)
    return context


def finished(model: Blocks, packed: Packed, x: Array, context: Array) -> Array:
    """Add the two branches to the stream, over it."""
    x += linear(context, packed.output_kernel, packed.output_bias)
    normal, _ = normalise(x, model.layer_norm_epsilon)
    hidden = linear(normal, packed.up_kernel, packed.up_bias)
    x += linear(fast_gelu.value(hidden, model.gelu), packed.down_kernel, packed.down_bias)
    return x


def _project(packed: Packed, normal: Array, rows: Rows | None) -> list[Array]:
    """Compute query, key and value; the query at the rows only."""
    if rows is None:
        return np.split(linear(normal, packed.qkv_kernel, packed.qkv_bias), 3, axis=1)
    features = normal.shape[1]
    kernel, bias = packed.qkv_kernel, packed.qkv_bias
    query = linear(normal[rows.rectangle.ravel()], kernel[:, :features], bias[:features])
    key_value = linear(normal, kernel[:, features:], bias[features:])
    return [query, *np.split(key_value, 2, axis=1)]


def _attention_backward(
    model: Blocks, packed: Packed, dcontext: Array, cache: Cache
) -> tuple[tuple[Array, Array], Array]:
    """Push ``dcontext`` back to kernel and bias of `_project`, and to its input."""
    normal, rows = cache.normal, cache.rows
    features, batch = normal.shape[1], len(cache.attended.key)
    dqkv = np.empty((len(normal), 3 * features), normal.dtype)
    dquery, dkey, dvalue = np.split(dqkv, 3, axis=1)
    if rows is not None:
        dquery = np.empty_like(dcontext)
    of_heads = functools.partial(split_heads, batch=batch, num_heads=model.num_heads)
    attend_backward(
        of_heads(dcontext),
        cache.attended,
        of_heads(cache.context),
        (of_heads(dquery), of_heads(dkey), of_heads(dvalue)),
    )
    if rows is None:
        return (normal.T @ dqkv, dqkv.sum(axis=0)), dqkv @ packed.qkv_kernel.T
    # The positions of the rectangle are different ones: nothing is lost in the sum.
    places, dkey_value = rows.rectangle.ravel(), dqkv[:, features:]
    dnormal = dkey_value @ packed.qkv_kernel[:, features:].T
    dnormal[places] += dquery @ packed.qkv_kernel[:, :features].T
    dkernel = np.concatenate([normal[places].T @ dquery, normal.T @ dkey_value], axis=1)
    dbias = np.concatenate([dquery.sum(axis=0), dkey_value.sum(axis=0)])
    return (dkernel, dbias), dnormal


def _add_branch(x: Array, branch: Array, drop: Array | None) -> None:
    """Add a branch to the stream; what dropout left of it has a mean, which comes off."""
    if drop is not None:
        branch *= drop
        remove_mean(branch)
    x += branch


def _branch_gradient(dx: Array, drop: Array | None) -> Array:
    """Push ``dx`` back through `_add_branch` to the branch."""
    return dx if drop is None else remove_mean(dx.copy()) * drop


def _wanted(x: Array, rows: Rows | None) -> Array:
    return x if rows is None else x[rows.wanted.ravel()]


def _spread(x: Array, places: Array, length: int) -> Array:
    """Put x at some places of zeros."""
    spread = np.zeros((length, x.shape[1]), x.dtype)
    spread[places] = x
    return spread
