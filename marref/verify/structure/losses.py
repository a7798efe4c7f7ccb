"""What a loss is: which targets, which positions, divided by what, to which base.

A loss is one number, and a number is met by chance.  So the table is closed, a candidate must be
met far more closely than chance has it among so many, and what else is met within the budget must
be the same number, or nothing is said.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from marref.loss import log_softmax
from marref.trees import Array
from marref.verify.structure.evidence import Case, Finding, named

_BITS = 8.0
"""Less than for arrays: one number has not more to give."""
_NEAREST = 256.0
"""A part of the budget that a loss is not expected to come closer than."""


def loss(case: Case) -> Finding | None:
    """Say which loss of the golden logits yours is."""
    return _met(case, list(_losses(case, 1))) or _met(case, list(_losses(case, 2)))


def ratio(case: Case) -> Finding | None:
    """Say what yours is of the golden loss, if that is a number with a name."""
    yours, golden = float(case.yours), float(case.golden)
    text = named(case, yours / golden, case.budget / abs(golden)) if golden else ""
    if "(" not in text or math.log2(max(abs(yours - golden) / case.budget, 1.0)) < _BITS + 6.0:
        return None
    return Finding(f"is the golden loss times {text}")


def _met(case: Case, table: list[tuple[str, float]]) -> Finding | None:
    """Accept the candidates of a table that give one and the same number."""
    yours, golden = float(case.yours), float(case.golden)
    tolerance = 0.5 * case.budget
    met = [
        (clause, value)
        for clause, value in table
        if abs(yours - value) <= tolerance * max(1.0, abs(value / golden) if golden else 1.0)
    ]
    if not met or _bits(case, met[0][1]) - math.log2(len(table)) < _BITS:
        return None
    value = met[0][1]
    if any(abs(other - value) > 1e-12 * abs(value) for _, other in met):
        return None
    clauses = list(dict.fromkeys(clause for clause, _ in met))
    more = f", or {len(clauses) - 3} others" if len(clauses) > 3 else ""
    return Finding("is " + ", or ".join(clauses[:3]) + more, abs(yours - value) / case.budget)


def _bits(case: Case, value: float) -> float:
    """Count the evidence in yours being so near to a value."""
    near = max(2.0 * abs(float(case.yours) - value), case.budget / _NEAREST)
    return math.log2(max(abs(float(case.yours - case.golden)) / near, 1.0))


def _losses(case: Case, changed: int) -> Iterator[tuple[str, float]]:
    """List losses with so many things changed."""
    for (entropy, losses), (mean, weights), (base, factor) in itertools.product(
        _entropies(case), _means(case), _bases()
    ):
        if sum(map(bool, (entropy, mean, base))) == changed:
            yield _clause(entropy, mean, base), factor * float((weights * losses).sum())


def _clause(entropy: str, mean: str, base: str) -> str:
    words = entropy or "the cross-entropy of the golden logits"
    return " ".join(filter(None, (words, mean or "averaged over the masked positions", base)))


def _bases() -> list[tuple[str, float]]:
    return [
        ("", 1.0),
        ("to base 2", 1.0 / math.log(2.0)),
        ("to base 10", 1.0 / math.log(10.0)),
        ("with its sign turned", -1.0),
        ("times 2", 2.0),
        ("times 1/2", 0.5),
    ]


def _entropies(case: Case) -> list[tuple[str, Array]]:
    """List the losses of every position, [batch, length], by what is wrong with them."""
    logits = np.asarray(case.vectors.arrays["activations/logits"], np.float64)
    batch = case.vectors.batch
    targets, tokens, count = batch["targets"], batch["tokens"], case.vectors.model.vocab_size
    flat = logits.reshape(-1, logits.shape[-1])
    logs = log_softmax(flat).reshape(logits.shape)

    def at(log: Array, ids: Array) -> Array:
        return -np.take_along_axis(log, ids[..., None], axis=-1)[..., 0]

    right = at(logs, targets)
    without = flat.copy()
    without[:, 0] = -np.inf
    excluded = log_softmax(without).reshape(logits.shape)
    found = [("", right)]
    found.append(("the cross-entropy with the tokens as targets", at(logs, tokens)))
    for words, shift in (("the next position's", -1), ("the previous position's", 1)):
        text = f"the cross-entropy with {words} target (rolled within the sequence)"
        found.append((text, at(logs, np.roll(targets, shift, axis=1))))
        rolled = np.roll(targets.ravel(), shift).reshape(targets.shape)
        found.append(
            (f"the cross-entropy with {words} target (rolled in the batch)", at(logs, rolled))
        )
    found.append(("the cross-entropy with [MASK] left out of the softmax", at(excluded, targets)))
    for amount in (0.01, 0.05, 0.1, 0.2):
        uniform = -logs.mean(axis=-1)
        smooth = (1 - amount) * right + amount * uniform
        found.append((f"the cross-entropy with label smoothing {amount:g}", smooth))
        others = (uniform * count - right) / (count - 1)
        text = f"the cross-entropy with label smoothing {amount:g} over the other ids"
        found.append((text, (1 - amount) * right + amount * others))
    probabilities = np.exp(-right)
    found.append(("1 less the probability of the target", 1.0 - probabilities))
    found.append(("minus the probability of the target", -probabilities))
    found.append(("minus the logit of the target", at(logits, targets)))
    twice = log_softmax(np.exp(logs).reshape(flat.shape)).reshape(logits.shape)
    found.append(("the cross-entropy of the softmax in place of the logits", at(twice, targets)))
    for gamma in (1.0, 2.0):
        text = f"the focal loss with gamma {gamma:g}"
        found.append((text, (1.0 - probabilities) ** gamma * right))
    for temperature in (0.5, 2.0, math.sqrt(case.vectors.model.embed_dim)):
        scaled = log_softmax(flat / temperature).reshape(logits.shape)
        text = f"the cross-entropy of the logits divided by {temperature:.4g}"
        found.append((text, at(scaled, targets)))
    return found


def _means(case: Case) -> list[tuple[str, Array]]:
    """List the weights of the positions, [batch, length], by what is wrong with them."""
    mask = case.vectors.batch["mask"].astype(np.float64)
    tokens = case.vectors.batch["tokens"]
    batch, length = tokens.shape
    count = mask.sum()
    rows = mask.sum(axis=1)
    filled = rows > 0
    everywhere = np.ones_like(mask)
    by_row = mask / np.maximum(rows, 1.0)[:, None]
    weighted = mask * (rows / length)[:, None]
    inverse = mask / np.maximum(rows / length, 1.0 / length)[:, None]
    shifted = np.zeros_like(mask)
    shifted[:, :-1] = mask[:, 1:]
    weights = {
        "": mask / count,
        "summed over the masked positions": mask,
        "averaged over all positions": everywhere / mask.size,
        "summed over all positions": everywhere,
        "averaged over the positions that are not masked": (1 - mask) / max(mask.size - count, 1.0),
        "summed over the masked positions and divided by batch times length": mask / mask.size,
        "summed over the masked positions and divided by the batch": mask / batch,
        "summed over the masked positions and divided by the length": mask / length,
        "summed over the masked positions and divided by the sequences with one": mask
        / max(filled.sum(), 1),
        "summed over the masked positions and divided by their number plus 1": mask / (count + 1),
        "summed over all positions and divided by the number of masked ones": everywhere / count,
        "summed over all positions and divided by the batch": everywhere / batch,
        "averaged by sequence, empty ones counted as 0": by_row / batch,
        "averaged by sequence, empty ones left out": by_row / max(filled.sum(), 1),
        "averaged by sequence, and summed": by_row,
        "averaged with the mask ratio of the sequence as weight": weighted / max(weighted.sum(), 1),
        "summed with the mask ratio as weight, divided by |M|": weighted / count,
        "summed with 1/ratio as weight, divided by |M|": inverse / count,
        "summed with 1/ratio as weight, divided by batch times length": inverse / mask.size,
        "averaged over the positions before masked ones": shifted / max(shifted.sum(), 1),
        "averaged over positions that hold [MASK]": (tokens == 0) / max((tokens == 0).sum(), 1),
        "averaged over the masked positions of the first sequence": (
            mask * (np.arange(batch) == 0)[:, None] / max(rows[0], 1)
        ),
    }
    for left_out, words in ((0, "the first position"), (length - 1, "the last position")):
        some = mask * (np.arange(length) != left_out)
        weights[f"averaged over the masked positions without {words}"] = some / max(some.sum(), 1)
    return list(weights.items())
