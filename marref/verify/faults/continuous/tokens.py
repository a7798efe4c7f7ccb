"""Faults of tokens and masks, and of the encoder and the decoder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from marref.continuous import loss, model, tokens
from marref.continuous.layers import block
from marref.continuous.loss import masked_by
from marref.continuous.model import ContinuousMAR
from marref.layers import layer_norm
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage

fault, mask_fault, transformer_fault = Stage(), Stage(), Stage()


def _in_order(fault: Fault, *order: int) -> None:
    """Order the numbers of a token otherwise: of channel, row and column, those first."""
    inverse = tuple(2 + int(axis) for axis in np.argsort(order))

    @fault.wraps(tokens.from_images)
    def _(old: Any, images: Array, patch_size: int) -> Array:
        right: Array = old(images, patch_size)
        cut = right.reshape(*right.shape[:2], images.shape[1], patch_size, patch_size)
        return cut.transpose(0, 1, *(2 + axis for axis in order)).reshape(right.shape)

    @fault.wraps(tokens.to_images)
    def _(old: Any, wrong: Array, patch_size: int, channels: int, height: int) -> Any:
        sizes = (channels, patch_size, patch_size)
        cut = wrong.reshape(*wrong.shape[:2], *(sizes[axis] for axis in order))
        right = cut.transpose(0, 1, *inverse).reshape(wrong.shape)
        return old(right, patch_size, channels, height)


_in_order(
    fault("token-channels-last").says(
        "A token's numbers are in the order row, column, channel, as images with channels last are "
        "cut; the published code has the channel first. Nothing is wrong but the order, so that a "
        "model trained so works, and loaded parameters do not."
    ),
    1,
    2,
    0,
)
_in_order(
    fault("token-columns-before-rows").says(
        "A token's numbers are in the order channel, column, row: each patch is transposed. A "
        "symmetric patch hides it."
    ),
    0,
    2,
    1,
)

by_column = fault("tokens-column-by-column")


@by_column.wraps(tokens.from_images)
def _(old: Any, images: Array, patch_size: int) -> Array:
    """Tokens run down the columns of the image instead of along its rows. Each token is right, and
    stands in another place; positions are learnt, so that only loaded parameters show it."""
    right: Array = old(images, patch_size)
    down = images.shape[2] // patch_size
    grid = right.reshape(len(right), down, -1, right.shape[2])
    return grid.swapaxes(1, 2).reshape(right.shape)


@by_column.wraps(tokens.to_images)
def _(old: Any, wrong: Array, patch_size: int, channels: int, height: int) -> Any:
    grid = wrong.reshape(len(wrong), -1, height // patch_size, wrong.shape[2])
    return old(grid.swapaxes(1, 2).reshape(wrong.shape), patch_size, channels, height)


@mask_fault("masked-last-of-the-order").replaces(masked_by)
def _(orders: Array, num_masked: int) -> Array:
    """The last tokens of each order are masked instead of the first. The mask is another; in
    sampling tokens come in the reverse order."""
    masked = np.zeros(orders.shape, np.bool_)
    np.put_along_axis(masked, orders[:, orders.shape[1] - num_masked :], True, axis=1)
    return masked


mask_fault("masked-count-rounded-down").sets("masked count").says(
    "M = floor(L r) tokens are masked, and none where that is 0, instead of ceil(L r)."
).replaces(model.num_masked)(lambda length, ratio: int(np.floor(length * ratio)))
mask_fault("masked-count-rounded").sets("masked count").says(
    "M = L r is rounded to the nearest instead of up, as int(round(...)) does."
).replaces(model.num_masked)(lambda length, ratio: round(length * ratio))


def _with(fault: Fault, name: str, change: Callable[..., Any]) -> None:
    """Let encoder or decoder compute with changed parameters of one name.

    ``change(model, leaf)`` puts zeros somewhere, and so does it with the leaf's gradient.
    """
    part = "decode" if name.startswith(("decoder", "diffusion")) else "encode"

    def changed(model: ContinuousMAR, params: Tree) -> Tree:
        return {**params, name: {"table": change(model, params[name]["table"])}}

    @fault.wraps(getattr(ContinuousMAR, part))
    def _(old: Any, model: ContinuousMAR, params: Tree, *args: Any) -> Any:
        return old(model, changed(model, params), *args)

    @fault.wraps(getattr(ContinuousMAR, f"{part}_backward"))
    def _(old: Any, model: ContinuousMAR, params: Tree, *args: Any) -> Any:
        result = old(model, changed(model, params), *args)
        *dx, grads = result if isinstance(result, tuple) else (result,)
        grads = changed(model, grads)
        return (*dx, grads) if dx else grads


def _zero(table: Array, rows: Any) -> Array:
    table = table.copy()
    table[rows] = 0.0
    return table


first_only = transformer_fault("classes-in-the-first-place-only")


@first_only.wraps(ContinuousMAR.embed)
def _(old: Any, model: ContinuousMAR, params: Tree, *args: Any) -> Any:
    """The class vector stands in the first place of the buffer only, as a class token does in ViT;
    the other places hold their positions. The encoder's input differs there and nowhere else."""
    h, cache = old(model, params, *args)
    classes = params["class_embedding"]["table"][cache["labels"]][:, np.newaxis]
    h[:, 1 : model.buffer_size] = h[:, 1 : model.buffer_size] - classes
    return h, cache


@first_only.wraps(ContinuousMAR.embed_backward)
def _(old: Any, model: ContinuousMAR, params: Tree, dkept: Array, cache: Tree) -> Any:
    dtable = np.zeros_like(params["class_embedding"]["table"])
    np.add.at(dtable, cache["labels"], dkept[:, 0])
    return {**old(model, params, dkept, cache), "class_embedding": {"table": dtable}}


transformer_fault("dropped-label-zero").says(
    "A dropped label becomes zeros instead of the learnt vector of no class (fake_latent). Only "
    "sequences without a class differ, and that vector has no gradient."
).of(_with, "class_embedding")(lambda model, table: _zero(table, -1))
transformer_fault("label-drop-ignored").says(
    "Labels are never dropped, so that nothing is learnt of no class, by which guidance steers. "
    "Only the sequences whose label is dropped differ."
).wraps(loss.forward)(
    lambda old, model, params, images, labels, draws: old(
        model, params, images, labels, {**draws, "label_dropped": np.zeros(len(images), bool)}
    )
)
transformer_fault("encoder-positions-missing-in-the-buffer").says(
    "Encoder positions are added to the tokens only. All places of the buffer are then the same, "
    "and stay so through all blocks: the buffer is one place seen several times."
).of(_with, "encoder_positions")(lambda model, table: _zero(table, slice(model.buffer_size)))

of_sequence = transformer_fault("encoder-positions-of-the-short-sequence")


@of_sequence.wraps(ContinuousMAR.embed)
def _(old: Any, model: ContinuousMAR, params: Tree, *args: Any) -> Any:
    """Encoder positions are added after the masked tokens are taken out, so that a visible token
    gets the position of its place in the short sequence. The encoder does not know where tokens
    are; the buffer is right."""
    h, cache = old(model, params, *args)
    table, kept = params["encoder_positions"]["table"], cache["kept"]
    return h - table[kept] + table[: kept.shape[1]], cache


@of_sequence.wraps(ContinuousMAR.embed_backward)
def _(old: Any, model: ContinuousMAR, params: Tree, dkept: Array, cache: Tree) -> Any:
    dtable = np.zeros_like(params["encoder_positions"]["table"])
    dtable[: dkept.shape[1]] = dkept.sum(axis=0)
    return {**old(model, params, dkept, cache), "encoder_positions": {"table": dtable}}


class _OfTokens(dict[str, Any]):
    """The parameters of a norm that leaves the buffer as it is."""

    buffer_size: int


tokens_only = transformer_fault("token-norm-not-on-the-buffer").says(
    "The norm before the encoder's blocks (z_proj_ln) is applied to the tokens and not to the "
    "buffer. The blocks' input differs in the buffer and nowhere else."
)


@tokens_only.wraps(ContinuousMAR.encode)
@tokens_only.wraps(ContinuousMAR.encode_backward)
def _(old: Any, model: ContinuousMAR, params: Tree, *args: Any) -> Any:
    norm = _OfTokens(params["token_norm"])
    norm.buffer_size = model.buffer_size
    return old(model, {**params, "token_norm": norm}, *args)


@tokens_only.wraps(layer_norm.forward)
def _(old: Any, params: Tree, x: Array, epsilon: float) -> Any:
    if not isinstance(params, _OfTokens):
        return old(params, x, epsilon)
    y, cache = old(params, x[:, params.buffer_size :], epsilon)
    return np.concatenate([x[:, : params.buffer_size], y], axis=1), cache


@tokens_only.wraps(layer_norm.backward)
def _(old: Any, params: Tree, dy: Array, cache: Tree) -> Any:
    if not isinstance(params, _OfTokens):
        return old(params, dy, cache)
    dx, grads = old(params, dy[:, params.buffer_size :], cache)
    return np.concatenate([dy[:, : params.buffer_size], dx], axis=1), grads


transformer_fault("transformer-epsilon-1e-5").sets("layer-norm epsilon").says(
    "The norms of the transformer have the epsilon 1e-5, PyTorch's default, instead of 1e-6; "
    "those of the tokens and of the diffusion network are right. (Where all have it, it is "
    "layer-norm-epsilon-1e-5.) Small where the variance is near 1."
).wraps(ContinuousMAR.forward)(
    lambda old, model, *args: old(dataclasses.replace(model, layer_norm_epsilon=1e-5), *args)
)

by_head = transformer_fault("attention-fused-by-head")


def _by_head(attention: Tree, heads: int, *, back: bool = False) -> Tree:
    """Read the outputs of query, key and value, side by side, as [heads, 3, head_dim]; or undo
    it."""
    names = ("query", "key", "value")
    changed = dict(attention)
    for leaf in ("kernel", "bias"):
        parts = [attention[name][leaf] for name in names]
        shape = (*parts[0].shape[:-1], heads, parts[0].shape[-1] // heads)
        if back:
            fused = np.stack([part.reshape(shape) for part in parts], axis=-2)
            new = np.split(fused.reshape(*shape[:-2], -1), 3, axis=-1)
        else:
            fused = np.concatenate(parts, axis=-1).reshape(*shape[:-1], 3, shape[-1])
            new = [fused[..., part, :].reshape(parts[0].shape) for part in range(3)]
        for name, array in zip(names, new, strict=True):
            changed[name] = {**changed[name], leaf: array}
    return changed


@by_head.wraps(block.forward)
def _(old: Any, params: Tree, x: Array, *, num_heads: int, **options: Any) -> Any:
    """The fused kernel of query, key and value is read as [heads, 3, head_dim] instead of
    [3, heads, head_dim], as in Megatron and BLOOM: shapes fit, and all three are mixed up."""
    params = {**params, "attention": _by_head(params["attention"], num_heads)}
    return old(params, x, num_heads=num_heads, **options)


@by_head.wraps(block.backward)
def _(old: Any, params: Tree, dy: Array, cache: Tree) -> Any:
    heads = cache["query"].shape[1]
    dx, grads = old({**params, "attention": _by_head(params["attention"], heads)}, dy, cache)
    return dx, {**grads, "attention": _by_head(grads["attention"], heads, back=True)}


bare_mask = transformer_fault("mask-vector-without-positions")


@bare_mask.wraps(ContinuousMAR.fill)
def _(old: Any, model: ContinuousMAR, params: Tree, projected: Array, kept: Array) -> Array:
    """Decoder positions are added before the mask vector is put in, so that all masked places look
    the same: each gets the same z but for diffusion_positions."""
    positions = params["decoder_positions"]["table"] * _masked(model, kept)
    return np.asarray(old(model, params, projected, kept) - positions)


@bare_mask.wraps(ContinuousMAR.fill_backward)
def _(old: Any, model: ContinuousMAR, dh: Array, kept: Array) -> Any:
    dprojected, grads = old(model, dh, kept)
    dtable = np.where(_masked(model, kept), 0.0, dh).sum(axis=0)
    return dprojected, {**grads, "decoder_positions": {"table": dtable}}


def _masked(model: ContinuousMAR, kept: Array) -> Array:
    """Mark the places that are not kept: bool [batch, places, 1]."""
    masked = np.ones((len(kept), model.buffer_size + model.length, 1), np.bool_)
    masked[np.arange(len(kept))[:, np.newaxis], kept] = False
    return masked


transformer_fault("decoder-positions-missing").says(
    "No positions are added in the decoder. What is masked is the same vector everywhere."
).of(_with, "decoder_positions")(lambda model, table: np.zeros_like(table))
transformer_fault("diffusion-positions-missing").says(
    "No positions are added to the decoder's result (diffusion_pos_embed_learned). z is off by "
    "exactly that table; the transformer is right."
).of(_with, "diffusion_positions")(lambda model, table: np.zeros_like(table))
transformer_fault("z-detached").says(
    "z is detached from the graph before the diffusion network. The loss is right; the "
    "transformer has no gradient and never learns."
).wraps(ContinuousMAR.backward)(
    lambda old, model, params, dz, cache: old(model, params, np.zeros_like(dz), cache)
)
