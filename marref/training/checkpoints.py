"""Checkpoints: the state of a run after a step, in one file that is whole or not there.

A file ``<step>.safetensors`` (or ``.npz`` where safetensors is not installed) holds the arrays
``params/…``, ``first_moment/…``, ``second_moment/…`` and, where there is one, ``average/…``, each
under its dotted name, and as metadata the step, the config, what the token ids mean, and a checksum
of everything.  Page: docs/training.md.
"""

import importlib.util
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from marref import checks, files, trees
from marref.model import MAR
from marref.training.config import AnyConfig, Config, as_told, from_told
from marref.training.loop import State
from marref.training.models import num_parameters
from marref.trees import Array

if TYPE_CHECKING:
    from marref.continuous import ContinuousMAR

FORMAT = "marref-checkpoint-1"
_SUFFIXES = (".safetensors", ".npz")
# Of a file beside its arrays: names, headers, and the metadata with a tokenizer's file.
_OVERHEAD = 2**26


class Checkpoint(NamedTuple):
    """A run after a step.

    Parameters
    ----------
    step : int
        How many steps were taken.
    state : State
    config : Config, or marref.continuous.run.RunConfig
        Resolved.
    vocab_size : int
    codec : dict
        What the token ids mean; see `marref.data.codec_from_dict`.
    num_classes : int, optional
        Of the data; ``None`` without labels.
    """

    step: int
    state: State
    config: AnyConfig
    vocab_size: int
    codec: dict[str, Any]
    num_classes: int | None = None

    @property
    def model(self) -> "MAR | ContinuousMAR":
        """The model whose state it is."""
        return self.config.model(self.vocab_size, self.num_classes)


def save(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into a folder, whole or not at all.

    Parameters
    ----------
    folder : path
        Must exist.
    checkpoint : Checkpoint

    Returns
    -------
    pathlib.Path
        The file.
    """
    arrays = arrays_of(checkpoint.state)
    metadata = {
        "format": FORMAT,
        "step": checkpoint.step,
        **as_told(checkpoint.config),
        "vocab_size": checkpoint.vocab_size,
        "codec": checkpoint.codec,
    }
    if checkpoint.num_classes is not None:
        metadata["num_classes"] = checkpoint.num_classes
    metadata["checksum"] = checksum(arrays, metadata)
    suffix = _SUFFIXES[0 if importlib.util.find_spec("safetensors") else 1]
    path = Path(folder) / f"{checkpoint.step:08d}{suffix}"
    files.save(path, arrays, metadata, compressed=False)
    return path


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read what `save` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    Checkpoint

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It is damaged, or no checkpoint; the message says how.
    ImportError
        safetensors is not installed, and the file needs it.
    """
    metadata = files.load_metadata(path, max_bytes=_OVERHEAD)
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, expected {FORMAT!r}")
        config = from_told(metadata)
        step = checks.integer("step", metadata["step"], 0, config.num_steps)
        model = config.model(metadata["vocab_size"], metadata.get("num_classes"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no checkpoint ({error})") from error
    parts = 4 if config.average_decay else 3
    size = parts * num_parameters(model) * np.dtype(config.dtype).itemsize
    arrays, metadata = files.load(path, max_bytes=size + _OVERHEAD)
    if checksum(arrays, metadata) != metadata.pop("checksum", None):
        raise ValueError(f"{path}: is damaged (its checksum is that of other content)")
    try:
        state = state_of(
            arrays, step, model.parameter_shapes, config.dtype, bool(config.average_decay)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    sizes = metadata["vocab_size"], metadata["codec"], metadata.get("num_classes")
    return Checkpoint(step, state, config, *sizes)


def discrete(checkpoint: Checkpoint, what: str) -> tuple[Config, MAR]:
    """Return the config and the model of discrete MAR; raise where it is the continuous one.

    Parameters
    ----------
    checkpoint : Checkpoint
    what : str
        Asks for it.
    """
    config, model = checkpoint.config, checkpoint.model
    if isinstance(config, Config) and isinstance(model, MAR):
        return config, model
    raise ValueError(f"{what}: received a run of the continuous model, expected discrete MAR")


def latest(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """Read the newest checkpoint of a folder that is not damaged.

    Parameters
    ----------
    folder : path

    Returns
    -------
    Checkpoint or None
        ``None`` where there are no checkpoints.

    Raises
    ------
    ValueError
        All are damaged.

    Warns
    -----
    RuntimeWarning
        One that is damaged is passed over; the warning says how.
    """
    paths = sorted(found(folder).items(), reverse=True)
    for _, path in paths:
        try:
            return load(path)
        except ValueError as error:
            reason = str(error)
        if path != paths[-1][1]:
            warnings.warn(f"{reason}; using the one before it", RuntimeWarning, stacklevel=2)
    if paths:
        raise ValueError(f"{os.fspath(folder)}: no checkpoint can be read, the oldest: {reason}")
    return None


def clean(folder: str | os.PathLike[str], keep: int, *, best: int | None = None) -> None:
    """Remove old checkpoints.

    Parameters
    ----------
    folder : path
    keep : int
        How many of the newest stay.
    best : int, optional
        The step of one that stays too.
    """
    paths = found(folder)
    for step in sorted(paths)[:-keep]:
        if step != best:
            paths[step].unlink(missing_ok=True)


def remove_after(folder: str | os.PathLike[str], step: int) -> None:
    """Remove the checkpoints after a step, which `latest` passed over."""
    for later, path in found(folder).items():
        if later > step:
            path.unlink(missing_ok=True)


def found(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """List the checkpoints of a folder by step."""
    return {
        int(path.stem): path
        for path in Path(folder).glob("*")
        if path.suffix in _SUFFIXES and path.stem.isdecimal()
    }


def arrays_of(state: State) -> dict[str, Array]:
    """Name the arrays of a state as the head of this module says."""
    parts = {"params": state.params, "average": state.average or {}}
    parts |= {name: state.optimiser[name] for name in ("first_moment", "second_moment")}
    return {
        f"{part}/{name}": leaf
        for part, tree in parts.items()
        for name, leaf in trees.flatten(tree).items()
    }


def state_of(
    arrays: dict[str, Array],
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    averaged: bool,
) -> State:
    """Build a state of what `arrays_of` named; raise unless shapes and dtype are as expected.

    Leaves come in the order of the model's, whatever that of the file: sums over all of them, as
    the norm of the gradients, have the same last digits as if nothing had been read.
    """
    parts: dict[str, Any] = {}
    for name, array in arrays.items():
        part, _, leaf = name.partition("/")
        # What was read may be a view of the file's bytes, which cannot be written to.
        parts.setdefault(part, {})[leaf] = np.array(array)
    expected = ["params", "first_moment", "second_moment", *["average"] * averaged]
    if parts.keys() != set(expected):
        raise ValueError(f"holds {', '.join(parts)}, expected {', '.join(sorted(expected))}")
    for part in expected:
        leaves = parts[part]
        received = trees.check_like(part, trees.unflatten(leaves), shapes)
        if received != dtype:
            raise TypeError(f"{part}: dtype {received}, expected {dtype}")
        parts[part] = trees.unflatten({name: leaves[name] for name in shapes})
    moments = {name: parts[name] for name in ("first_moment", "second_moment")}
    optimiser = {"step": np.array(step, np.int64), **moments}
    return State(parts["params"], optimiser, parts.get("average"))


def checksum(arrays: dict[str, Array], metadata: dict[str, Any]) -> int:
    """Compute one number over the metadata, but for the checksum, and over every array."""
    told = {name: value for name, value in metadata.items() if name != "checksum"}
    sum_ = zlib.crc32(json.dumps(told, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sum_ = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), sum_)
        sum_ = zlib.crc32(array.reshape(-1).view(np.uint8).data, sum_)
    return sum_
