"""Your names: arrays as you have them, to marref's names and layouts.

Sections whose arrays have the names of parameters (``params/``, ``gradients/``, ``adam/1/``, …)
hold your own names behind the section's; names without a section are those of parameters, as in a
state_dict.  `rename` translates them by a framework's table, by a map, or by content, and says
what it left out of the names, what it guessed, and what it could not use.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from marref import checks, interop
from marref.interop import maps, mar, naming
from marref.interop.maps import Entry, NameMap
from marref.trees import Array
from marref.verify import content, measure
from marref.verify.comparison import Golden

_SECTION = re.compile(r"(params|gradients|(?:adam|adamw|clipped)/\d+)/")
_WRAPPERS = re.compile(
    r"^(?:(?:module|_orig_mod|model|state_dict|model_state|model_ema|ema|params|variables)[./])+"
)
_NEAR, _NEARER = 0.5, 5.0
"""A guessed activation is off by less than half, and 5 times nearer than to any other."""

_FRAMEWORKS = {"torch": interop.torch, "flax": interop.flax, "axon": interop.axon}

_Table = Callable[[dict[str, Array]], tuple[dict[str, Array], list[str]]]
"""From arrays by your names to arrays by marref's, and the names that it does not know."""


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Arrays by marref's names, and how they came to them.

    Parameters
    ----------
    arrays : dict of str to array
        By golden names.
    notes : tuple of str
        Lines for the user: what was matched, left out of names, guessed and ignored.
    name_map : NameMap or None
        What was found by content.
    """

    arrays: dict[str, Array]
    notes: tuple[str, ...] = ()
    name_map: NameMap | None = None


def rename(
    golden_vectors: Golden, arrays: Mapping[str, Array], names: str | None = None
) -> Renamed:
    """Translate an implementation's names and layouts into marref's.

    Parameters
    ----------
    golden_vectors : Golden
    arrays : dict of str to array
    names : str, optional
        ``"torch"``, ``"flax"``, ``"axon"`` (see `marref.interop`), a JSON file (see
        `marref.interop.maps`), or ``"auto"``: your arrays hold the golden parameters, and are told
        by them.  Of continuous MAR ``"mar"``, the published names.  By default the names are
        marref's.

    Returns
    -------
    Renamed

    Raises
    ------
    OSError
        The map cannot be opened.
    ValueError
        None of the names is known, a layout does not fit its array, or the map is malformed.
    """
    if golden_vectors.is_continuous:
        return _rename_continuous(golden_vectors, arrays, names)
    model, golden_arrays = golden_vectors.model, golden_vectors.arrays
    notes: list[str] = []
    name_map = _map_of_file(names)
    entries = maps.expand(name_map.entries if name_map else (), model.num_layers)
    # Entries may lead to whole golden names too, those of activations for instance.
    for_whole = [entry for entry in entries if all(name in golden_arrays for name in entry.ours)]
    mapped, left = _by_map(for_whole, None, dict(arrays))
    whole, sections, others = _sorted({name: arrays[name] for name in left}, golden_arrays)
    _add(whole, mapped)
    if names == "auto":
        name_map = _by_content(golden_vectors, sections.get("params/", {}), notes)
    table = _table(names, name_map, model.parameter_shapes, model.num_layers)
    translated, left = _sections_by(table, sections, notes)
    _add(whole, translated)
    unknown = {name: arrays[name] for name in arrays if name in {*others, *left}}
    if names == "auto":
        guessed = _guess(golden_vectors, unknown, whole, notes)
        whole |= {ours: unknown.pop(yours) for yours, ours in guessed.items()}
    _leave_out_tied(golden_vectors, whole, notes)
    if not whole and unknown:
        raise ValueError(f"arrays: {_all_unknown(unknown, golden_arrays)}")
    if unknown:
        notes.append(f"ignored, since their names are not known: {checks.listed(unknown)}")
    return Renamed(whole, tuple(notes), name_map)


def _rename_continuous(
    golden_vectors: Golden, arrays: Mapping[str, Array], names: str | None
) -> Renamed:
    if names not in (None, "mar"):
        raise ValueError(
            f"names: received {names}, expected mar, the published names, or none: these are "
            "golden vectors of continuous MAR"
        )
    model, notes = golden_vectors.model, list[str]()

    def published(named: dict[str, Array]) -> tuple[dict[str, Array], list[str]]:
        known = {name for name, _ in mar.published_names(model)}
        return mar.to_leaves(named, model), [name for name in named if name not in known]

    own = functools.partial(_by_own_names, model.parameter_shapes)
    whole, sections, others = _sorted(arrays, golden_vectors.arrays)
    translated, left = _sections_by(own if names is None else published, sections, notes)
    _add(whole, translated)
    unknown = [name for name in arrays if name in {*others, *left}]
    if not whole and unknown:
        raise ValueError(f"arrays: {_all_unknown(unknown, golden_vectors.arrays)}")
    if unknown:
        notes.append(f"ignored, since their names are not known: {checks.listed(unknown)}")
    return Renamed(whole, tuple(notes))


def to_parameters(
    arrays: Mapping[str, Array], names: str | None = None, num_layers: int | None = None
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Translate the parameters of a checkpoint into marref's names and layouts.

    Parameters
    ----------
    arrays : dict of str to array
        With or without the section ``params/``.
    names : str, optional
        As in `rename`, but ``"auto"``, which needs golden vectors to match.
    num_layers : int, optional
        By default counted from the names.

    Returns
    -------
    parameters : dict of str to array
        By marref's dotted names.
    notes : tuple of str
        As in `Renamed`.

    Raises
    ------
    OSError, ValueError
        As in `rename`.
    """
    named = {name.removeprefix("params/"): array for name, array in arrays.items()}
    numbers = [int(n[1]) + 1 for name in named if (n := re.search(r"(?:^|[._/])(\d+)[._/]", name))]
    name_map = _map_of_file(names)
    if num_layers is None and name_map is not None:
        num_layers = maps.num_blocks_of(name_map.entries, named)
    num_layers = num_layers or max(numbers, default=1)
    shapes = naming.parameter_names(num_layers)
    found, left, prefix = _unwrapped(_table(names, name_map, shapes, num_layers), named)
    if not found:
        raise ValueError(f"params: {_all_unknown(left, shapes)}")
    notes = [f"left out of your names: {prefix}"] if prefix else []
    if left:
        notes.append(f"ignored, since their names are not known: {checks.listed(left)}")
    return found, tuple(notes)


def _sorted(
    arrays: Mapping[str, Array], golden_arrays: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, dict[str, Array]], list[str]]:
    """Sort arrays into golden ones, sections of parameters by your names, and other sections."""
    whole: dict[str, Array] = {}
    sections: dict[str, dict[str, Array]] = {}
    others = []
    golden_sections = {name.split("/")[0] for name in golden_arrays}
    for name, array in arrays.items():
        section = _SECTION.match(name)
        if section:
            sections.setdefault(section[0], {})[name[section.end() :]] = array
        elif name in golden_arrays:
            whole[name] = array
        elif name.split("/")[0] in golden_sections:
            others.append(name)
        else:
            sections.setdefault("params/", {}).setdefault(name, array)
    return whole, sections, others


def _map_of_file(names: str | None) -> NameMap | None:
    return None if names in (None, "auto", *_FRAMEWORKS) else maps.read(str(names))


def _sections_by(
    table: _Table, sections: Mapping[str, dict[str, Array]], notes: list[str]
) -> tuple[dict[str, Array], list[str]]:
    """Translate sections; return them by golden names, and the full names that are not known."""
    found: dict[str, Array] = {}
    unknown: list[str] = []
    prefixes: dict[str, list[str]] = {}
    for section, named in sections.items():
        translated, left, prefix = _unwrapped(table, named)
        prefixes.setdefault(prefix, []).append(section)
        found |= {section + name: array for name, array in translated.items()}
        # Names without a section are those of parameters.
        unknown += [name for short in left for name in (section + short, short)]
    notes += [
        f"left out of your names: {prefix} (in {', '.join(where)})"
        for prefix, where in prefixes.items()
        if prefix
    ]
    return found, unknown


def _table(
    names: str | None, name_map: NameMap | None, parameters: Collection[str], num_blocks: int
) -> _Table:
    if name_map is not None:
        entries = maps.expand(name_map.entries, num_blocks)
        return functools.partial(_by_map, entries, name_map.base)
    if names is not None:
        return functools.partial(_by_framework, names)
    return functools.partial(_by_own_names, parameters)


def _by_own_names(
    parameters: Collection[str], named: dict[str, Array]
) -> tuple[dict[str, Array], list[str]]:
    dotted = {name: name.replace("/", ".") for name in named}
    known = {dotted[name]: a for name, a in named.items() if dotted[name] in parameters}
    return known, [name for name in named if dotted[name] not in parameters]


def _by_framework(framework: str, named: dict[str, Array]) -> tuple[dict[str, Array], list[str]]:
    found: dict[str, Array] = {}
    unknown = []
    for name, array in named.items():
        try:
            made = _FRAMEWORKS[framework].to_names({name: array})
        except naming.UnknownName:
            unknown.append(name)
            continue
        _add(found, made)
    return found, unknown


def _by_map(
    entries: Iterable[Entry], base: str | None, named: dict[str, Array]
) -> tuple[dict[str, Array], list[str]]:
    """Lay out what all of an entry's names are there for; a base takes the result and the rest."""
    found: dict[str, Array] = {}
    dotted = {name.replace("/", "."): name for name in named}
    used = set()
    for entry in entries:
        yours = [dotted.get(name.replace("/", ".")) for name in entry.yours]
        here = [name for name in yours if name is not None]
        if here and len(here) == len(yours):
            _add(found, maps.lay_out(entry, [named[name] for name in here]))
            used |= set(here)
    unknown = [name for name in named if name not in used]
    if base is None:
        return found, unknown
    found |= {name: named[name] for name in unknown}
    translated, left = _by_framework(base, found)
    # With a base, an entry may still lead to marref's names.
    own = [name for name in left if name not in unknown]
    return translated | {name: found[name] for name in own}, [n for n in left if n in unknown]


def _add(found: dict[str, Array], made: Mapping[str, Array]) -> None:
    for name in made:
        if name in found:
            raise ValueError(f"arrays: two of them are {name}")
    found |= made


def _unwrapped(table: _Table, named: dict[str, Array]) -> tuple[dict[str, Array], list[str], str]:
    """Translate a section, without a prefix of its names if more of them are known so."""
    found, unknown = table(named)
    prefix = ""
    for candidate, stripped in _without_prefixes(named) if unknown else ():
        known, left = table(stripped)
        if len(left) < len(unknown):
            back = {short: name for name, short in zip(named, stripped, strict=True)}
            found, unknown, prefix = known, [back[name] for name in left], candidate
    return found, unknown, prefix


def _without_prefixes(named: dict[str, Array]) -> list[tuple[str, dict[str, Array]]]:
    """Propose names without the prefixes of wrappers, and without what all of them begin with."""
    wrappers = sorted({found[0] for name in named if (found := _WRAPPERS.match(name))})
    proposals = [(", ".join(wrappers), [_WRAPPERS.sub("", name) for name in named])]
    first, *others = (re.findall(r"[^./]+[./]?", name) for name in named)
    for length in range(1, len(first)):
        if any(parts[:length] != first[:length] for parts in others):
            break
        prefix = "".join(first[:length])
        proposals.append((prefix, [name.removeprefix(prefix) for name in named]))
    return [
        (prefix, dict(zip(shortened, named.values(), strict=True)))
        for prefix, shortened in proposals
        if len(set(shortened)) == len(shortened)
    ]


def _by_content(golden_vectors: Golden, named: dict[str, Array], notes: list[str]) -> NameMap:
    model = golden_vectors.model
    ours = {name: golden_vectors.arrays[f"params/{name}"] for name in model.parameter_shapes}
    bare = {_WRAPPERS.sub("", name): array for name, array in named.items()}
    named = bare if len(bare) == len(named) else named
    entries, _ = content.match(ours, named, model.num_heads)
    if not entries:
        raise ValueError(
            "names: none of your arrays holds a golden parameter; auto needs them again, as they "
            "were loaded, under params/ and your own names"
        )
    name_map = NameMap(tuple(maps.compress(entries, model.num_layers)))
    yours = {name for entry in entries for name in entry.yours}
    found = {name for entry in entries for name in entry.ours}
    notes.append(
        f"{len(yours)} of your arrays are {len(found)} of {len(ours)} parameters, by content"
    )
    notes += _layouts(name_map.entries)
    missing = [name for name in ours if name not in found]
    constant = [name for name in missing if content.is_constant(ours[name])]
    if constant:
        notes.append(f"constant, so that they cannot be told by content: {checks.listed(constant)}")
    missing = [name for name in missing if name not in constant]
    if missing:
        notes.append(f"not found among yours: {checks.listed(missing)}")
    return name_map


def _layouts(entries: Iterable[Entry]) -> list[str]:
    """Say how yours are laid out, entries of the same kind together."""
    plain: dict[str, list[str]] = {}
    special = []
    for entry in entries:
        how = maps.described(entry.steps)
        if len(entry.yours) == len(entry.ours) == 1 and how in ("", "transpose"):
            plain.setdefault(how and "transposed: ", []).append(str(entry))
        elif len(entry.yours) == len(entry.ours) == 1:
            plain.setdefault("reshaped: ", []).append(str(entry))
        else:
            special.append(f"{_short(entry.yours)} = {_short(entry.ours)}: {how}")
    return special + [f"{how}{checks.listed(names)}" for how, names in plain.items() if how]


def _short(names: tuple[str, ...]) -> str:
    """Write names that differ in one place as one: blocks.{i}.attention.{query, key}.kernel."""
    parts = [name.split(".") for name in names]
    if len(names) == 1 or len({len(one) for one in parts}) > 1:
        return ", ".join(names)
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    if sum(len(column) > 1 for column in columns) > 1:
        return f"{names[0]}, …, {names[-1]}"
    return ".".join(c[0] if len(c) == 1 else "{" + ", ".join(c) + "}" for c in columns)


def _guess(
    golden_vectors: Golden,
    unknown: Mapping[str, Array],
    known: Mapping[str, Array],
    notes: list[str],
) -> dict[str, str]:
    """Find the activations that arrays of unknown names are near to, each of them once."""
    activations = {
        name: array
        for name, array in golden_vectors.arrays.items()
        if name.startswith("activations/") and name not in known
    }
    candidates: dict[str, list[tuple[float, str]]] = {}
    for yours, array in unknown.items():
        if array.dtype.kind != "f" or _SECTION.match(yours):
            continue
        distances = sorted(
            (measure.relative(measure.difference(array, a), measure.largest(a)), name)
            for name, a in activations.items()
            if a.shape == array.shape
        )
        if distances and distances[0][0] < _NEAR:
            nearest, *others = distances
            if others and others[0][0] <= _NEARER * nearest[0]:
                notes.append(f"{yours} is as near to {others[0][1]} as to {nearest[1]}: left out")
            else:
                candidates.setdefault(nearest[1], []).append((nearest[0], yours))
    guessed = {}
    for ours, claims in candidates.items():
        claims.sort()
        if len(claims) > 1 and claims[1][0] <= _NEARER * claims[0][0]:
            both = " and ".join(yours for _, yours in claims[:2])
            notes.append(f"{both} are both near to {ours}: left out")
        else:
            distance, yours = claims[0]
            guessed[yours] = ours
            notes.append(f"guessed: {yours} is {ours}, from which it is {distance:.1e} away")
    return guessed


def _leave_out_tied(golden_vectors: Golden, arrays: dict[str, Array], notes: list[str]) -> None:
    """Drop gradients and steps of a head that is the embedding's table: they are of both uses."""
    table, kernel = (
        golden_vectors.arrays[f"params/{n}"] for n in ("embedding.table", "head.kernel")
    )
    if not np.array_equal(table, kernel.T):
        return
    for section in dict.fromkeys(found[0] for name in arrays if (found := _SECTION.match(name))):
        pair = [arrays.get(section + name) for name in ("embedding.table", "head.kernel")]
        tied = pair[0] is None or pair[1] is None or np.array_equal(pair[0], pair[1].T)
        if section != "params/" and tied and not (pair[0] is None and pair[1] is None):
            for name in ("embedding.table", "head.kernel"):
                arrays.pop(section + name, None)
            notes.append(f"left out of {section}: the embedding's table, tied to the head's kernel")


def _all_unknown(names: Iterable[str], known: Collection[str]) -> str:
    first, *others = names
    more = f"; unknown too: {checks.listed(others)}" if others else ""
    return checks.unknown_name(first, known) + more
