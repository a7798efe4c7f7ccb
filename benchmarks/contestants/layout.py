"""The query, key and value projections of marref as one, which is how others keep them."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
_FUSED = ("query", "key", "value")


def read(arrays: Mapping[str, Array], name: str) -> Array:
    """Read one parameter; ``attention.qkv`` is query, key and value side by side."""
    if ".qkv." not in name:
        return arrays[f"params/{name}"]
    parts = [arrays[f"params/{name.replace('.qkv.', f'.{part}.')}"] for part in _FUSED]
    return np.concatenate(parts, axis=-1)


def names(arrays: Mapping[str, Array]) -> list[str]:
    """Names of all parameters, with query, key and value as one."""
    leaves = [name.removeprefix("params/") for name in arrays if name.startswith("params/")]
    fused = (name.replace(".query.", ".qkv.") for name in leaves)
    return [name for name in fused if ".key." not in name and ".value." not in name]


def split(leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Undo the joining of query, key and value."""
    apart: dict[str, Array] = {}
    for name, leaf in leaves.items():
        if ".qkv." in name:
            parts = np.split(leaf, 3, axis=-1)
            for part_name, part in zip(_FUSED, parts, strict=True):
                apart[name.replace(".qkv.", f".{part_name}.")] = part
        else:
            apart[name] = leaf
    return apart
