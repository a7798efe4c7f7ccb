"""What is added up in the residual stream, and how much of it."""

import dataclasses
import math

import numpy as np

from marref.trees import Array
from marref.verify.structure import relations
from marref.verify.structure.evidence import Candidates, Case, Finding, named, number
from marref.verify.structure.sources import input_of, normalise


def fitted(case: Case, block: str, _: str) -> Finding | None:
    """Say how much of each part of the residual stream is in yours."""
    parts = {
        "the input of the block": input_of(case, block),
        "attention.output": case.activations[f"{block}.attention.output"],
        "feed_forward.down": case.activations[f"{block}.feed_forward.down"],
    }
    normed = {
        "attention_norm": case.activations[f"{block}.attention_norm"],
        "feed_forward_norm": case.activations[f"{block}.feed_forward_norm"],
    }
    found = combination(case, parts) or combination(case, {**parts, **normed})
    if found is not None:
        return found
    leaves = case.parameters
    candidates = []
    for norm in ("attention_norm", "feed_forward_norm"):
        scale, bias = leaves[f"{block}.{norm}.scale"], leaves[f"{block}.{norm}.bias"]
        normalised = normalise(case.golden, case.vectors.model.layer_norm_epsilon)
        candidates.append((f"is the sum normalised by {norm}", normalised * scale + bias))
    return case.fitting(candidates) or _dropped_branch(case, parts)


def _dropped_branch(case: Case, parts: dict[str, Array]) -> Finding | None:
    """Say that entries of the last branch are dropped and the others scaled up."""
    branch = parts["feed_forward.down"]
    yours = case.yours - (case.golden - branch)
    rest = dataclasses.replace(case, yours=yours, golden=branch, others={}, addends={})
    found = relations.dropped(rest)
    if found is None:
        return None
    clause = found.clause.replace("is 0", "has a feed_forward.down that is 0", 1)
    return Finding(clause.replace("the golden array", "golden"), found.residual)


def combination(case: Case, parts: dict[str, Array], tried: int = 1) -> Finding | None:
    """Fit yours by a sum of parts, each with a coefficient, and say them."""
    columns = np.stack([part.ravel() for part in parts.values()], axis=1)
    solved, _, rank, _ = np.linalg.lstsq(columns, case.yours.ravel(), rcond=None)
    if rank < len(parts):
        return None
    spread = case.budget / np.abs(columns).max(axis=0)
    # What is a clean number within the error is that number.
    clean = [
        _cleaned(float(value), float(near)) for value, near in zip(solved, spread, strict=True)
    ]
    candidate = (columns @ np.array(clean)).reshape(case.golden.shape)
    fitted = sum(value not in (0.0, 1.0) for value in clean)
    residual = case.residual(candidate, fitted=fitted, tried=tried * 3 ** len(parts))
    if residual is None:
        return None
    terms = [
        (name if value == 1.0 else f"{_coefficient(case, value, float(near))} times {name}")
        for name, value, near in zip(parts, clean, spread, strict=True)
        if value != 0.0
    ]
    missing = [name for name, value in zip(parts, clean, strict=True) if value == 0.0]
    without = f", without {' and '.join(missing)}" if missing and len(parts) <= 3 else ""
    return Finding(f"is {' plus '.join(terms) or '0'}{without}", residual)


def _coefficient(case: Case, value: float, near: float) -> str:
    return number(value) if value in (2.0, 0.5, -1.0) else named(case, value, near)


def _cleaned(value: float, spread: float) -> float:
    for known in (0.0, 1.0, 2.0, 0.5, -1.0, math.sqrt(0.5), math.sqrt(2.0), 1 / 0.9):
        if abs(value - known) <= 4.0 * spread:
            return known
    return value


def candidates(case: Case, block: str, _: str) -> Candidates:
    """List what a block's output might be."""
    x = input_of(case, block)
    attended = case.activations[f"{block}.attention.output"]
    fed = case.activations[f"{block}.feed_forward.down"]
    normed = case.activations[f"{block}.feed_forward_norm"]
    yield "is feed_forward.down, without the residual stream", fed
    yield "is the stream after attention, without feed_forward.down", x + attended
    yield "is the input of the block and feed_forward.down, without attention.output", x + fed
    yield "is attention.output and feed_forward.down, without the input", attended + fed
    yield "is feed_forward_norm and feed_forward.down", normed + fed
    yield "has attention.output twice", x + 2 * attended + fed
    yield "has feed_forward.down twice", x + attended + 2 * fed
    yield "has the input of the block twice", 2 * x + attended + fed
    yield "has half of the branches", x + (attended + fed) / 2
