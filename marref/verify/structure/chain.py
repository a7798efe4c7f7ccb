"""What an activation would be, had a layer before it that was not given one mistake.

Few programs hand over what happens inside of attention.  So where a difference first shows in an
array whose predecessors were not given, each layer between it and the last one that agrees is
changed in turn, as in `marref.verify.structure.layers`, and what follows is computed.
"""

import math
from collections.abc import Callable

import numpy as np

from marref.layers import attention, gelu
from marref.trees import Array
from marref.verify import measure
from marref.verify.structure import layers
from marref.verify.structure.evidence import Case, Finding
from marref.verify.structure.sources import normalise, stream

_MOST_STAGES = 14


def found(case: Case) -> Finding | None:
    """Say which one mistake in a layer before comes to yours."""
    order = list(case.activations)
    target = case.name.removeprefix("activations/")
    if target not in order:
        return None
    place = order.index(target)
    between = []
    for name in reversed(order[max(0, place - _MOST_STAGES) : place]):
        given = f"activations/{name}" in case.arrays
        if given and _cuts(name):
            break
        if not given:
            between.append(name)
        if target in ("final_norm", "logits") and name.endswith(".output"):
            # A mistake in one block of several is in all of them.
            break
    after = {name: order[order.index(name) : place + 1] for name in between}
    mistaken = {name: list(layers.candidates(case, name)) for name in between}
    candidates = [
        (f"is what follows if {name} {clause}", {name: array}, after[name])
        for name, listed in mistaken.items()
        for clause, array in listed
    ]
    candidates += _together(mistaken, after)
    worst = _worst_sequence(case)
    made = (
        (clause, array)
        for clause, changed, order in candidates
        if _near(case, changed, order, worst)
        and (array := _pushed(case, order, changed, slice(None))) is not None
    )
    return case.fitting(made, len(candidates))


def _worst_sequence(case: Case) -> slice:
    distance = np.abs(case.yours - case.golden)
    worst = int(distance.reshape(len(distance), -1).max(axis=1).argmax())
    return slice(worst, worst + 1)


def _near(case: Case, changed: dict[str, Array], order: list[str], rows: slice) -> bool:
    """Whether the sequence that differs most would fit: most candidates end here."""
    made = _pushed(case, order, changed, rows)
    if made is None:
        return False
    return measure.difference(case.yours[rows], made) <= 4.0 * case.tolerance(made)


def _cuts(name: str) -> bool:
    """Whether all that comes after an activation follows from it, or from it and what it shows."""
    return (
        name == "embedding"
        or name.endswith(("feed_forward_norm", "final_norm"))
        or (name.endswith(".output") and not name.endswith("attention.output"))
    )


def _together(
    mistaken: dict[str, list[tuple[str, Array]]], after: dict[str, list[str]]
) -> list[tuple[str, dict[str, Array], list[str]]]:
    """List one and the same mistake in query, key and value."""
    found = []
    blocks = [name.removesuffix("attention.query") for name in after if "query" in name]
    for block in blocks:
        names = [f"{block}attention.{part}" for part in ("query", "key", "value")]
        if not all(name in after for name in names):
            continue
        alike = [
            {clause.replace(name, "the layer"): array for clause, array in mistaken[name]}
            for name in names
        ]
        for clause in alike[0]:
            if clause in alike[1] and clause in alike[2]:
                changed = {name: arrays[clause] for name, arrays in zip(names, alike, strict=True)}
                said = f"is what follows if query, key and value of {block[:-1]} each {clause}"
                found.append((said, changed, after[names[0]]))
    return found


def _pushed(case: Case, order: list[str], changed: dict[str, Array], rows: slice) -> Array | None:
    """Compute what follows from changed activations, in some sequences, up to the last name."""
    known = {name: array[rows] for name, array in changed.items()}
    for name in order:
        if name in changed:
            continue
        made = _computed(case, name, known, rows)
        if not np.isfinite(made).all():
            return None
        if not np.array_equal(made, case.activations[name][rows]):
            known[name] = made
    return known.get(order[-1])


def _computed(case: Case, name: str, known: dict[str, Array], rows: slice) -> Array:
    """Compute an activation from those before it: the changed ones, and the golden others."""
    model, leaves = case.vectors.model, case.parameters

    def at(other: str) -> Array:
        return known[other] if other in known else case.activations[other][rows]

    def linear(layer: str, source: str) -> Array:
        return np.asarray(at(source) @ leaves[f"{layer}.kernel"] + leaves[f"{layer}.bias"])

    def norm(layer: str, x: Array) -> Array:
        normalised = normalise(x, model.layer_norm_epsilon)
        return np.asarray(normalised * leaves[f"{layer}.scale"] + leaves[f"{layer}.bias"])

    if name == "class_embedding":
        return case.activations[name][rows]
    if name == "final_norm":
        return norm(name, at(f"blocks.{model.num_layers - 1}.output"))
    if name == "logits":
        return linear("head", "final_norm")
    index, _, part = name.removeprefix("blocks.").partition(".")
    block = f"blocks.{index}"

    def before() -> Array:
        return stream(at, case.activations, int(index))

    steps: dict[str, Callable[[], Array]] = {
        "attention_norm": lambda: norm(name, before()),
        "attention.weights": lambda: attention.softmax(
            at(f"{block}.attention.query")
            @ at(f"{block}.attention.key").mT
            / math.sqrt(model.embed_dim // model.num_heads)
        ),
        "attention.context": lambda: attention.merge_heads(
            at(f"{block}.attention.weights") @ at(f"{block}.attention.value")
        ),
        "attention.output": lambda: linear(name, f"{block}.attention.context"),
        "feed_forward_norm": lambda: norm(name, before() + at(f"{block}.attention.output")),
        "feed_forward.up": lambda: linear(name, f"{block}.feed_forward_norm"),
        "feed_forward.activation": lambda: gelu.forward(at(f"{block}.feed_forward.up"), model.gelu)[
            0
        ],
        "feed_forward.down": lambda: linear(name, f"{block}.feed_forward.activation"),
        "output": lambda: (
            before() + at(f"{block}.attention.output") + at(f"{block}.feed_forward.down")
        ),
    }
    if part in ("attention.query", "attention.key", "attention.value"):
        split = linear(name, f"{block}.attention_norm")
        return attention.split_heads(split, model.num_heads)
    return steps[part]()
