"""What the frameworks have in common: flat names, numbered blocks, and complete reports.

Each framework's file has a table from its names to marref's, in which ``<i>`` stands for the
number of a block.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from marref import checks, trees
from marref.model import MAR
from marref.trees import Array, Tree

# The number of a block: a part of a name, between dots or underscores, without leading zeros.
_NUMBER = re.compile(r"(?<=[._])(?:0|[1-9][0-9]{0,5})(?=[._])")
_SHOWN = 5

Layout: TypeAlias = Callable[[dict[str, Array]], Iterable[tuple[str, Array]]]
"""From marref's names and arrays to a framework's."""


class UnknownName(ValueError):
    """A framework has no such name."""


def leaves(argument: str, state: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """Name the arrays of a nested or flat state, with dots for slashes and without the prefix."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{argument}: received {type(state).__name__}, expected a mapping of names")
    named: dict[str, Array] = {}
    for path, value in _walk(state, ""):
        name = path.replace("/", ".").removeprefix(prefix)
        if name in named:
            raise ValueError(f"{argument}: two arrays are called {name}")
        named[name] = _array(f"{argument}: {name}", value)
    return named


def _walk(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _walk(child, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def _array(argument: str, value: Any) -> Array:
    """Read a tensor of any framework; NumPy has no bfloat16, so that is widened, exactly."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    array = checks.array(argument, value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "iufc":
        raise TypeError(f"{argument} has dtype {array.dtype}, expected numbers")
    return array


def translate(name: str, table: Mapping[str, str], shift: int = 0) -> str:
    """Look a name up; ``shift`` is added to the number of its block."""
    number = _NUMBER.search(name)
    if number is None:
        if name in table and "<i>" not in name:
            return table[name]
        raise UnknownName(checks.unknown_name(name, table))
    pattern = f"{name[: number.start()]}<i>{name[number.end() :]}"
    index = int(number[0]) + shift
    if pattern in table and "<i>" not in name and index >= 0:
        return table[pattern].replace("<i>", str(index))
    nearest_block = str(max(index, 0) - shift)
    raise UnknownName(
        checks.unknown_name(name, [known.replace("<i>", nearest_block) for known in table])
    )


def parameter_names(num_layers: int) -> list[str]:
    """List marref's names of the parameters of a model with classes."""
    model = MAR(2, embed_dim=2, num_layers=num_layers, num_heads=1, num_classes=1)
    return list(model.parameter_shapes)


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """Swap the sides of a table."""
    return {ours: theirs for theirs, ours in table.items()}


def tree(
    found: dict[str, Array],
    embedding: str,
    layout: Layout,
    to_names: Callable[[dict[str, Array]], dict[str, Array]],
) -> Tree:
    """Build marref's tree of all the arrays of a model; raise as `check_complete` does."""
    shapes = check_complete("state", found, embedding, layout)
    named = to_names(found)
    return trees.unflatten({name: named[name] for name in shapes})


def flatten(params: Tree) -> dict[str, Array]:
    """Name the leaves of marref's parameters; raise as `check_complete` does."""
    leaves = trees.flatten(params)
    check_complete("params", leaves, "embedding.table", lambda blank: blank.items())
    return leaves


def check_complete(
    argument: str, found: Mapping[str, Array], embedding: str, layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Raise unless the arrays are those of a MAR, no more and no less, in a framework's layout.

    Parameters
    ----------
    argument : str
        What the caller calls the arrays, for the message.
    found : dict of str to array
        By flat names of the framework.
    embedding : str
        The name of the token table, [vocab_size, embed_dim], which tells the sizes; the numbered
        names tell how many blocks there are.
    layout : Layout

    Returns
    -------
    dict of str to tuple of int
        marref's names, in order, and shapes.

    Raises
    ------
    ValueError
        Arrays are missing, unexpected or misshapen: up to five of each kind are named, with the
        nearest candidates.
    """
    table = found.get(embedding)
    if table is not None and table.ndim != 2:
        raise ValueError(
            f"{argument}: {embedding} has shape {list(table.shape)}, "
            "expected [vocab_size, embed_dim]"
        )
    vocab_size, embed_dim = (2, 2) if table is None else table.shape
    blocks = {number[0] for name in found if (number := _NUMBER.search(name))}
    try:
        model = MAR(
            vocab_size,
            embed_dim,
            num_layers=max(1, len(blocks)),
            num_heads=1,
            num_classes=_num_classes(found, layout),
        )
    except ValueError as error:
        raise ValueError(
            f"{argument}: {embedding} has shape {[vocab_size, embed_dim]}; {error}"
        ) from error
    shapes = dict(model.parameter_shapes)
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    expected = {name: array.shape for name, array in layout(blank)}

    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        name
        for name, shape in expected.items()
        if table is not None and name in found and found[name].shape != shape
    ]
    faults = [
        *_shortened("missing", missing, lambda name: _nearest(name, unexpected)),
        *_shortened("not expected", unexpected, lambda name: _nearest(name, missing or expected)),
        *_shortened(
            "misshapen",
            misshapen,
            lambda name: f" (shape {list(found[name].shape)}, expected {list(expected[name])})",
        ),
    ]
    if faults:
        raise ValueError(f"{argument}: " + "; ".join(faults))
    return shapes


def _num_classes(found: Mapping[str, Array], layout: Layout) -> int | None:
    """Tell the number of classes from their table [num_classes + 1, embed_dim], if there is one."""
    blank = np.broadcast_to(np.float32(0), (2, 2))
    ((name, _),) = layout({"class_embedding.table": blank})
    return num_classes_of(found[name]) if name in found else None


def num_classes_of(table: Array) -> int:
    """Tell the number of classes from a table that may be misshapen: checks of shapes say so."""
    return max(1, len(np.atleast_1d(table)) - 1)


def _shortened(fault: str, names: list[str], remark: Callable[[str], str]) -> Iterator[str]:
    for name in names[:_SHOWN]:
        yield f"{name} is {fault}{remark(name)}"
    if len(names) > _SHOWN:
        yield f"{len(names) - _SHOWN} more are {fault}"


def _nearest(name: str, known: Collection[str]) -> str:
    found = checks.nearest(name, known)
    return f" (nearest: {found})" if found else ""
