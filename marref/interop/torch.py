"""PyTorch: the state_dict of a MAR made of stock modules, all pre-norm.

    embedding    nn.Embedding(vocab_size, embed_dim)
    encoder      nn.TransformerEncoder of nn.TransformerEncoderLayer(norm_first=True), with
                 norm=nn.LayerNorm(embed_dim)
    head         nn.Linear(embed_dim, vocab_size)

and, where the model has classes, class_embedding, an nn.Embedding(num_classes + 1, embed_dim).
Two layouts differ from marref's: nn.Linear keeps its weight as [out, in], the transpose of a
kernel; and nn.MultiheadAttention keeps query, key and value in one array, in that order along its
first axis.  Below, ``qkv`` stands for the three side by side along the last axis of marref's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from marref.interop import naming
from marref.trees import Array, Tree

_NAMES = {
    "embedding.weight": "embedding.table",
    "encoder.layers.<i>.norm1.weight": "blocks.<i>.attention_norm.scale",
    "encoder.layers.<i>.norm1.bias": "blocks.<i>.attention_norm.bias",
    "encoder.layers.<i>.self_attn.in_proj_weight": "blocks.<i>.attention.qkv.kernel",
    "encoder.layers.<i>.self_attn.in_proj_bias": "blocks.<i>.attention.qkv.bias",
    "encoder.layers.<i>.self_attn.out_proj.weight": "blocks.<i>.attention.output.kernel",
    "encoder.layers.<i>.self_attn.out_proj.bias": "blocks.<i>.attention.output.bias",
    "encoder.layers.<i>.norm2.weight": "blocks.<i>.feed_forward_norm.scale",
    "encoder.layers.<i>.norm2.bias": "blocks.<i>.feed_forward_norm.bias",
    "encoder.layers.<i>.linear1.weight": "blocks.<i>.feed_forward.up.kernel",
    "encoder.layers.<i>.linear1.bias": "blocks.<i>.feed_forward.up.bias",
    "encoder.layers.<i>.linear2.weight": "blocks.<i>.feed_forward.down.kernel",
    "encoder.layers.<i>.linear2.bias": "blocks.<i>.feed_forward.down.bias",
    "encoder.norm.weight": "final_norm.scale",
    "encoder.norm.bias": "final_norm.bias",
    "head.weight": "head.kernel",
    "head.bias": "head.bias",
    "class_embedding.weight": "class_embedding.table",
}
_TORCH_NAMES = naming.inverse(_NAMES)


def to_params(state: Mapping[str, Any]) -> Tree:
    """Read the parameters of a model, or their gradients.

    Parameters
    ----------
    state : mapping of str to tensor or array
        ``model.state_dict()``, or ``{name: p.grad for name, p in model.named_parameters()}``.

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
    return naming.tree(found, "embedding.weight", _layout, to_names)


def to_state_dict(params: Tree) -> dict[str, Array]:
    """Write parameters, or gradients, as PyTorch names and lays them out; undoes `to_params`.

    Parameters
    ----------
    params : dict
        marref's tree.

    Returns
    -------
    dict of str to array
        Copies.  ``{name: torch.from_numpy(array) ...}`` is what ``load_state_dict`` takes.

    Raises
    ------
    TypeError, ValueError
        The tree is not one of parameters; the message names the nearest candidates.
    """
    leaves = naming.flatten(params)
    return {name: np.array(array, order="C") for name, array in _layout(leaves)}


def to_names(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """Rename and rearrange any of a model's arrays as marref has them.

    Parameters
    ----------
    arrays : mapping of str to tensor or array
        Some entries of a state_dict, or gradients under the same names.

    Returns
    -------
    dict of str to array
        By marref's dotted names; copies.  A fused projection gives three.

    Raises
    ------
    TypeError
        An entry is no array of numbers.
    ValueError
        A name is unknown (the message names the nearest), or a fused array has no three parts.
    """
    named: dict[str, Array] = {}
    for theirs, array in naming.leaves("arrays", arrays).items():
        name = naming.translate(theirs, _NAMES)
        if name.endswith(".kernel"):
            array = array.T
        if ".qkv." in name:
            rank = 2 if name.endswith(".kernel") else 1
            if array.ndim != rank or array.shape[-1] % 3:
                raise ValueError(
                    f"arrays: {theirs} has shape {list(array.T.shape)}, "
                    f"expected [{', '.join(['3*embed_dim', 'embed_dim'][:rank])}]"
                )
            parts = np.split(array, 3, axis=-1)
            for part, piece in zip(("query", "key", "value"), parts, strict=True):
                named[name.replace("qkv", part)] = np.array(piece, order="C")
        else:
            named[name] = np.array(array, order="C")
    return named


def _layout(leaves: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    for name, array in leaves.items():
        if ".key." in name or ".value." in name:
            continue
        if ".query." in name:
            parts = [name.replace("query", part) for part in ("query", "key", "value")]
            array = np.concatenate([leaves[part] for part in parts], axis=-1)
            name = name.replace("query", "qkv")
        yield (
            naming.translate(name, _TORCH_NAMES),
            array.T if name.endswith(".kernel") else array,
        )
