"""What a decoder did: how many it revealed, when, where, and what it left or changed."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from marref import schedules
from marref.schedules import Schedule
from marref.trees import Array
from marref.verify import golden, measure
from marref.verify.structure.evidence import Case, Finding


def decoder(case: Case) -> list[Finding]:
    """Say what can be seen in the steps of one decoding setting."""
    setting = "/".join(case.name.split("/")[:2])
    steps = {
        key: np.asarray(case.arrays[name])
        for key in ("tokens", "mask", "confidence")
        if (name := f"{setting}/steps/{key}") in case.arrays
    }
    found = [
        *_changed(case, setting, steps.get("tokens"), steps.get("mask")),
        *_counts(case, setting, steps.get("mask")),
        *_order(case, setting, steps.get("mask")),
        *_confidences(case, setting, steps.get("confidence")),
    ]
    found = found or _other_tokens(case)
    return [Finding(clause) for clause in found]


def step(case: Case) -> Finding | None:
    """Say in which step of a sampler something differs first, and what."""
    of_sampler = "/".join(case.name.split("/")[:2]) + "/steps/"
    first: dict[tuple[int, int], str] = {}
    for place, row in enumerate(case.comparison.differing):
        if row.name.startswith(of_sampler):
            pairs = zip(case.arrays[row.name], case.vectors.arrays[row.name], strict=True)
            off = [measure.difference(yours, right) > row.budget for yours, right in pairs]
            first[off.index(True), place] = row.name.removeprefix(of_sampler)
    if not first:
        return None
    (index, _), what = min(first.items())
    return Finding(f"differs first in step {index + 1}, in {what}")


def counts(case: Case) -> Finding | None:
    """Say what a schedule's counts are."""
    _, name, masked, num_steps = case.name.split("/")
    yours = case.yours.astype(np.int64)
    shown, total = _list(yours.tolist()), int(yours.sum())
    given = {
        (int(other.split("/")[2]), int(other.split("/")[3])): np.asarray(array)
        for other, array in case.arrays.items()
        if other.startswith(f"schedule/{name}/")
    }
    for words, schedule in _SCHEDULES.items():
        if all(np.array_equal(schedule(*sizes), array) for sizes, array in given.items()):
            return Finding(f"has {words}, as have all {len(given)} of its kind given: {shown}")
    expected = _list(case.golden.astype(np.int64).tolist())
    if total != int(masked):
        return Finding(f"reveals {shown}: {total} in all, of {masked} masked positions")
    if (yours < 1).any():
        return Finding(f"reveals nothing in step {int((yours < 1).argmax()) + 1}: {shown}")
    return Finding(f"reveals {shown} in {num_steps} steps, where {expected} is expected")


def _after(bound: Callable[[int, int, Array], Array], *, least: bool = True) -> Schedule:
    """Make a schedule of what is masked after steps 1 to K - 1, all but the last."""

    def schedule(masked: int, num_steps: int) -> Array:
        num_steps = min(num_steps, masked)
        step = np.arange(1, num_steps)
        left = bound(masked, num_steps, step).astype(np.int64)
        if least:
            falling = np.minimum.accumulate(np.maximum(left, num_steps - step) + step)
            left = np.minimum(falling, masked) - step
        return np.asarray(-np.diff(left, prepend=masked, append=0))

    return schedule


def _cosines(num_steps: int, step: Array) -> Array:
    # To 12 digits, so that the floor of a half is no matter of rounding.
    return np.round(np.cos(np.pi * step / (2 * num_steps)), 12)


_SCHEDULES: dict[str, Schedule] = {
    **{f"the counts of the {name} schedule": one for name, one in schedules.SCHEDULES.items()},
    "the counts of the cosine schedule in reverse": lambda n, k: schedules.cosine(n, k)[::-1],
    "the counts of a cosine rounded to the nearest": _after(
        lambda n, k, i: np.rint(n * np.cos(np.pi * i / (2 * k)))
    ),
    "the counts of a cosine rounded up": _after(lambda n, k, i: np.ceil(n * _cosines(k, i))),
    "the counts of a cosine without a minimum of one": _after(
        lambda n, k, i: np.floor(n * _cosines(k, i)), least=False
    ),
    "the counts of the square of a cosine": _after(
        lambda n, k, i: np.floor(n * _cosines(k, i) ** 2)
    ),
    "the counts of the root of a cosine": _after(
        lambda n, k, i: np.floor(n * _cosines(k, i) ** 0.5)
    ),
    "the counts of 1 less a sine": _after(
        lambda n, k, i: np.floor(n * np.round(1 - np.sin(np.pi * i / (2 * k)), 12))
    ),
    "the counts of a square": _after(lambda n, k, i: np.floor(n * (1 - (i / k) ** 2))),
    "the counts of a cosine in float32": _after(
        lambda n, k, i: np.floor(np.float32(n) * np.cos(np.float32(np.pi / 2) * np.float32(i / k)))
    ),
    "the counts of a cosine that ends a step early": _after(
        lambda n, k, i: np.maximum(1, np.floor(n * np.cos(np.pi / 2 * i / max(k - 1, 1)))),
        least=False,
    ),
    "the counts of equal numbers, masked ones rounded down": _after(
        lambda n, k, i: (k - i) * n // k
    ),
    "the counts of equal numbers, masked ones rounded up": _after(
        lambda n, k, i: -(-(k - i) * n // k)
    ),
    "the counts of equal numbers, the remainder first": _after(
        lambda n, k, i: n - n // k * i - np.minimum(n % k, i)
    ),
    "the counts of equal numbers, the remainder last": _after(lambda n, k, i: n - n // k * i),
}


def _counts(case: Case, setting: str, mask: Array | None) -> list[str]:
    """Compare the number revealed in each step."""
    if mask is None:
        return []
    sentences = []
    for yours, right, masked in _all_revealed(case, setting):
        if yours != right:
            known = _known(case, setting)
            like = f": {' or '.join(known)}" if known else ""
            if len(yours) > 1 and yours[0] == masked:
                like = ": all in the first step"
            shown = f"reveals {_list(yours)} tokens in its steps, where {_list(right)} is expected"
            sentences.append(f"{shown}{like}")
            break
    if mask[-1].any():
        sentences.append(f"still masks {int(mask[-1].sum())} positions after the last step")
    return sentences


def _known(case: Case, setting: str) -> list[str]:
    """Name the schedules that have the counts of all settings given that ask for the same one."""
    section, _, name = setting.partition("/")
    settings = golden.decoder_sections(case.vectors.model)[section]
    kind = settings[name].get("schedule", "cosine")
    alike = [
        (options["num_steps"], revealed)
        for other, options in settings.items()
        if options.get("schedule", "cosine") == kind
        and f"{section}/{other}/steps/mask" in case.arrays
        for revealed in _all_revealed(case, f"{section}/{other}")
    ]
    return [
        words
        for words, schedule in _SCHEDULES.items()
        if all(
            schedule(masked, num_steps).tolist() == yours for num_steps, (yours, _, masked) in alike
        )
    ][:2]


def _all_revealed(case: Case, setting: str) -> Iterator[tuple[list[int], list[int], int]]:
    """For each sequence, the numbers revealed in its steps, the golden ones, and their sum."""
    name = f"{setting}/steps/mask"
    yours, right = (np.asarray(x[name]).astype(bool) for x in (case.arrays, case.vectors.arrays))
    started = np.asarray(case.vectors.arrays[f"{setting}/start"]) == 0
    for row, masked in enumerate(started):
        counts = [_revealed(mask[:, row], masked) for mask in (yours, right)]
        # Sequences with fewer masked positions have no steps at the end.
        cut = [
            numbers[: max(1, int(np.count_nonzero(np.cumsum(numbers[::-1]))))] for numbers in counts
        ]
        yield cut[0], cut[1], int(masked.sum())


def _revealed(masks: Array, started: Array) -> list[int]:
    left = [int(started.sum()), *(int(mask.sum()) for mask in masks)]
    return [before - after for before, after in itertools.pairwise(left)]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")


def _order(case: Case, setting: str, mask: Array | None) -> list[str]:
    """Say by what order positions were revealed, where the counts are right."""
    expected = np.asarray(case.vectors.arrays[f"{setting}/steps/mask"]).astype(bool)
    if mask is None or mask.shape != expected.shape or np.array_equal(mask, expected):
        return []
    mask = mask.astype(bool)
    if not np.array_equal(mask.sum(axis=2), expected.sum(axis=2)) or len(mask) < 2:
        return []
    started = np.asarray(case.vectors.arrays[f"{setting}/start"]) == 0
    confidence = case.arrays.get(f"{setting}/steps/confidence")
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
    expected = np.asarray(case.vectors.arrays[f"{setting}/steps/confidence"])
    name = f"{setting}/steps/confidence"
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
        "decode/cosine-3": "temperature 1",
        "decode/cold": "temperature 0.5",
        "decode/hot": "temperature 2",
        "decode/plain": "[MASK] in the softmax",
    }
    if setting.startswith("guidance/"):
        words = {
            "guidance/class": "guidance_scale 1",
            "guidance/constant": "constant guidance",
            "decode/cosine-3": "no class",
        }
    for other, what in words.items():
        array = case.vectors.arrays.get(f"{other}/steps/confidence")
        if other == setting or array is None or array[0].shape != first.shape:
            continue
        if np.abs(first - np.asarray(array[0], np.float64)).max() <= 2 * budget:
            return f": those with {what}"
    return ""


def _changed(case: Case, setting: str, steps: Array | None, masks: Array | None) -> list[str]:
    """Say which tokens were changed that stood, or left out."""
    start = np.asarray(case.vectors.arrays[f"{setting}/start"])
    known = start != 0
    result = case.arrays.get(f"{setting}/tokens")
    states = ([] if steps is None else list(steps)) + ([] if result is None else [result])
    sentences = []
    counts = [int((np.asarray(state)[known] != start[known]).sum()) for state in states]
    if any(counts):
        sentences.append(f"changes {max(counts)} of {int(known.sum())} tokens that were known")
    if steps is not None and masks is not None and len(states) > 1:
        for index, (before, after) in enumerate(itertools.pairwise(states)):
            out = ~np.asarray(masks[min(index, len(masks) - 1)]).astype(bool) & ~known
            if (np.asarray(before)[out] != np.asarray(after)[out]).any():
                sentences.append(f"changes tokens after step {index + 1} that had been revealed")
                break
    left = 0 if result is None else int((np.asarray(result) == 0).sum())
    if left:
        sentences.append(f"has [MASK] at {left} positions of the result")
    return sentences


def _other_tokens(case: Case) -> list[str]:
    expected, yours = np.asarray(case.vectors.arrays[case.name]), np.asarray(case.arrays[case.name])
    if not case.name.endswith("steps/tokens"):
        return []
    differ = (yours != expected).any(axis=(1, 2))
    return [f"has other tokens from step {int(differ.argmax()) + 1} on"]
