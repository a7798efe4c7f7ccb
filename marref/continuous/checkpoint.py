"""A continuous MAR and its training in one file, from which training goes on bit for bit.

The arrays are those of `marref.training.checkpoints`; the metadata hold the step, the model and the
config, and a checksum of everything.  Page: docs/continuous.md.
"""

import dataclasses
import math
import os
from typing import NamedTuple

import numpy as np

from marref import checks, files
from marref.continuous.model import ContinuousMAR, check_model
from marref.continuous.training import Config, checked
from marref.training.checkpoints import arrays_of, checksum, state_of
from marref.training.loop import State

FORMAT = "marref-continuous-1"
# Of a file beside its arrays: names, headers, the metadata.
_OVERHEAD = 2**24


class Checkpoint(NamedTuple):
    """What is needed to sample, and to go on."""

    model: ContinuousMAR
    config: Config
    state: State


def save(path: str | os.PathLike[str], model: ContinuousMAR, config: Config, state: State) -> None:
    """Write a checkpoint, whole or not at all.

    Parameters
    ----------
    path : path
        Ends in ``.npz`` or, with the extra ``interop``, in ``.safetensors``.
    model : ContinuousMAR
    config : Config
    state : State

    Raises
    ------
    TypeError, ValueError
        The state does not fit the model and the config, or the name ends otherwise.
    OSError
        The file cannot be written.
    ImportError
        safetensors is not installed.
    """
    check_model(model)
    files.check_suffix("path", path)
    arrays = arrays_of(checked(config, model, state))
    metadata = {
        "format": FORMAT,
        "step": int(state.optimiser["step"]),
        "model": dataclasses.asdict(model),
        "config": dataclasses.asdict(config),
    }
    metadata["checksum"] = checksum(arrays, metadata)
    files.save(path, arrays, metadata, compressed=False)


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
        model, config = ContinuousMAR(**metadata["model"]), Config(**metadata["config"])
        step = checks.integer("step", metadata["step"], 0, config.num_steps)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no checkpoint of a continuous MAR ({error})") from error
    shapes, averaged = model.parameter_shapes, config.average_decay > 0.0
    size = sum(map(math.prod, shapes.values())) * np.dtype(config.dtype).itemsize
    arrays, metadata = files.load(path, max_bytes=(3 + averaged) * size + _OVERHEAD)
    if checksum(arrays, metadata) != metadata.get("checksum"):
        raise ValueError(f"{path}: is damaged (its checksum is that of other content)")
    try:
        state = state_of(arrays, step, shapes, config.dtype, averaged)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(model, config, state)
