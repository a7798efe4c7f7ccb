"""Name maps: which of your arrays are which of marref's, and how yours are laid out.

A map is a JSON object.  Each of its entries is "your name": "marref's name", or, where the layout
differs too, "your name": an object with

    "ours"     marref's name, or a list of names if several are fused in yours
    "steps"    what makes ours of yours, in this order; none if left out:
                   {"transpose": true}      or a list of axes
                   {"reshape": [2, 3, 6]}   one of them may be -1
                   {"concatenate": 1}       several of yours, along an axis, to one array
                   {"split": 0}             one array, along an axis, to as many equal parts as
                                            there are names in "ours"; later steps are for each
    "yours"    your name, or a list of names; the entry's key if left out

``{i}`` stands for the number of a block, ``{i+1}`` for that counted from 1.  In one of the two
sides only, it stands for all blocks, in order: arrays that are stacked over blocks are split.
``"base": "torch"`` (or flax, axon) says that "ours" are that framework's names, and that names
without an entry are its names already.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from marref import checks, files
from marref.trees import Array

Step: TypeAlias = tuple[str, Any]
"""A name of `STEPS` and its argument, as in the file."""

FRAMEWORKS = ("torch", "flax", "axon")

_PLACEHOLDER = re.compile(r"\{i(?:\+(\d+))?\}")
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]*)(?![0-9])")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Some of your arrays, and which of marref's they are.

    Parameters
    ----------
    yours, ours : tuple of str
    steps : tuple of Step
        From yours to ours.
    """

    yours: tuple[str, ...]
    ours: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        others = f" and {len(self.yours) - 1} others" if len(self.yours) > 1 else ""
        return self.yours[0] + others


@dataclasses.dataclass(frozen=True)
class NameMap:
    """The entries of a map, and the framework whose names they lead to.

    Parameters
    ----------
    entries : tuple of Entry
        With ``{i}`` for the number of a block.
    base : {"torch", "flax", "axon"}, optional
    """

    entries: tuple[Entry, ...]
    base: str | None = None


def lay_out(entry: Entry, arrays: Sequence[Array]) -> dict[str, Array]:
    """Make marref's arrays of yours.

    Parameters
    ----------
    entry : Entry
        Without ``{i}``.
    arrays : sequence of array
        As many as ``entry.yours``.

    Returns
    -------
    dict of str to array
        By ``entry.ours``; copies.

    Raises
    ------
    ValueError
        A step does not fit the arrays; the message names the entry.
    """
    parts = list(arrays)
    for name, argument in entry.steps:
        try:
            parts = STEPS[name](parts, argument, len(entry.ours))
        except (ValueError, IndexError) as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:3])
            raise ValueError(
                f"names: {entry}: {name} {_jsonable(argument)} of {shapes}: {error}"
            ) from error
    if len(parts) != len(entry.ours):
        raise ValueError(
            f"names: {entry}: {len(parts)} arrays for {len(entry.ours)} names of marref's; "
            'expected the step "split" or "concatenate"'
        )
    return {name: np.array(part, order="C") for name, part in zip(entry.ours, parts, strict=True)}


def _transpose(parts: list[Array], axes: Any, count: int) -> list[Array]:
    return [np.transpose(part, None if axes is True else axes) for part in parts]


def _reshape(parts: list[Array], shape: Any, count: int) -> list[Array]:
    return [part.reshape(shape) for part in parts]


def _concatenate(parts: list[Array], axis: Any, count: int) -> list[Array]:
    return [np.concatenate(parts, axis)]


def _split(parts: list[Array], axis: Any, count: int) -> list[Array]:
    if len(parts) > 1:
        raise ValueError("there are several arrays; concatenate them first")
    return np.split(parts[0], count, axis)


STEPS: dict[str, Callable[[list[Array], Any, int], list[Array]]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "split": _split,
}
"""What a step does to a list of arrays, given its argument and how many are wanted."""


def expand(entries: Iterable[Entry], num_blocks: int) -> list[Entry]:
    """Write entries out for every block, without ``{i}``."""
    expanded = []
    for entry in entries:
        in_yours, in_ours = (
            any(_PLACEHOLDER.search(name) for name in names) for names in (entry.yours, entry.ours)
        )
        blocks = range(num_blocks)
        if in_yours and in_ours:
            expanded += [
                Entry(_numbered(entry.yours, [i]), _numbered(entry.ours, [i]), entry.steps)
                for i in blocks
            ]
        else:
            yours = _numbered(entry.yours, blocks) if in_yours else entry.yours
            ours = _numbered(entry.ours, blocks) if in_ours else entry.ours
            expanded.append(Entry(yours, ours, entry.steps))
    return expanded


def _numbered(names: Iterable[str], blocks: Iterable[int]) -> tuple[str, ...]:
    return tuple(
        _PLACEHOLDER.sub(lambda found, i=i: str(i + int(found[1] or 0)), name)  # type: ignore[misc]
        for i in blocks
        for name in names
    )


def num_blocks_of(entries: Iterable[Entry], names: Iterable[str]) -> int:
    """Count the blocks that names with ``{i}`` find among the given ones."""
    names = list(names)
    count = 0
    for entry in entries:
        for yours in entry.yours:
            found = _PLACEHOLDER.search(yours)
            if found:
                before, after = yours[: found.start()], yours[found.end() :]
                pattern = re.compile(rf"(?:.*[./])?{re.escape(before)}(\d+){re.escape(after)}")
                numbers = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
                count = max(count, max(numbers, default=-1) + 1 - int(found[1] or 0))
    return count


def compress(entries: Iterable[Entry], num_blocks: int) -> list[Entry]:
    """Write entries that are the same in every block as one, with ``{i}``; undoes `expand`."""
    entries = [_unstacked(entry, num_blocks) for entry in entries]
    families: dict[Entry, dict[int, Entry]] = {}
    for entry in entries:
        for block, pattern in _patterns(entry):
            families.setdefault(pattern, {})[block] = entry
    pattern_of: dict[Entry, Entry] = {}
    for pattern, members in families.items():
        complete = sorted(members) == list(range(num_blocks))
        if complete and not any(member in pattern_of for member in members.values()):
            pattern_of |= dict.fromkeys(members.values(), pattern)
    return list(dict.fromkeys(pattern_of.get(entry, entry) for entry in entries))


def _unstacked(entry: Entry, num_blocks: int) -> Entry:
    """Write ``{i}`` in the names of marref's where they are the same in all blocks."""
    first = entry.ours[: len(entry.ours) // num_blocks]
    pattern = tuple(_BLOCK.sub("blocks.{i}.", name) for name in first)
    if pattern != first and _numbered(pattern, range(num_blocks)) == entry.ours:
        return dataclasses.replace(entry, ours=pattern) if num_blocks > 1 else entry
    return entry


def _patterns(entry: Entry) -> Iterable[tuple[int, Entry]]:
    """Yield the number of an entry's block, and the entry with ``{i}`` for it, in each way."""
    blocks = {match[1] for name in entry.ours if (match := _BLOCK.match(name))}
    if len(blocks) != 1 or any(not _BLOCK.match(name) for name in entry.ours):
        return
    block = int(blocks.pop())
    ours = tuple(_BLOCK.sub("blocks.{i}.", name) for name in entry.ours)
    numbers = [list(_NUMBER.finditer(name)) for name in entry.yours]
    for place in range(min(map(len, numbers))):
        here = [found[place] for found in numbers]
        shifts = {int(number[0]) - block for number in here}
        for shift, mark in ((0, "{i}"), (1, "{i+1}")):
            if shifts == {shift}:
                yours = tuple(
                    name[: number.start()] + mark + name[number.end() :]
                    for name, number in zip(entry.yours, here, strict=True)
                )
                yield block, Entry(yours, ours, entry.steps)


def read(path: str | os.PathLike[str]) -> NameMap:
    """Read a map from a JSON file, as described at the head of this module.

    Parameters
    ----------
    path : path

    Returns
    -------
    NameMap

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It is no such map; the message names the entry.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"names: {path}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"names: {path}: received {type(content).__name__}, expected an object")
    base = content.pop("base", None)
    if base is not None:
        checks.choice("names: base", base, FRAMEWORKS)
    return NameMap(tuple(_entry(key, value) for key, value in content.items()), base)


def write(path: str | os.PathLike[str], name_map: NameMap) -> None:
    """Write a map to a JSON file; undoes `read`.

    Parameters
    ----------
    path : path
    name_map : NameMap
    """
    content: dict[str, Any] = {"base": name_map.base} if name_map.base else {}
    for entry in name_map.entries:
        key = entry.yours[0]
        # A tied array has two entries, and an object one key of a name.
        key = key if key not in content else f"{key} as {entry.ours[0]}"
        value: dict[str, Any] = {"ours": _one_or_list(entry.ours)}
        if (key,) != entry.yours:
            value = {"yours": _one_or_list(entry.yours), **value}
        if entry.steps:
            value["steps"] = [{name: _jsonable(argument)} for name, argument in entry.steps]
        content[key] = value if len(value) > 1 or len(entry.ours) > 1 else entry.ours[0]
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    with files.replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def _entry(key: str, value: Any) -> Entry:
    if isinstance(value, str):
        return Entry((key,), (value,))
    where = f"names: entry {key!r}"
    if not isinstance(value, dict):
        raise ValueError(f"{where}: received {value!r}, expected a name or an object")
    strange = value.keys() - {"yours", "ours", "steps"}
    if strange or "ours" not in value:
        received = ", ".join(value) or "nothing"
        raise ValueError(f'{where}: received {received}, expected "ours", "steps" and "yours"')
    steps = value.get("steps", [])
    if not isinstance(steps, list):
        raise ValueError(f"{where}: steps: received {steps!r}, expected a list")
    return Entry(
        _names(f"{where}: yours", value.get("yours", key)),
        _names(f"{where}: ours", value["ours"]),
        tuple(_step(where, step) for step in steps),
    )


def _names(where: str, value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: received {value!r}, expected a name or a list of names")
    return tuple(names)


def _step(where: str, step: Any) -> Step:
    name, argument = next(iter(step.items())) if isinstance(step, dict) and step else (None, None)
    if name not in STEPS or len(step) != 1:
        raise ValueError(f"{where}: step {step!r}, expected one of {', '.join(STEPS)}")
    integers = [argument] if name in ("concatenate", "split") else argument
    if name == "transpose" and argument is True:
        return name, True
    if not isinstance(integers, list) or not all(type(number) is int for number in integers):
        expected = "an axis" if name in ("concatenate", "split") else "a list of integers"
        raise ValueError(f"{where}: step {step!r}, expected {expected}")
    return name, tuple(argument) if isinstance(argument, list) else argument


def described(steps: Iterable[Step]) -> str:
    """Write steps in a line: ``transpose, split 1``."""
    return ", ".join(
        name if argument is True else f"{name} {_jsonable(argument)}" for name, argument in steps
    )


def _one_or_list(names: tuple[str, ...]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _jsonable(argument: Any) -> Any:
    return list(argument) if isinstance(argument, tuple) else argument
