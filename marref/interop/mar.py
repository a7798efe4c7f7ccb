"""The names and layouts of the code published with MAR (LTH14/mar), for `marref.continuous`.

Its kernels are [out, in]; query, key and value are one array, in this order; the vector of no class
is a parameter of its own; tables have one or two leading axes of length 1.  A checkpoint holds the
parameters under ``model`` and their average under ``model_ema``: hand over the one that is
wanted.  Below, ``qkv`` stands for query, key and value side by side.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from marref import trees
from marref.continuous.model import ContinuousMAR, check_model
from marref.interop import naming
from marref.trees import Array, Tree

_PARTS = ("query", "key", "value")

_MODULES = {
    "z_proj": "token_projection",
    "z_proj_ln": "token_norm",
    "encoder_norm": "encoder_norm",
    "decoder_embed": "decoder_projection",
    "decoder_norm": "decoder_norm",
    "diffloss.net.time_embed.mlp.0": "diffusion.time_up",
    "diffloss.net.time_embed.mlp.2": "diffusion.time_down",
    "diffloss.net.cond_embed": "diffusion.condition",
    "diffloss.net.input_proj": "diffusion.input",
    "diffloss.net.final_layer.linear": "diffusion.output",
    "diffloss.net.final_layer.adaLN_modulation.1": "diffusion.final_modulation",
}
_BLOCK = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.output",
    "norm2": "feed_forward_norm",
    "mlp.fc1": "feed_forward.up",
    "mlp.fc2": "feed_forward.down",
}
_DIFFUSION_BLOCK = {
    "in_ln": "norm",
    "mlp.0": "up",
    "mlp.2": "down",
    "adaLN_modulation.1": "modulation",
}
_TABLES = {
    "encoder_pos_embed_learned": ("encoder_positions.table", 1),
    "decoder_pos_embed_learned": ("decoder_positions.table", 1),
    "diffusion_pos_embed_learned": ("diffusion_positions.table", 1),
    "mask_token": ("mask_vector", 2),
}


def to_params(state: Mapping[str, Any], model: ContinuousMAR) -> Tree:
    """Read the parameters of a model, or their gradients.

    Parameters
    ----------
    state : mapping of str to tensor or array
        A ``state_dict``.
    model : ContinuousMAR

    Returns
    -------
    dict
        marref's tree; copies.

    Raises
    ------
    TypeError, ValueError
        An entry is no array, or entries are missing, unexpected or misshapen.
    """
    check_model(model)
    found = naming.leaves("state", state)
    expected = dict(published_names(model))
    missing, more = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or more:
        raise ValueError(
            f"state: {', '.join(sorted(missing)) or 'nothing'} missing, "
            f"{', '.join(sorted(more)) or 'nothing'} not expected"
        )
    leaves = to_leaves(found, model)
    params = trees.unflatten({name: leaves[name] for name in model.parameter_shapes})
    trees.check_like("state", params, model.parameter_shapes)
    return params


def to_leaves(state: Mapping[str, Array], model: ContinuousMAR) -> dict[str, Array]:
    """Read some of the parameters by marref's dotted names; what has no name of theirs is left out.

    The table of classes is there if all of it is given.
    """
    leaves: dict[str, Array] = {}
    for theirs, ours in published_names(model):
        if theirs not in state:
            continue
        array = state[theirs]
        if theirs in _TABLES:
            array = array.reshape(array.shape[_TABLES[theirs][1] :])
        elif ours.endswith(".kernel"):
            array = array.T
        if ".qkv." in ours:
            for part, piece in zip(_PARTS, np.split(array, 3, axis=-1), strict=True):
                leaves[ours.replace("qkv", part)] = np.array(piece, order="C")
        else:
            leaves[ours] = np.array(array, order="C")
    none, classes = leaves.pop("no_class", None), leaves.pop("classes", None)
    if none is not None and (classes is not None or model.num_classes is None):
        rows = [none.reshape(1, -1)] if classes is None else [classes, none.reshape(1, -1)]
        leaves["class_embedding.table"] = np.concatenate(rows)
    return leaves


def to_state_dict(params: Tree, model: ContinuousMAR) -> dict[str, Array]:
    """Write parameters, or gradients, as the published code has them; undoes `to_params`."""
    check_model(model)
    trees.check_like("params", params, model.parameter_shapes)
    leaves = trees.flatten(params)
    table = leaves.pop("class_embedding.table")
    leaves |= {"classes": table[:-1], "no_class": table[-1:]}
    state = {}
    for theirs, ours in published_names(model):
        if ".qkv." in ours:
            parts = [leaves[ours.replace("qkv", part)] for part in _PARTS]
            array = np.concatenate(parts, axis=-1)
        else:
            array = leaves[ours]
        if theirs in _TABLES:
            array = array.reshape((1,) * _TABLES[theirs][1] + array.shape)
        state[theirs] = np.array(array.T if ours.endswith(".kernel") else array, order="C")
    return state


def published_names(model: ContinuousMAR) -> list[tuple[str, str]]:
    """Pair the published names with marref's; "classes" and "no_class" are rows of one table."""
    modules = dict(_MODULES)
    for part, num in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
        for index in range(num):
            prefix = f"{part}_blocks.{index}."
            modules |= {prefix + theirs: prefix + ours for theirs, ours in _BLOCK.items()}
    for index in range(model.diffusion_layers):
        for theirs, ours in _DIFFUSION_BLOCK.items():
            name = f"diffusion.blocks.{index}.{ours}"
            modules[f"diffloss.net.res_blocks.{index}.{theirs}"] = name
    names = [(theirs, ours) for theirs, (ours, _) in _TABLES.items()]
    for theirs, ours in modules.items():
        weight = "scale" if ours.endswith("norm") else "kernel"
        names += [(f"{theirs}.weight", f"{ours}.{weight}"), (f"{theirs}.bias", f"{ours}.bias")]
    names.append(("fake_latent", "no_class"))
    if model.num_classes is not None:
        names.append(("class_emb.weight", "classes"))
    return names
