"""A model and its parameters on disk."""

import math
import os
from typing import TYPE_CHECKING, Any

from marref import files, trees
from marref.model import MAR, check_model
from marref.trees import Tree

if TYPE_CHECKING:
    from marref.continuous import ContinuousMAR

# Of a file beside its parameters: names, headers, the model.
_OVERHEAD = 2**24


def save_model(path: str | os.PathLike[str], model: MAR, params: Tree) -> None:
    """Write a model and its parameters to one ``.npz`` file, whole or not at all.

    Parameters
    ----------
    path : path
        Written as given: no suffix is added.
    model : MAR
    params : dict

    Raises
    ------
    TypeError, ValueError
        The parameters do not fit the model.
    """
    check_model(model)
    trees.check_like("params", params, model.parameter_shapes)
    files.save(path, trees.flatten(params), {"model": model.as_dict()})


def load_model(path: str | os.PathLike[str]) -> tuple[MAR, Tree]:
    """Read what `save_model` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    model : MAR
    params : dict

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It holds no model, or parameters that do not fit it; if they would inflate to more than
        its parameters need, they are not read.
    """
    config: Any = files.load_metadata(path, max_bytes=_OVERHEAD).get("model")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the metadata hold no model")
    try:
        model = MAR(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    complex_size = 16
    leaves, _ = files.load(path, max_bytes=complex_size * num_parameters(model) + _OVERHEAD)
    try:
        params = trees.unflatten(leaves)
        trees.check_like("params", params, model.parameter_shapes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model, params


def num_parameters(model: "MAR | ContinuousMAR") -> int:
    """Count the numbers in a model's parameters."""
    return sum(math.prod(shape) for shape in model.parameter_shapes.values())
