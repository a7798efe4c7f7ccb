"""A run's model for other programs: a PyTorch state_dict, or a graph in ONNX.

Of the best checkpoint, and of the averaged parameters where there is an average.  What was written
is read back and held to marref before the file gets its name.  Page: docs/interop.md.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from marref import files, trees
from marref.interop import mar, torch
from marref.model import MAR
from marref.training import runs
from marref.training.checkpoints import Checkpoint, discrete
from marref.trees import Array, Tree
from marref.verify.comparison import Golden, Row, compare

FORMAT = "marref-export-1"
METADATA_KEY = "marref"
SUFFIXES = (".safetensors", ".onnx")


def export(run: str | os.PathLike[str], path: str | os.PathLike[str]) -> tuple[Checkpoint, str]:
    """Write a run's model to a file, in the format that the file's name ends in.

    Parameters
    ----------
    run : path
        The folder of `marref.training.runs.start`.
    path : path
        ``.safetensors``: a state_dict by PyTorch's names and layouts, see `marref.interop.torch`
        (of the continuous model `marref.interop.mar`), in the run's dtype (extra ``interop``).
        ``.onnx``: see `marref.interop.onnx`, in float32 (extra ``onnx``).  Both hold, as JSON under
        ``marref``, the metadata that `metadata` says.

    Returns
    -------
    checkpoint : Checkpoint
        What was exported.
    found : str
        What checking it came to.

    Raises
    ------
    ValueError
        The name ends in neither, or there is no run or no checkpoint.
    FloatingPointError
        What was written is not what marref computes; the file is not there.
    ImportError
        An extra is missing.
    OSError
        The file cannot be written.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"out: received {os.fspath(path)!r}, expected a name that ends in "
            f"{' or '.join(SUFFIXES)}"
        )
    checkpoint = runs.best(run)
    write = _write_torch if suffix == ".safetensors" else _write_onnx
    return checkpoint, write(checkpoint, path)


def metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tell what an exported file says of itself.

    Returns
    -------
    dict
        ``format``, ``step``, ``model`` (its hyper-parameters), ``config`` (of the run), and
        ``codec``: what the token ids mean, see `marref.data.codec_from_dict`.
    """
    return {
        "format": FORMAT,
        "step": checkpoint.step,
        "model": checkpoint.model.as_dict(),
        "config": dataclasses.asdict(checkpoint.config),
        "codec": checkpoint.codec,
    }


def _write_torch(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> str:
    params, model = checkpoint.state.averaged, checkpoint.model
    if isinstance(model, MAR):
        state, read = torch.to_state_dict(params), torch.to_params
    else:
        state = mar.to_state_dict(params, model)
        read = functools.partial(mar.to_params, model=model)
    files.save(
        path, state, metadata(checkpoint), check=functools.partial(_check_torch, params, read)
    )
    return "read back, every number is the run's"


def _check_torch(params: Tree, read: Callable[[Any], Tree], path: Path) -> None:
    found = trees.flatten(read(files.load(path)[0]))
    for name, leaf in trees.flatten(params).items():
        if found[name].dtype != leaf.dtype or not np.array_equal(found[name], leaf):
            raise FloatingPointError(f"{name}: the file holds other numbers than the run")


def _write_onnx(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> str:
    try:
        import onnx

        from marref.interop import onnx as graphs
    except ImportError as error:
        raise ImportError('a name in .onnx needs onnx: pip install ".[onnx]"') from error
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), checkpoint.state.averaged)
    _, model = discrete(checkpoint, "out: .onnx")
    text = json.dumps(metadata(checkpoint))
    graph = graphs.to_model(model, params, {METADATA_KEY: text})
    with files.replacing(path) as temporary:
        onnx.save(graph, os.fspath(temporary))
        rows = [_check_onnx(model, params, temporary, length) for length in _lengths(model)]
    worst = max(rows, key=lambda row: row.difference / row.budget)
    return (
        f"run by onnx.reference, logits differ from marref's by {worst.difference:.1e}, "
        f"{worst.budget:.1e} allowed"
    )


def _lengths(model: MAR) -> list[int]:
    """Choose the longest that the model takes and, since length is free, a shorter one."""
    return [model.seq_len, (model.seq_len + 1) // 2]


def _check_onnx(model: MAR, params: Tree, path: Path, length: int) -> Row:
    """Run the file on two sequences, and hold its logits to the budget of float32."""
    from onnx.reference import ReferenceEvaluator

    vectors = _vectors(model, params, length)
    run: Any = ReferenceEvaluator(os.fspath(path)).run
    inputs = {name: vectors.batch[name] for name in ("tokens", "labels") if name in vectors.batch}
    (logits,) = run(None, inputs)
    (row,) = compare(vectors, {"activations/logits": logits}, "float32").rows
    if row.verdict not in ("equal", "rounding"):
        raise FloatingPointError(
            f"{path.name}: its logits differ from marref's by {row.difference:.1e}, "
            f"{row.budget:.1e} allowed"
        )
    return row


def _vectors(model: MAR, params: Tree, length: int) -> Golden:
    """Compute golden logits of random tokens, half of one sequence masked, in float64.

    Of classes, the second sequence has none.
    """
    rng = np.random.default_rng(0)
    targets = rng.integers(1, model.vocab_size, (2, length))
    mask: Array = np.zeros((2, length), bool)
    mask[0, : length // 2] = True
    tokens = np.where(mask, 0, targets)
    batch = {"tokens": tokens, "targets": targets, "mask": mask}
    if model.num_classes is not None:
        batch["labels"] = np.array([model.num_classes - 1, model.num_classes])
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float64), params)
    arrays: dict[str, Array] = {
        **{f"params/{name}": leaf for name, leaf in trees.flatten(params).items()},
        **{f"input/{name}": array for name, array in batch.items()},
        "activations/logits": model(params, tokens, batch.get("labels")),
    }
    return Golden(arrays, {"config": model.as_dict()})
