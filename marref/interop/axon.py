"""Axon: the model state of Edifice's MAR (Elixir), layers by name and in each its parameters.

The layouts are marref's, kernels [in, out]; layer norm calls its scale gamma and its bias beta;
layers are counted from 1.  Source: lib/edifice/generative/mar.ex of Edifice, and Axon's layers.

Edifice computes its token embedding from a formula and so has no ``token_embed`` in its state:
add it with `fixed_embedding`, or give the model an ``Axon.embedding`` of that name to learn it.
It has no classes either: ``class_embed`` is the name of an ``Axon.embedding`` for them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, trees
from marref.interop import naming
from marref.trees import Array, Tree

_NAMES = {
    "token_embed.kernel": "embedding.table",
    "layer_<i>_attn_norm.gamma": "blocks.<i>.attention_norm.scale",
    "layer_<i>_attn_norm.beta": "blocks.<i>.attention_norm.bias",
    "layer_<i>_attn_q.kernel": "blocks.<i>.attention.query.kernel",
    "layer_<i>_attn_q.bias": "blocks.<i>.attention.query.bias",
    "layer_<i>_attn_k.kernel": "blocks.<i>.attention.key.kernel",
    "layer_<i>_attn_k.bias": "blocks.<i>.attention.key.bias",
    "layer_<i>_attn_v.kernel": "blocks.<i>.attention.value.kernel",
    "layer_<i>_attn_v.bias": "blocks.<i>.attention.value.bias",
    "layer_<i>_attn_out.kernel": "blocks.<i>.attention.output.kernel",
    "layer_<i>_attn_out.bias": "blocks.<i>.attention.output.bias",
    "layer_<i>_ffn_norm.gamma": "blocks.<i>.feed_forward_norm.scale",
    "layer_<i>_ffn_norm.beta": "blocks.<i>.feed_forward_norm.bias",
    "layer_<i>_ffn_up.kernel": "blocks.<i>.feed_forward.up.kernel",
    "layer_<i>_ffn_up.bias": "blocks.<i>.feed_forward.up.bias",
    "layer_<i>_ffn_down.kernel": "blocks.<i>.feed_forward.down.kernel",
    "layer_<i>_ffn_down.bias": "blocks.<i>.feed_forward.down.bias",
    "final_norm.gamma": "final_norm.scale",
    "final_norm.beta": "final_norm.bias",
    "lm_head.kernel": "head.kernel",
    "lm_head.bias": "head.bias",
    "class_embed.kernel": "class_embedding.table",
}
_AXON_NAMES = naming.inverse(_NAMES)


def to_params(state: Mapping[str, Any]) -> Tree:
    """Read the parameters of a model, or their gradients.

    Parameters
    ----------
    state : mapping of layer to mapping of parameter to array, or flat
        The ``data`` of an Axon.ModelState; flat names are joined by dots or slashes.

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
    found = naming.leaves("state", state)
    return naming.tree(found, "token_embed.kernel", _layout, to_names)


def to_model_state(params: Tree) -> dict[str, dict[str, Array]]:
    """Write parameters, or gradients, as Axon names them; undoes `to_params`.

    Parameters
    ----------
    params : dict
        marref's tree.

    Returns
    -------
    dict of layer to dict of parameter to array
        Copies.

    Raises
    ------
    TypeError, ValueError
        The tree is not one of parameters; the message names the nearest candidates.
    """
    leaves = naming.flatten(params)
    return trees.unflatten({name: np.array(array, order="C") for name, array in _layout(leaves)})


def to_names(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """Rename any of a model's arrays as marref has them.

    Parameters
    ----------
    arrays : mapping of str to array
        Some parameters or gradients, by names joined with dots or slashes.

    Returns
    -------
    dict of str to array
        By marref's dotted names; copies.

    Raises
    ------
    TypeError
        An entry is no array of numbers.
    ValueError
        A name is unknown; the message names the nearest.
    """
    return {
        naming.translate(theirs, _NAMES, shift=-1): np.array(array, order="C")
        for theirs, array in naming.leaves("arrays", arrays).items()
    }


def fixed_embedding(vocab_size: int, embed_dim: int, dtype: npt.DTypeLike = np.float32) -> Array:
    """Compute the token table of Edifice's MAR, in which nothing is learned.

    Parameters
    ----------
    vocab_size, embed_dim : int
    dtype : dtype
        Edifice's own is float32.

    Returns
    -------
    array [vocab_size, embed_dim]
        0, 1, 2, ... row by row, each divided by sqrt(embed_dim).
    """
    vocab_size = checks.integer("vocab_size", vocab_size, 2)
    embed_dim = checks.even("embed_dim", embed_dim)
    dtype = trees.check_dtype("dtype", dtype)
    counted = np.arange(vocab_size * embed_dim).reshape(vocab_size, embed_dim)
    table: Array = counted.astype(dtype) / np.sqrt(dtype.type(embed_dim))
    return table


def _layout(leaves: dict[str, Array]) -> list[tuple[str, Array]]:
    return [(naming.translate(name, _AXON_NAMES, shift=1), array) for name, array in leaves.items()]
