"""What a decoder did: how many it revealed, when, where, and what it left or changed."""

import itertools
import re

import numpy as np

from marref import schedules
from marref.trees import Array
from marref.verify import golden
from marref.verify.structure.evidence import Case, Finding


def decoder(case: Case) -> list[Finding]:
    """Say what can be seen in the steps of one decoding setting."""
    setting = case.name.split("/")[1]
    steps = {
        key: np.asarray(case.arrays[name])
        for key in ("tokens", "mask", "confidence")
        if (name := f"decode/{setting}/steps/{key}") in case.arrays
    }
    found = [
        *_counts(case, setting, steps.get("mask")),
        *_order(case, setting, steps.get("mask")),
        *_confidences(case, setting, steps.get("confidence")),
        *_tokens(case, setting, steps.get("tokens")),
    ]
    return [Finding(clause) for clause in found]


def counts(case: Case) -> Finding | None:
    """Say what a schedule's counts are."""
    name, masked, steps = case.name.split("/")[1:]
    yours = case.yours.astype(np.int64)
    shown = ", ".join(map(str, yours[:8]))
    total = int(yours.sum())
    if total != int(masked):
        return Finding(f"reveals {shown}: {total} in all, of {masked} masked positions")
    for other, schedule in schedules.SCHEDULES.items():
        if other != name and np.array_equal(schedule(int(masked), int(steps)), yours):
            return Finding(f"has the counts of the {other} schedule: {shown}")
    if len(yours) > 1 and np.array_equal(yours[::-1], case.golden):
        return Finding(f"has the golden counts in reverse: {shown}")
    if (yours < 1).any():
        return Finding(f"reveals nothing in step {int((yours < 1).argmax()) + 1}: {shown}")
    return Finding(
        f"reveals {shown}, where {', '.join(f'{n:g}' for n in case.golden[:8])} is expected"
    )


def _counts(case: Case, setting: str, mask: Array | None) -> list[str]:
    """Compare the number revealed in each step."""
    expected = np.asarray(case.vectors.arrays[f"decode/{setting}/steps/mask"]).astype(bool)
    if mask is None:
        return []
    mask = mask.astype(bool)
    started = np.asarray(case.vectors.arrays[f"decode/{setting}/start"]) == 0
    sentences = []
    for row in range(started.shape[0]):
        yours, right = (_revealed(m[:, row], started[row]) for m in (mask, expected))
        if yours == right:
            continue
        others = _other_counts(int(started[row].sum()), setting)
        known = [words for words, numbers in others.items() if numbers == yours]
        like = f", as {' or '.join(known)} does" if known else ""
        if len(yours) > 1 and yours[0] == started[row].sum():
            like = ": all in the first step"
        sentences.append(
            f"reveals {_list(yours)} tokens in its steps, where {_list(right)} is expected{like}"
        )
        break
    if mask[-1].any():
        sentences.append(f"still masks {int(mask[-1].sum())} positions after the last step")
    return sentences


def _revealed(masks: Array, started: Array) -> list[int]:
    left = [int(started.sum()), *(int(mask.sum()) for mask in masks)]
    return [before - after for before, after in itertools.pairwise(left)]


def _other_counts(masked: int, setting: str) -> dict[str, list[int]]:
    steps = golden.DECODINGS[setting]["num_steps"]
    found = {
        f"the {name} schedule": schedule(masked, steps).tolist()
        for name, schedule in schedules.SCHEDULES.items()
    }
    found["the cosine schedule in reverse"] = found["the cosine schedule"][::-1]
    used = min(steps, masked)
    found["an equal number, rounded down,"] = [masked // used] * (used - 1) + [
        masked - (masked // used) * (used - 1)
    ]
    return found


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")


def _order(case: Case, setting: str, mask: Array | None) -> list[str]:
    """Say by what order positions were revealed, where the counts are right."""
    expected = np.asarray(case.vectors.arrays[f"decode/{setting}/steps/mask"]).astype(bool)
    if mask is None or mask.shape != expected.shape or np.array_equal(mask, expected):
        return []
    mask = mask.astype(bool)
    if not np.array_equal(mask.sum(axis=2), expected.sum(axis=2)) or len(mask) < 2:
        return []
    started = np.asarray(case.vectors.arrays[f"decode/{setting}/start"]) == 0
    confidence = case.arrays.get(f"decode/{setting}/steps/confidence")
    reading, backwards, lowest = True, True, confidence is not None
    before = started
    for step, after in enumerate(mask):
        for row in range(len(before)):
            chosen, left = before[row] & ~after[row], before[row] & after[row]
            if not (chosen.any() and left.any()):
                continue
            places, rest = np.flatnonzero(chosen), np.flatnonzero(left)
            reading &= bool(places.max() < rest.min())
            backwards &= bool(places.min() > rest.max())
            if confidence is not None:
                sure = np.asarray(confidence)[step, row]
                lowest &= bool(sure[chosen].max() <= sure[left].min())
        before = after
    step = int((mask != expected).any(axis=(1, 2)).argmax())
    if reading:
        return ["reveals positions from left to right"]
    if backwards:
        return ["reveals positions from right to left"]
    if lowest:
        return ["reveals the least confident positions first"]
    return [f"reveals other positions than expected from step {step + 1} on, with right counts"]


def _confidences(case: Case, setting: str, confidence: Array | None) -> list[str]:
    if confidence is None:
        return []
    expected = np.asarray(case.vectors.arrays[f"decode/{setting}/steps/confidence"])
    name = f"decode/{setting}/steps/confidence"
    budget = next((row.budget for row in case.comparison.rows if row.name == name), 0.0)
    yours = confidence.astype(np.float64)
    sentences = []
    if (yours < 0).any() and (yours <= 0).all():
        sentences.append("has confidences that are all negative, as logarithms are")
    elif (yours < 0).any() or (yours > 1).any():
        low, high = yours.min(), yours.max()
        sentences.append(f"has confidences from {low:.3g} to {high:.3g}, outside [0, 1]")
    if yours.shape == expected.shape:
        first = yours[0], expected[0]
        if not np.abs(first[0] - first[1]).max() <= budget:
            other = _other_setting(case, setting, first[0], budget)
            sentences.append(f"has other confidences in the first step{other}")
    return sentences


def _other_setting(case: Case, setting: str, first: Array, budget: float) -> str:
    """Name the setting with which the first step's confidences are yours."""
    words = {
        "cosine-3": "temperature 1",
        "cold": "temperature 0.5",
        "hot": "temperature 2",
        "plain": "[MASK] in the softmax",
    }
    for other, what in words.items():
        array = case.vectors.arrays.get(f"decode/{other}/steps/confidence")
        if other == setting or array is None or array[0].shape != first.shape:
            continue
        if np.abs(first - np.asarray(array[0], np.float64)).max() <= 2 * budget:
            return f": those with {what}"
    return ""


def _tokens(case: Case, setting: str, steps: Array | None) -> list[str]:
    """Say which tokens were changed, left or given another id."""
    start = np.asarray(case.vectors.arrays[f"decode/{setting}/start"])
    known = start != 0
    result = case.arrays.get(f"decode/{setting}/tokens")
    sentences = []
    states = [] if steps is None else list(steps)
    states += [] if result is None else [np.asarray(result)]
    for state in states:
        if state.shape == start.shape and (state[known] != start[known]).any():
            count = int((state[known] != start[known]).sum())
            sentences.append(f"changes {count} of {int(known.sum())} tokens that were known")
            break
    if result is not None:
        left = int((np.asarray(result) == 0).sum())
        if left:
            sentences.append(f"has [MASK] at {left} positions of the result")
    if not sentences and re.search(r"tokens$", case.name):
        expected = np.asarray(case.vectors.arrays[case.name])
        yours = np.asarray(case.arrays[case.name])
        if yours.shape == expected.shape and expected.ndim == 3:
            differ = (yours != expected).any(axis=(1, 2))
            if differ.any():
                sentences.append(f"has other tokens from step {int(differ.argmax()) + 1} on")
    return sentences
