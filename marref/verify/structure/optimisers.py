"""What an optimiser did: what its steps are to the golden ones, in all parameters at once."""

import math
from collections.abc import Iterator

import numpy as np

import marref
from marref import trees
from marref.trees import Array
from marref.verify import golden, measure
from marref.verify.structure.evidence import Case, Finding, named

SECTIONS = tuple(golden.OPTIMISERS)

_TRIED = 64
"""At least so many ways to take the steps are tried."""


def steps(case: Case) -> Finding | None:
    """Say what the steps from the golden parameters are."""
    section, count, _ = case.name.split("/", 2)
    names = [name for name in case.arrays if name.startswith(f"{section}/{count}/")]
    return (
        _key_biases_alone(case)
        or _unchanged(case, names)
        or _another_section(case, section, count, names)
        or _settings(case, section, int(count), names)
        or _factor(case, names)
    )


def _key_biases_alone(case: Case) -> Finding | None:
    wrong = [row for row in case.comparison.differing if row.name.split("/")[0] in SECTIONS]
    if not all(row.name.endswith("attention.key.bias") for row in wrong):
        return None
    return Finding(
        "differs because the key biases were stepped; no other parameter differs. Their gradient "
        "is exactly 0, and Adam makes whole steps of its rounding. The golden steps set it to 0 "
        "first; to step them is no mistake"
    )


def _start(case: Case, name: str) -> Array:
    return np.asarray(case.vectors.arrays["params/" + name.split("/", 2)[2]], np.float64)


def _unchanged(case: Case, names: list[str]) -> Finding | None:
    if case.all_are({name: _start(case, name) for name in names}):
        return Finding(f"is the parameter before the step, as are all {len(names)}: nothing moved")
    return None


def _another_section(case: Case, section: str, count: str, names: list[str]) -> Finding | None:
    for other in golden.OPTIMISERS:
        for step in map(str, golden.OPTIMISER_STEPS):
            if (other, step) == (section, count):
                continue
            expected = {
                name: np.asarray(
                    case.vectors.arrays[f"{other}/{step}/" + name.split("/", 2)[2]], np.float64
                )
                for name in names
                if f"{other}/{step}/" + name.split("/", 2)[2] in case.vectors.arrays
            }
            if len(expected) == len(names) and case.all_are(expected, tried=_TRIED):
                return Finding(
                    f"is golden {other}/{step}, as are all {len(names)} arrays of the step"
                )
    return None


def _factor(case: Case, names: list[str]) -> Finding | None:
    """All steps are one number times the golden ones."""
    start = _start(case, case.name)
    step = case.golden - start
    weight = float((step * step).sum())
    if weight == 0.0:
        return None
    value = float((step * (case.yours - start)).sum()) / weight
    expected = {}
    for name in names:
        start = _start(case, name)
        expected[name] = start + value * (np.asarray(case.vectors.arrays[name]) - start)
    if not case.all_are(expected, fitted=1):
        return None
    text = named(case, value, case.budget / measure.largest(step))
    return Finding(f"took a step of the golden one times {text}, as all {len(names)} did")


def _settings(case: Case, section: str, count: int, names: list[str]) -> Finding | None:
    """Take the steps again with other settings, and look which come to yours."""
    options = dict(golden.OPTIMISERS[section])
    max_norm = options.pop("max_norm", None)
    if case.vectors.model.embed_dim > 64 and count > 2:
        return None
    found = []
    start = _gradients(case, trees.flatten(case.vectors.params))
    for words, changed, decayed, clip in _variants(options, max_norm):
        arrays = _run(case, count, changed, decayed, clip, start)
        expected = {name: arrays[name.split("/", 2)[2]] for name in names}
        if case.all_are(expected, tried=_TRIED):
            found.append(words)
    if not found:
        return None
    return Finding(f"is what the optimiser comes to {', or '.join(found[:3])}")


def _variants(
    options: dict[str, float], max_norm: float | None
) -> Iterator[tuple[str, dict[str, float], str, str]]:
    """List settings: words, options, which parameters decay, how gradients are clipped."""
    clip = "global" if max_norm is not None else "none"
    for key, values in {
        "beta1": (0.0, 0.5, 0.8, 0.85, 0.95, 0.99, 0.999),
        "beta2": (0.9, 0.95, 0.98, 0.99, 0.9999),
        "epsilon": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 1e-10, 1e-12, 1e-15),
    }.items():
        for value in values:
            yield f"with {key} {value:g}", {**options, key: value}, "all", clip
    swapped = {"beta1": options["beta2"], "beta2": options["beta1"]}
    yield "with beta1 and beta2 in each other's place", {**options, **swapped}, "all", clip
    if options["weight_decay"]:
        yield "with weight decay in the gradient (L2, not decoupled)", options, "gradient", clip
        yield "with weight decay of kernels and the table only", options, "kernels", clip
        yield "with weight decay of linear kernels only", options, "linear", clip
        yield "with no weight decay of biases, but of norm scales", options, "no-bias", clip
        yield "with weight decay not times the learning rate", options, "unscaled", clip
        for factor in (2.0, 0.5, 0.1, -1.0):
            decay = {**options, "weight_decay": factor * options["weight_decay"]}
            yield f"with weight decay {decay['weight_decay']:g}", decay, "all", clip
    yield "without the correction of the moments", options, "uncorrected", clip
    yield "without the correction of the first moment", options, "first uncorrected", clip
    yield "without the correction of the second moment", options, "second uncorrected", clip
    yield "with epsilon inside the root", options, "inside", clip
    yield "with epsilon added before the correction", options, "before", clip
    yield "with its steps counted from 2", options, "ahead", clip
    yield "without the root of the second moment", options, "unrooted", clip
    yield "with gradients added up over the steps (not set to 0)", options, "accumulate", clip
    if max_norm is not None:
        yield "without clipping", options, "all", "none"
        yield "with every array clipped by itself", options, "all", "array"
        yield "with every entry clipped", options, "all", "entry"
        yield "with gradients clipped without the 1e-6", options, "all", "exact"
    else:
        yield "with gradients clipped to a norm of 1", options, "all", "one"


def _run(
    case: Case,
    count: int,
    options: dict[str, float],
    how: str,
    clip: str,
    start: dict[str, Array],
) -> dict[str, Array]:
    """Take steps of Adam from the golden parameters, in a way that is said by a word."""
    params = trees.flatten(case.vectors.params)
    m, v, added = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in range(3))
    for t in range(1, count + 1):
        grads = start if t == 1 else _gradients(case, params)
        if how == "accumulate":
            added = {name: added[name] + grads[name] for name in grads}
            grads = added
        grads = _clipped(grads, clip)
        for name, param in params.items():
            decay = options["weight_decay"] if _decays(name, how) else 0.0
            grad = grads[name] + (decay * param if how == "gradient" else 0.0)
            m[name] = options["beta1"] * m[name] + (1.0 - options["beta1"]) * grad
            v[name] = options["beta2"] * v[name] + (1.0 - options["beta2"]) * grad * grad
            direction = _direction(m[name], v[name], t, options, how)
            rate = options["learning_rate"]
            decayed = (1.0 if how == "unscaled" else rate) * decay * param
            step = rate * direction + (0.0 if how == "gradient" else decayed)
            params[name] = param - step
    return params


def _direction(m: Array, v: Array, t: int, options: dict[str, float], how: str) -> Array:
    """Divide the moments: corrected, unless said otherwise."""
    t += how == "ahead"
    if how == "before":
        correction = math.sqrt(1.0 - options["beta2"] ** t) / (1.0 - options["beta1"] ** t)
        return np.asarray(correction * m / (np.sqrt(v) + options["epsilon"]))
    if how not in ("uncorrected", "first uncorrected"):
        m = m / (1.0 - options["beta1"] ** t)
    if how not in ("uncorrected", "second uncorrected"):
        v = v / (1.0 - options["beta2"] ** t)
    if how == "inside":
        return np.asarray(m / np.sqrt(v + options["epsilon"]))
    if how == "unrooted":
        return np.asarray(m / (v + options["epsilon"]))
    return np.asarray(m / (np.sqrt(v) + options["epsilon"]))


def _decays(name: str, decayed: str) -> bool:
    if decayed == "kernels":
        return name.endswith(("kernel", "table"))
    if decayed == "linear":
        return name.endswith("kernel")
    if decayed == "no-bias":
        return not name.endswith("bias")
    return True


def _clipped(grads: dict[str, Array], clip: str) -> dict[str, Array]:
    bound = 1.0 if clip == "one" else golden.OPTIMISERS["clipped"]["max_norm"]
    if clip in ("global", "one", "exact"):
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
        factor = min(1.0, bound / (norm if clip == "exact" else norm + 1e-6))
        return {name: grad * factor for name, grad in grads.items()}
    if clip == "array":
        return {
            name: grad * min(1.0, bound / (float(np.linalg.norm(grad)) + 1e-6))
            for name, grad in grads.items()
        }
    if clip == "entry":
        return {name: np.clip(grad, -bound, bound) for name, grad in grads.items()}
    return grads


def _gradients(case: Case, params: dict[str, Array]) -> dict[str, Array]:
    """Compute the gradients as golden vectors do: those of the key biases are 0."""
    batch = case.vectors.batch
    tokens, targets, mask = (batch[name] for name in ("tokens", "targets", "mask"))
    model, tree, labels = case.vectors.model, trees.unflatten(params), batch.get("labels")
    grads = trees.flatten(
        marref.loss_and_grads(model, tree, tokens, targets, mask, labels=labels)[1]
    )
    return {
        name: np.zeros_like(grad) if name.endswith("attention.key.bias") else grad
        for name, grad in grads.items()
    }
