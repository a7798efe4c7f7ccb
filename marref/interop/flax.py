"""Flax: the parameters of a MAR in linen and in nnx.

    embedding                    Embed(vocab_size, embed_dim)
    blocks                       a list, called ``blocks_<i>`` in linen and ``blocks.<i>`` in nnx:
        attention_norm               LayerNorm(epsilon=1e-5)
        attention                    MultiHeadDotProductAttention, in nnx MultiHeadAttention
        feed_forward_norm            LayerNorm(epsilon=1e-5)
        up, down                     Dense, in nnx Linear
    final_norm                   LayerNorm(epsilon=1e-5)
    head                         Dense, in nnx Linear
    class_embedding              Embed(num_classes + 1, embed_dim), where the model has classes

The layouts are marref's, but that attention splits an axis of embed_dim into [heads, head_dim]:
the last one of query, key and value, and the first one of the output kernel.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from marref import checks, trees
from marref.interop import naming
from marref.trees import Array, Tree

_NNX = {
    "embedding.embedding": "embedding.table",
    "blocks.<i>.attention_norm.scale": "blocks.<i>.attention_norm.scale",
    "blocks.<i>.attention_norm.bias": "blocks.<i>.attention_norm.bias",
    "blocks.<i>.attention.query.kernel": "blocks.<i>.attention.query.kernel",
    "blocks.<i>.attention.query.bias": "blocks.<i>.attention.query.bias",
    "blocks.<i>.attention.key.kernel": "blocks.<i>.attention.key.kernel",
    "blocks.<i>.attention.key.bias": "blocks.<i>.attention.key.bias",
    "blocks.<i>.attention.value.kernel": "blocks.<i>.attention.value.kernel",
    "blocks.<i>.attention.value.bias": "blocks.<i>.attention.value.bias",
    "blocks.<i>.attention.out.kernel": "blocks.<i>.attention.output.kernel",
    "blocks.<i>.attention.out.bias": "blocks.<i>.attention.output.bias",
    "blocks.<i>.feed_forward_norm.scale": "blocks.<i>.feed_forward_norm.scale",
    "blocks.<i>.feed_forward_norm.bias": "blocks.<i>.feed_forward_norm.bias",
    "blocks.<i>.up.kernel": "blocks.<i>.feed_forward.up.kernel",
    "blocks.<i>.up.bias": "blocks.<i>.feed_forward.up.bias",
    "blocks.<i>.down.kernel": "blocks.<i>.feed_forward.down.kernel",
    "blocks.<i>.down.bias": "blocks.<i>.feed_forward.down.bias",
    "final_norm.scale": "final_norm.scale",
    "final_norm.bias": "final_norm.bias",
    "head.kernel": "head.kernel",
    "head.bias": "head.bias",
    "class_embedding.embedding": "class_embedding.table",
}
_LINEN = {theirs.replace("blocks.", "blocks_"): ours for theirs, ours in _NNX.items()}


def to_params(state: Mapping[str, Any]) -> Tree:
    """Read the parameters of a model, or their gradients.

    Parameters
    ----------
    state : nested mapping, or flat with names joined by dots or slashes
        linen: the variables, ``{"params": {...}}``, or what is in "params".  nnx:
        ``nnx.state(model, nnx.Param)``, or ``nnx.to_pure_dict`` of it.

    Returns
    -------
    dict
        marref's tree; copies, in the dtypes they came in, but bfloat16, which becomes float32.

    Raises
    ------
    TypeError
        An entry is no array of numbers.
    ValueError
        Entries are missing, unexpected or misshapen; the message names the nearest candidates.
    """
    found = naming.leaves("state", state, prefix="params.")
    table = _LINEN if any(name.startswith("blocks_") for name in found) else _NNX
    layout = functools.partial(_layout, table=table, num_heads=_num_heads(found))
    return naming.tree(found, "embedding.embedding", layout, to_names)


def to_variables(params: Tree, num_heads: int) -> dict[str, Any]:
    """Write parameters, or gradients, as variables of linen; undoes `to_params`.

    Parameters
    ----------
    params : dict
        marref's tree.
    num_heads : int

    Returns
    -------
    dict
        ``{"params": {...}}``, nested, the blocks called ``blocks_0``, ``blocks_1``, ...; copies.

    Raises
    ------
    TypeError, ValueError
        The tree is not one of parameters (the message names the nearest candidates), or num_heads
        does not divide embed_dim.
    """
    return {"params": trees.unflatten(_arranged(params, num_heads, _LINEN))}


def to_pure_dict(params: Tree, num_heads: int) -> dict[str, Any]:
    """Write parameters, or gradients, as a pure dict of nnx; undoes `to_params`.

    Parameters
    ----------
    params : dict
        marref's tree.
    num_heads : int

    Returns
    -------
    dict
        Nested, the blocks a dict with the keys 0, 1, ...: what ``nnx.replace_by_pure_dict`` takes
        and ``nnx.to_pure_dict`` returns.  Copies.

    Raises
    ------
    TypeError, ValueError
        As `to_variables`.
    """
    tree = trees.unflatten(_arranged(params, num_heads, _NNX))
    return {**tree, "blocks": dict(enumerate(tree["blocks"]))}


def to_names(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """Rename and rearrange any of a model's arrays as marref has them.

    Parameters
    ----------
    arrays : mapping of str to array
        Some parameters or gradients, of linen or nnx, by names joined with dots or slashes;
        "params" in front is dropped.

    Returns
    -------
    dict of str to array
        By marref's dotted names; copies.

    Raises
    ------
    TypeError
        An entry is no array of numbers.
    ValueError
        A name is unknown (the message names the nearest), or an array of the attention has no
        axes for heads and head_dim.
    """
    named: dict[str, Array] = {}
    for theirs, array in naming.leaves("arrays", arrays, prefix="params.").items():
        name = naming.translate(theirs, _LINEN if theirs.startswith("blocks_") else _NNX)
        axis = _split_axis(name)
        if axis is not None:
            rank = 3 if name.endswith(".kernel") else 2
            if array.ndim != rank:
                raise ValueError(
                    f"arrays: {theirs} has shape {list(array.shape)}, "
                    f"expected {rank} axes, with heads and head_dim apart"
                )
            array = _merged(array, axis)
        if name in named:
            raise ValueError(f"arrays: two of them are {name}")
        named[name] = np.array(array, order="C")
    return named


def _arranged(params: Tree, num_heads: int, table: Mapping[str, str]) -> dict[str, Array]:
    leaves = naming.flatten(params)
    num_heads = checks.integer("num_heads", num_heads, 1)
    embed_dim = leaves["embedding.table"].shape[1]
    if embed_dim % num_heads:
        raise ValueError(
            f"num_heads: received {num_heads}, expected a divisor of embed_dim = {embed_dim}"
        )
    return {name: np.array(array, order="C") for name, array in _layout(leaves, table, num_heads)}


def _layout(
    leaves: dict[str, Array], table: Mapping[str, str], num_heads: int
) -> Iterator[tuple[str, Array]]:
    flax_names = naming.inverse(table)
    for name, array in leaves.items():
        axis = _split_axis(name)
        yield (
            naming.translate(name, flax_names),
            array if axis is None else _split(array, axis, num_heads),
        )


def _split_axis(name: str) -> int | None:
    """Which axis of marref's array is two in Flax: the first, 0, the last, -1, or none."""
    if ".attention." not in name or name.endswith(".output.bias"):
        return None
    return 0 if ".output." in name else -1


def _split(array: Array, axis: int, num_heads: int) -> Array:
    heads = (num_heads, array.shape[axis] // num_heads)
    return array.reshape(*heads, -1) if axis == 0 else array.reshape(*array.shape[:-1], *heads)


def _merged(array: Array, axis: int) -> Array:
    if axis == 0:
        return array.reshape(array.shape[0] * array.shape[1], array.shape[2])
    return array.reshape(*array.shape[:-2], array.shape[-2] * array.shape[-1])


def _num_heads(found: Mapping[str, Array]) -> int:
    """Read the number of heads off a query bias, [heads, head_dim], that fits the embedding."""
    table = found.get("embedding.embedding")
    if table is not None and table.ndim == 2:
        for name, array in found.items():
            if name.endswith(".attention.query.bias") and array.ndim == 2:
                heads, head_dim = array.shape
                if heads * head_dim == table.shape[1]:
                    return int(heads)
    return 1
