"""Encoder and decoder over packed parameters (`marref.fast.packed`), z at wanted places only.

The blocks are those of `marref.fast.block`, so the residual streams have no mean over the features.
Masked tokens are not projected, and the last block of the decoder is computed where z is wanted.
"""

import math
from typing import NamedTuple

import numpy as np

from marref.continuous.model import TOKEN_NORM_EPSILON, ContinuousMAR
from marref.fast import block
from marref.fast.kernels import linear, normalise, normalise_backward, remove_mean
from marref.fast.packed import (
    Packed,
    after_norm,
    after_norm_gradients,
    pack,
    unpack_gradients,
)
from marref.trees import Array, Tree

_NOTHING = block.Drop(None, None)


class PackedModel(NamedTuple):
    """The blocks, and the norm of the encoder with the map to the decoder behind it."""

    encoder: list[Packed]
    decoder: list[Packed]
    projection: tuple[Array, Array]


def pack_model(model: ContinuousMAR, params: Tree) -> PackedModel:
    """Pack the parameters of encoder and decoder."""
    encoder, decoder = (
        [pack(of_block, model.num_heads, centre=True) for of_block in params[name]]
        for name in ("encoder_blocks", "decoder_blocks")
    )
    projection = after_norm(params["encoder_norm"], params["decoder_projection"], 1.0)
    return PackedModel(encoder, decoder, projection)


class _Norm(NamedTuple):
    normal: Array
    root: Array


class Cache(NamedTuple):
    """What `backward` needs of `forward`."""

    labels: Array
    kept: Array
    wanted: Array
    seen: Array
    token_norm: _Norm
    encoder: list[block.Cache]
    encoder_norm: _Norm
    decoder: list[block.Cache]
    decoder_norm: _Norm


def forward(
    model: ContinuousMAR,
    params: Tree,
    packed: PackedModel,
    tokens: Array,
    labels: Array,
    masked: Array,
    wanted: Array,
    *,
    keep: bool,
) -> tuple[Array, Cache]:
    """Compute the conditions of some tokens.

    Parameters
    ----------
    model : ContinuousMAR
    params : dict
    packed : PackedModel
    tokens, labels, masked : arrays
        As of `ContinuousMAR.forward`.
    wanted : bool array [batch, length]
    keep : bool
        Keep what `backward` needs.

    Returns
    -------
    z : array [wanted tokens, decoder_dim]
    cache : Cache
        Without the blocks' unless they are kept.
    """
    batch, size = len(tokens), model.buffer_size
    kept = model.kept(masked)
    seen = np.take_along_axis(tokens, (kept[:, size:] - size)[..., np.newaxis], axis=1)
    x = params["encoder_positions"]["table"][kept]
    x[:, :size] += params["class_embedding"]["table"][labels][:, np.newaxis]
    x[:, size:] += seen @ params["token_projection"]["kernel"] + params["token_projection"]["bias"]
    x = remove_mean(x.reshape(-1, model.encoder_dim))
    token_norm = _Norm(*normalise(x, TOKEN_NORM_EPSILON))
    x = remove_mean(_affine(params["token_norm"], token_norm.normal))
    x, encoder = _blocks(model, packed.encoder, x, batch, None, keep)
    encoder_norm = _Norm(*normalise(x, model.layer_norm_epsilon))

    table = params["decoder_positions"]["table"]
    full = np.broadcast_to(table + params["mask_vector"], (batch, *table.shape)).copy()
    projected = linear(encoder_norm.normal, *packed.projection)
    rows = np.arange(batch)[:, np.newaxis]
    full[rows, kept] = projected.reshape(*kept.shape, -1) + table[kept]
    x = remove_mean(full.reshape(-1, model.decoder_dim))
    at = block.rows_of(np.pad(wanted, ((0, 0), (size, 0))))
    x, decoder = _blocks(model, packed.decoder, x, batch, at, keep)
    decoder_norm = _Norm(*normalise(x, model.layer_norm_epsilon))
    z = _affine(params["decoder_norm"], decoder_norm.normal)
    z += params["diffusion_positions"]["table"][np.nonzero(wanted)[1]]
    return z, Cache(
        labels, kept, wanted, seen, token_norm, encoder, encoder_norm, decoder, decoder_norm
    )


def backward(
    model: ContinuousMAR, params: Tree, packed: PackedModel, dz: Array, cache: Cache
) -> Tree:
    """Push the gradient of z back; that of packed parameters is for `unpack` to turn into theirs.

    Returns
    -------
    dict
        Of arrays, and lists of dicts of arrays: what is added up over parts of a batch.
    """
    batch, size = len(cache.kept), model.buffer_size
    rows = np.arange(batch)[:, np.newaxis]
    grads: Tree = {}
    spread = np.zeros((*cache.wanted.shape, model.decoder_dim), dz.dtype)
    spread[cache.wanted] = dz
    grads["diffusion_positions"] = {"table": spread.sum(axis=0)}
    dx, grads["decoder_norm"] = _affine_backward(params["decoder_norm"], dz, cache.decoder_norm)
    dx, grads["decoder_blocks"] = _blocks_backward(model, packed.decoder, dx, cache.decoder)
    dfull = remove_mean(dx).reshape(batch, -1, model.decoder_dim)
    grads["decoder_positions"] = {"table": dfull.sum(axis=0)}
    dprojected = dfull[rows, cache.kept].reshape(-1, model.decoder_dim)
    dfull[rows, cache.kept] = 0.0
    grads["mask_vector"] = dfull.sum(axis=(0, 1))

    normal, root = cache.encoder_norm
    grads["projection"] = {"kernel": normal.T @ dprojected, "bias": dprojected.sum(axis=0)}
    dx = normalise_backward(dprojected @ packed.projection[0].T, normal, root)
    dx, grads["encoder_blocks"] = _blocks_backward(model, packed.encoder, dx, cache.encoder)
    dx, grads["token_norm"] = _affine_backward(
        params["token_norm"], remove_mean(dx), cache.token_norm
    )
    dx = remove_mean(dx).reshape(batch, -1, model.encoder_dim)
    table = np.zeros((batch, size + model.length, model.encoder_dim), dx.dtype)
    table[rows, cache.kept] = dx
    grads["encoder_positions"] = {"table": table.sum(axis=0)}
    classes = np.zeros_like(params["class_embedding"]["table"])
    np.add.at(classes, cache.labels, dx[:, :size].sum(axis=1))
    grads["class_embedding"] = {"table": classes}
    dtokens = dx[:, size:].reshape(-1, model.encoder_dim)
    kernel = cache.seen.reshape(-1, model.token_dim).T @ dtokens
    grads["token_projection"] = {"kernel": kernel, "bias": dtokens.sum(axis=0)}
    return grads


def unpack(model: ContinuousMAR, params: Tree, grads: Tree) -> Tree:
    """Turn what `backward` returns into the gradients of the parameters."""
    grads = dict(grads)
    for name in ("encoder_blocks", "decoder_blocks"):
        grads[name] = [
            unpack_gradients(of_block, Packed(**packed), model.num_heads, centre=True)
            for of_block, packed in zip(params[name], grads[name], strict=True)
        ]
    projection = grads.pop("projection")
    grads["encoder_norm"], grads["decoder_projection"] = after_norm_gradients(
        params["encoder_norm"],
        params["decoder_projection"],
        1.0,
        projection["kernel"],
        projection["bias"],
    )
    return grads


def _affine(norm: Tree, normal: Array) -> Array:
    """Compute γ √n x/ρ + β, the layer norm of what has no mean."""
    y: Array = normal * (math.sqrt(normal.shape[1]) * norm["scale"])
    y += norm["bias"]
    return y


def _affine_backward(norm: Tree, dy: Array, cache: _Norm) -> tuple[Array, Tree]:
    """Push ``dy`` back through `_affine` and `normalise`."""
    root_n = math.sqrt(dy.shape[1])
    grads = {"scale": root_n * (dy * cache.normal).sum(axis=0), "bias": dy.sum(axis=0)}
    return normalise_backward(dy * (root_n * norm["scale"]), *cache), grads


def _blocks(
    model: ContinuousMAR,
    packed: list[Packed],
    x: Array,
    batch: int,
    rows: block.Rows | None,
    keep: bool,
) -> tuple[Array, list[block.Cache]]:
    """Run blocks, the last at some rows if they are given."""
    *others, last = packed
    if not keep:
        for of_block in others:
            x = block.passed(model, of_block, x, batch)
        if rows is None:
            return block.passed(model, last, x, batch), []
        key_value = block.key_value_of(model, last, x)
        return block.passed_at(model, last, x, key_value, batch, rows), []
    caches = []
    # Weights that would take as much memory as all else that a block keeps are let go.
    keep_weights = model.num_heads * (len(x) // batch) < 16 * x.shape[1]
    for of_block in packed:
        at = rows if of_block is last else None
        x, cache = block.forward(model, of_block, x, batch, _NOTHING, at, keep_weights=keep_weights)
        caches.append(cache)
    return x, caches


def _blocks_backward(
    model: ContinuousMAR, packed: list[Packed], dx: Array, caches: list[block.Cache]
) -> tuple[Array, list[Tree]]:
    """Push ``dx`` back through blocks, the last first; a cache is let go when it has been read."""
    grads: list[Tree] = []
    for of_block in reversed(packed):
        dx, of_packed = block.backward(model, of_block, dx, caches.pop())
        grads.insert(0, of_packed._asdict())
    return dx, grads
