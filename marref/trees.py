"""Trees: nested dicts and lists of arrays, and their dotted names.

Parameters, gradients, caches and optimiser moments are all trees.  A leaf's name is its path
joined by dots, with list positions as numbers: ``blocks.0.attention.query.kernel``.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Tree: TypeAlias = dict[str, Any]


def flatten(tree: Any) -> dict[str, Array]:
    """Name every leaf of a tree.

    Parameters
    ----------
    tree : nested dicts and lists of arrays
        ``None`` stands for an absent leaf and is left out.

    Returns
    -------
    dict of str to array
        In the order of the tree; the arrays themselves, not copies.

    Raises
    ------
    TypeError
        A node is no dict, list, array or ``None``.
    ValueError
        A key is no string, is empty or holds a dot, or consists of digits (which mean a list).

    Examples
    --------
    >>> flatten({"blocks": [{"scale": np.ones(2)}]})
    {'blocks.0.scale': array([1., 1.])}
    """
    leaves: dict[str, Array] = {}
    _collect(tree, "", leaves)
    return leaves


def _collect(node: Any, name: str, leaves: dict[str, Array]) -> None:
    if isinstance(node, dict):
        for key, child in node.items():
            if not isinstance(key, str) or not key or "." in key or key.isdecimal():
                raise ValueError(f"tree: key {key!r} under {name or 'the root'!r} is not a name")
            _collect(child, f"{name}.{key}" if name else key, leaves)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            _collect(child, f"{name}.{index}" if name else str(index), leaves)
    elif isinstance(node, np.ndarray):
        leaves[name] = node
    elif node is not None:
        raise TypeError(
            f"tree: {name or 'the root'!r} is {type(node).__name__}, expected dict, list or array"
        )


def unflatten(leaves: dict[str, Array]) -> Tree:
    """Build the tree whose leaves have the given dotted names; undoes `flatten` of a dict.

    Parameters
    ----------
    leaves : dict of str to array

    Returns
    -------
    dict
        Where all the keys of a level are numbers it is a list.

    Raises
    ------
    ValueError
        A name is both a leaf and a branch, has an empty part, or a list lacks a position.
    """
    root: Tree = {}
    for name, leaf in leaves.items():
        *branches, last = name.split(".")
        node = root
        for key in branches:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"leaves: {name!r} lies below another leaf")
        if not all([*branches, last]) or last in node:
            raise ValueError(f"leaves: {name!r} has an empty part or lies above another leaf")
        node[last] = leaf
    return {key: _with_lists(child, key) for key, child in root.items()}


def _with_lists(node: Any, name: str) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child, f"{name}.{key}") for key, child in node.items()}
    if not any(key.isdecimal() for key in children):
        return children
    positions = [str(position) for position in range(len(children))]
    if sorted(children) != sorted(positions):
        raise ValueError(
            f"leaves: {name!r} is a list and must have the positions 0 to {len(children) - 1}, "
            f"received {', '.join(children)}"
        )
    return [children[position] for position in positions]


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to the leaves of trees of the same structure.

    Parameters
    ----------
    function : callable
        Takes one leaf of each tree, returns a leaf of the result.
    tree, *others : trees
        Of one structure; absent leaves (``None``) stay absent.

    Returns
    -------
    tree
        With the structure of `tree`.

    Raises
    ------
    ValueError
        The structures differ.
    """
    for other in others:
        same_kind = all(isinstance(other, kind) == isinstance(tree, kind) for kind in (dict, list))
        if not same_kind or (isinstance(tree, dict | list) and len(other) != len(tree)):
            raise ValueError("others: expected trees of the structure of the first")
    if isinstance(tree, dict):
        if any(other.keys() != tree.keys() for other in others):
            raise ValueError(f"others: expected the keys {', '.join(tree)}")
        return {
            key: map_leaves(function, child, *(other[key] for other in others))
            for key, child in tree.items()
        }
    if isinstance(tree, list):
        return [
            map_leaves(function, child, *children)
            for child, *children in zip(tree, *others, strict=True)
        ]
    return None if tree is None else function(tree, *others)


def check_like(argument: str, tree: Any, shapes: Mapping[str, tuple[int, ...]]) -> np.dtype[Any]:
    """Raise unless a tree has exactly the given leaves, all of one dtype that marref computes in.

    Parameters
    ----------
    argument : str
        What the caller calls the tree, for the message.
    tree : tree
    shapes : dict of str to tuple of int
        The shape of every leaf that the tree must have, by dotted name.

    Returns
    -------
    numpy.dtype
        The dtype of the leaves: float32, float64 or complex128.

    Raises
    ------
    ValueError
        Leaves are missing, extra or misshapen; the message names the first five.
    TypeError
        The dtypes are mixed, or none of those that marref computes in.
    """
    leaves = flatten(tree)
    faults = [f"{name} is missing" for name in shapes if name not in leaves]
    faults += [f"{name} is not expected" for name in leaves if name not in shapes]
    faults += [
        f"{name} has shape {list(leaves[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in leaves and leaves[name].shape != shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{argument}: " + "; ".join(faults[:5]) + more)
    if not leaves:
        raise ValueError(f"{argument}: no leaves, expected at least one array")
    dtypes: dict[np.dtype[Any], str] = {}
    for name, leaf in leaves.items():
        dtypes.setdefault(leaf.dtype, name)
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        raise TypeError(f"{argument}: mixed dtypes {found}, expected one")
    (dtype,) = dtypes
    return check_dtype(argument, dtype)


def check_dtype(argument: str, dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Raise TypeError unless a dtype is one that marref computes in."""
    try:
        dtype = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{argument}: received {dtype!r}, expected a dtype") from error
    if dtype not in (np.float32, np.float64, np.complex128):
        raise TypeError(
            f"{argument}: dtype {dtype}, expected float32, float64 "
            "or (for complex-step derivatives) complex128"
        )
    return dtype
