"""Structure, where the catalogue ends: what the first differing array is.

The golden arrays are at hand, so much can be said of an array without knowing the mistake: that
it is √head_dim times the golden one, another block's, right but for one head, what the layer makes
of a transposed kernel.  A sentence is a claim about numbers.  It is made only if every entry of
the array fits within its budget, and if that could not be by chance: see
`marref.verify.structure.evidence`.

    relations       whatever the array stands for: times, plus, permuted, another
    places          where it differs, and what it is there
    layers          what the layer makes of another kernel, bias, input, epsilon, …
    losses, gradients, optimisers, decoder      the sections after the forward pass
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from marref.trees import Array
from marref.verify.comparison import Comparison, Golden, Row
from marref.verify.structure import (
    attending,
    backward,
    chain,
    decoder,
    embeddings,
    gradients,
    layers,
    losses,
    optimisers,
    places,
    sources,
)
from marref.verify.structure.evidence import Case, Finding, Hint, first, floor
from marref.verify.structure.relations import RELATIONS, SIMPLE, by_axes

__all__ = ["hints"]

MOST = 3
"""So many sentences are said at most."""


def hints(
    golden_vectors: Golden,
    arrays: Mapping[str, Array],
    comparison: Comparison,
    *,
    faulty: bool = False,
) -> tuple[str, ...]:
    """Say what the first differing array is, most telling first.

    Parameters
    ----------
    golden_vectors : Golden
    arrays : dict of str to array
        As compared.
    comparison : Comparison
        Of these arrays.
    faulty : bool
        The golden vectors are of a faulty model, where a layer that seems wrong may be right: none
        is computed again with other parameters.

    Returns
    -------
    tuple of str
        At most `MOST` sentences; none if nothing differs, or nothing can be said for certain.
    """
    if comparison.first is None:
        return ()
    if golden_vectors.is_continuous:
        case = _case(golden_vectors, arrays, comparison, comparison.differing[0])
        found = _found_anywhere(case)
        return tuple(finding.sentence(f"your {case.name}") for finding in found[:MOST])
    row = _begins(golden_vectors, comparison)
    case = _case(golden_vectors, arrays, comparison, row)
    setting = "/".join(row.name.split("/")[:2])
    subject = (
        f"your decoder, in {setting},"
        if setting.startswith(("decode/", "guidance/", "samplers/"))
        else f"your {row.name}"
    )
    return tuple(found.sentence(subject) for found in _found(case, faulty)[:MOST])


def _begins(golden_vectors: Golden, comparison: Comparison) -> Row:
    """Choose the array where the difference begins: of gradients, the last of the network."""
    row = comparison.differing[0]
    if row.name.split("/")[0] not in gradients.SECTIONS:
        return row
    rows = {row.name: row for row in comparison.differing}
    wrong = [name for name in rows if name.split("/")[0] in gradients.SECTIONS]
    return rows[gradients.backward_order(wrong, golden_vectors.model.num_layers)[0]]


def _case(vectors: Golden, arrays: Mapping[str, Array], comparison: Comparison, row: Row) -> Case:
    golden = np.asarray(vectors.arrays[row.name], np.float64)
    budget = floor(golden, row.budget, comparison.precision_of(row.name))
    case = Case(
        row.name,
        np.asarray(arrays[row.name], np.float64),
        golden,
        budget,
        vectors,
        arrays,
        comparison,
    )
    return _with_others(case)


def _with_others(case: Case) -> Case:
    """Add what an array may be in place of what it should be, and what may be missing in it."""
    section, shape = case.name.split("/")[0], case.golden.shape
    others: dict[str, Array] = {}
    addends: dict[str, Array] = {}
    if case.golden.size >= 4:
        others = {
            name: np.asarray(array, np.float64)
            for name, array in case.vectors.arrays.items()
            if name.split("/")[0] == section and name != case.name and array.shape == shape
        }
        if section == "activations" and len(shape) == 3 and not case.vectors.is_continuous:
            for name, leaf in case.parameters.items():
                if leaf.shape == shape[-1:]:
                    addends[name] = np.broadcast_to(leaf, shape)
            if case.name == "activations/embedding":
                addends |= embeddings.parts(case)
            streams = sources.streams(case)
            others |= {
                name: array
                for name, array in streams.items()
                if array.shape == shape and f"activations/{name}" not in case.vectors.arrays
            }
    return dataclasses.replace(case, others=others, addends=addends)


def _found(case: Case, faulty: bool) -> list[Finding]:
    """Say what is known of an array: what it is or, if that is not found, where it differs."""
    section = case.name.split("/")[0]
    if section == "samplers":
        return _some(decoder.step(case))
    broken = places.not_finite(case)
    if broken is not None:
        return [broken]
    if section in ("decode", "guidance"):
        return decoder.decoder(case)
    if section == "schedule":
        return _some(decoder.counts(case))
    if section == "ties" or not math.isfinite(case.budget):
        return []
    if section == "loss":
        return _some(losses.loss(case) or losses.ratio(case))
    of_section = SIMPLE if faulty and section == "activations" else _hints(section)
    what = first((*of_section, *RELATIONS), case)
    if what is not None:
        return [what]
    rows = attending.rows(case) if case.name.endswith("attention.weights") else None
    where = places.parts(case)
    if where is None or where.residual is None:
        where = by_axes(case) or where
    return [*_some(rows), *_some(where), *_some(places.jump(case))]


def _found_anywhere(case: Case) -> list[Finding]:
    """Say what can be said of an array whatever it stands for."""
    if not math.isfinite(case.budget) or case.golden.dtype.kind != "f" or case.golden.size < 2:
        return []
    what = places.not_finite(case) or first((*SIMPLE, *RELATIONS), case)
    if what is not None:
        return [what]
    where = places.parts(case)
    if where is None or where.residual is None:
        where = by_axes(case) or where
    return [*_some(where), *_some(places.jump(case))]


def _hints(section: str) -> tuple[Hint, ...]:
    """List what is asked of the arrays of a section before their relation to the golden ones."""
    of_section: dict[str, tuple[Hint, ...]] = {
        "activations": (*SIMPLE, layers.of_layer, chain.found),
        "gradients": (
            gradients.zeros,
            gradients.common_factor,
            *SIMPLE,
            gradients.of_gradient,
        ),
        "activation_gradients": (gradients.common_factor, *SIMPLE, backward.found),
        **dict.fromkeys(optimisers.SECTIONS, (optimisers.steps, *SIMPLE)),
    }
    return of_section.get(section, SIMPLE)


def _some(finding: Finding | None) -> list[Finding]:
    return [] if finding is None else [finding]
