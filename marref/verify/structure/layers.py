"""What a layer's output is: what the layer would make of another kernel, input, epsilon, ….

Every candidate is computed from golden arrays, with one thing changed; its clause says which.
"""

import re
from collections.abc import Callable

from marref.verify.structure import attending, classes, embeddings, functions, linear, norms, sums
from marref.verify.structure.evidence import Candidates, Case, Finding

_CANDIDATES: dict[str, Callable[[Case, str, str], Candidates]] = {
    r"embedding": embeddings.candidates,
    r"class_embedding": classes.candidates,
    r"logits|attention\.(query|key|value|output)|feed_forward\.(up|down)": linear.candidates,
    r"(attention|feed_forward|final)_norm": norms.candidates,
    r"attention\.weights": attending.weights,
    r"attention\.context": attending.context,
    r"feed_forward\.activation": functions.candidates,
    r"output": sums.candidates,
}

_FITTED: dict[str, Callable[[Case, str, str], Finding | None]] = {
    r"embedding": embeddings.fitted,
    r"(attention|feed_forward|final)_norm": norms.epsilon,
    r"attention\.weights": attending.temperature,
    r"feed_forward\.activation": functions.alone,
    r"output": sums.fitted,
}
"""What has numbers in it that are solved for."""


def of_layer(case: Case) -> Finding | None:
    """Say what the layer that computed an activation did."""
    name = case.name.removeprefix("activations/")
    block, part = _split(name)
    found = case.fitting(candidates(case, name))
    if found is not None:
        return found
    for pattern, hint in _FITTED.items():
        if re.fullmatch(pattern, part):
            return hint(case, block, part)
    return None


def candidates(case: Case, name: str) -> Candidates:
    """List what an activation might be, by its name: what its layer makes, with one mistake."""
    block, part = _split(name)
    for pattern, listed in _CANDIDATES.items():
        if re.fullmatch(pattern, part):
            yield from listed(case, block, part)


def _split(name: str) -> tuple[str, str]:
    """Split a name into that of the block, if it has one, and of the part."""
    matched = re.fullmatch(r"(blocks\.\d+)\.(.*)", name)
    return (matched[1], matched[2]) if matched else ("", name)
