"""What a gradient is, looked for in the order of the backward pass: the head first.

The gradients are compared in the order of the forward pass, and a mistake in the backward of one
layer spreads to all before it.  So the first wrong one is not the first of the comparison.
"""

import re
from collections.abc import Iterable

import numpy as np

from marref.verify import measure
from marref.verify.structure import backward, classes
from marref.verify.structure.evidence import Candidates, Case, Finding, named

SECTIONS = ("gradients", "activation_gradients")

_WITHIN_BLOCK = (
    "output",
    "feed_forward.down",
    "feed_forward.up",
    "feed_forward_norm",
    "attention.output",
    "attention.value",
    "attention.query",
    "attention.key",
    "attention_norm",
)


def backward_order(names: Iterable[str], num_layers: int) -> list[str]:
    """Sort gradients into the order in which a backward pass comes to them."""
    return sorted(names, key=lambda name: _place(name, num_layers))


def _place(name: str, num_layers: int) -> tuple[int, int, str]:
    section, _, leaf = name.partition("/")
    if leaf == "logits":
        return (0, 0, name)
    if leaf.startswith("head"):
        return (1, 0, name)
    if leaf.startswith("final_norm"):
        return (2, 0, name)
    matched = re.match(r"blocks\.(\d+)\.(.*)", leaf)
    if matched is None:
        return (4 + num_layers, section == "gradients", name)
    part = re.sub(r"\.(kernel|bias|scale)$", "", matched[2])
    return (3 + num_layers - 1 - int(matched[1]), _WITHIN_BLOCK.index(part), name)


def common_factor(case: Case) -> Finding | None:
    """All gradients that were given are one number times the golden ones."""
    names = [name for name in case.arrays if name.split("/")[0] in SECTIONS]
    top = float((case.golden * case.golden).sum())
    if len(names) < 2 or top == 0.0:
        return None
    value = float((case.golden * case.yours).sum()) / top
    expected = {name: value * np.asarray(case.vectors.arrays[name]) for name in names}
    if not case.all_are(expected, fitted=1):
        return None
    uncertainty = case.tolerance(value * case.golden) / measure.largest(case.golden)
    text = named(case, value, uncertainty)
    return Finding(f"is the golden array times {text}, and so are all {len(names)} gradients given")


def of_gradient(case: Case) -> Finding | None:
    """Say what the backward of the layer did."""
    leaf = case.name.partition("/")[2]
    if leaf == "embedding.table":
        found = case.fitting(_table_candidates(case))
        return found or backward.found(case)
    if leaf == "class_embedding.table":
        found = case.fitting(classes.gradient_candidates(case))
        return found or backward.found(case)
    found = case.fitting(_bias_candidates(case)) if leaf.endswith(".bias") else None
    return found or backward.found(case)


def _table_candidates(case: Case) -> Candidates:
    stream = case.vectors.arrays.get("activation_gradients/embedding")
    if stream is None:
        return
    dx = np.asarray(stream, np.float64)
    tokens, targets = case.vectors.batch["tokens"], case.vectors.batch["targets"]
    counts = np.bincount(tokens.ravel(), minlength=case.golden.shape[0])
    assigned, unmasked, by_target = (np.zeros_like(case.golden) for _ in range(3))
    first = assigned.copy()
    assigned[tokens] = dx
    first[tokens[::-1, ::-1]] = dx[::-1, ::-1]
    np.add.at(by_target, targets, dx)
    np.add.at(unmasked, tokens, dx * (tokens != 0)[..., None])
    yield "has the last of each token's gradients, in place of their sum", assigned
    yield "has the first of each token's gradients, in place of their sum", first
    yield (
        "has the mean of each token's gradients, in place of their sum",
        (case.golden / np.maximum(counts, 1)[:, None]),
    )
    yield "is right but for row 0 of [MASK], which is 0", unmasked
    yield "has the gradients in the rows of the targets, not of the tokens", by_target


def _bias_candidates(case: Case) -> Candidates:
    batch, length = case.vectors.batch["tokens"].shape
    yield "is averaged over batch and positions, in place of summed", case.golden / (batch * length)
    yield "is averaged over the batch, in place of summed", case.golden / batch
    yield "is averaged over the positions, in place of summed", case.golden / length


def zeros(case: Case) -> Finding | None:
    """Name the gradients that are 0 and should not be."""
    if case.yours.any():
        return None
    others = [
        name.removeprefix("gradients/")
        for name, array in case.arrays.items()
        if name.startswith("gradients/") and name != case.name
        # That of the key bias is 0 but for rounding.
        if not name.endswith("attention.key.bias") and not np.any(array)
        if np.any(case.vectors.arrays[name])
    ]
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    so_are = f"; so are those of {', '.join(others[:4])}{more}" if others else ""
    return Finding(f"is 0: no gradient reaches it{so_are}")
