"""A model of your own: a checkpoint's parameters and a batch, for golden vectors of them.

model, params, batch, notes = load(
    "model.safetensors", names_of="torch", config={"num_heads": 8}, tokens="tokens.npy"
)
arrays, metadata = golden.make_from(model, params, batch)
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from marref import checks, files, trees
from marref.interop import naming
from marref.model import MAR
from marref.trees import Array, Tree
from marref.verify import golden, names


def load(
    path: str | os.PathLike[str],
    *,
    names_of: str | None = None,
    config: Mapping[str, Any] | None = None,
    tokens: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[MAR, Tree, dict[str, Array], tuple[str, ...]]:
    """Read parameters and a batch, and tell the hyper-parameters from their shapes.

    Parameters
    ----------
    path : path
        Parameters that `marref.files.load` reads.  The metadata that `marref.training.save_model`
        and golden vectors have say the hyper-parameters.
    names_of : str, optional
        Whose names the parameters have: ``"torch"``, ``"flax"``, ``"axon"`` or a JSON file, see
        `marref.verify.names.rename`; by default marref's.
    config : dict, optional
        Hyper-parameters that the shapes do not say: ``num_heads``, ``seq_len`` (by default the
        length of the tokens), ``gelu``, ``positions``, ``layer_norm_epsilon``.
    tokens : path, optional
        A ``.npy`` file of true ids [batch, length], or another that `marref.files.load` reads,
        with ``tokens``, which are these, and perhaps ``mask``, 1 where they are masked, and the
        classes ``labels``.
    seed : int
        Draws the mask, see `marref.verify.golden.draw_mask`, the tokens and the labels, if not
        given.

    Returns
    -------
    model : MAR
    params : dict
        float64.  Biases that are absent are 0; an absent head is the embedding's table, tied.
    batch : dict
        ``tokens``, [MASK] where masked, ``targets`` and ``mask``, integers [batch, length], and
        ``labels`` [batch] of a model with classes.
    notes : tuple of str
        Lines for the user, about names and what was absent.

    Raises
    ------
    OSError
        A file cannot be opened.
    TypeError, ValueError
        Parameters are missing or misshapen, names unknown, hyper-parameters not said, or the
        tokens do not fit the model.
    """
    if names_of == "auto":
        raise ValueError(
            "names: received auto, which matches golden parameters, and there are none yet; "
            "expected torch, flax, axon or a JSON file"
        )
    arrays, metadata = files.load(path)
    if "params/embedding.table" in arrays:  # golden vectors, of which these are the parameters
        arrays = {name: a for name, a in arrays.items() if name.startswith("params/")}
    given = _batch_of(tokens) if tokens else {}
    said = {**metadata.get("model", metadata.get("config", {})), **(config or {})}
    parameters, notes = names.to_parameters(arrays, names_of, said.get("num_layers"))
    try:
        known = {**_sizes(parameters, arrays, names_of, given), **said}
        for name in ("num_heads", "seq_len"):
            if name not in known:
                raise ValueError(f"config: {name} is missing, and the shapes do not say it")
        model = MAR(**known)
        absent = _fill(model, parameters)
        params = trees.unflatten({name: a.astype(np.float64) for name, a in parameters.items()})
        trees.check_like("params", params, model.parameter_shapes)
    except ValueError as error:
        raise ValueError("; ".join([str(error), *notes])) from error
    notes = (*notes, *([f"absent: {', '.join(absent)}"] if absent else []))
    return model, params, _masked(given, model, np.random.default_rng(seed)), notes


def _batch_of(path: str | os.PathLike[str]) -> dict[str, Array]:
    if Path(path).suffix == ".npy":
        given = {"tokens": np.load(path, allow_pickle=False)}
    else:
        given, _ = files.load(path)
    if "tokens" not in given:
        raise ValueError(f"{path}: holds {', '.join(given)}, expected tokens")
    checks.token_ids("tokens", given["tokens"], np.iinfo(np.int64).max)
    return given


def _masked(given: Mapping[str, Array], model: MAR, rng: np.random.Generator) -> dict[str, Array]:
    """Check a batch and draw what is not given of it."""
    shape = (golden.BATCH, model.seq_len)
    targets = given.get("tokens", rng.integers(1, model.vocab_size, shape)).astype(np.int64)
    mask = given.get("mask", golden.draw_mask((targets.shape[0], targets.shape[1]), rng))
    masked = checks.binary_mask("mask", mask, targets.shape)
    batch = {
        "tokens": np.where(masked, 0, checks.token_ids("tokens", targets, model.vocab_size)),
        "targets": targets,
        "mask": masked.astype(np.int64),
    }
    if model.num_classes is not None:
        drawn = golden.draw_labels(len(targets), model.num_classes, rng)
        labels = model.check_labels(given.get("labels", drawn), len(targets))
        assert labels is not None
        batch["labels"] = labels.astype(np.int64)
    return batch


def _fill(model: MAR, parameters: dict[str, Array]) -> list[str]:
    """Add absent biases, which are 0, and a tied head; say which."""
    filled = []
    for name, shape in model.parameter_shapes.items():
        if name not in parameters and name.endswith("bias"):
            parameters[name] = np.zeros(shape)
            filled.append(f"{name} (0)")
        elif name not in parameters and name == "head.kernel":
            parameters[name] = parameters["embedding.table"].T
            filled.append(f"{name} (tied to the embedding's table)")
    return filled


def _sizes(
    parameters: Mapping[str, Array],
    arrays: Mapping[str, Array],
    names_of: str | None,
    batch: Mapping[str, Array],
) -> dict[str, int]:
    table = parameters.get("embedding.table")
    if table is None or table.ndim != 2:
        received = "none" if table is None else f"shape {list(table.shape)}"
        raise ValueError(f"params: embedding.table: {received}, expected [vocab_size, embed_dim]")
    blocks = {name.split(".")[1] for name in parameters if name.startswith("blocks.")}
    sizes = {"vocab_size": table.shape[0], "embed_dim": table.shape[1], "num_layers": len(blocks)}
    if "class_embedding.table" in parameters:
        sizes["num_classes"] = naming.num_classes_of(parameters["class_embedding.table"])
    if "tokens" in batch:
        sizes["seq_len"] = batch["tokens"].shape[1]
    # Flax's attention has heads and head_dim apart.
    biases = [a for name, a in arrays.items() if name.endswith(("query.bias", "query/bias"))]
    if names_of == "flax" and biases and biases[0].ndim == 2:
        sizes["num_heads"] = len(biases[0])
    return sizes
