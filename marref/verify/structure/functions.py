"""Which function of its input the output of an activation is."""

import math

import numpy as np
from scipy.special import erf, expit

from marref.verify.structure.evidence import Candidates, Case, Finding


def candidates(case: Case, block: str, _: str) -> Candidates:
    """List the activations in use."""
    x = case.activations[f"{block}.feed_forward.up"]
    gelu = 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))
    tanh = 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    softplus = np.logaddexp(0.0, x)
    yield "is GELU by tanh of feed_forward.up", tanh
    yield "is the exact GELU of feed_forward.up", gelu
    yield "is ReLU of feed_forward.up", np.maximum(x, 0.0)
    yield "is SiLU of feed_forward.up", x * expit(x)
    yield "is x sigmoid(1.702 x) of feed_forward.up, the quick GELU", x * expit(1.702 * x)
    yield "is feed_forward.up itself: the activation is missing", x
    yield "is tanh of feed_forward.up", np.tanh(x)
    yield "is the sigmoid of feed_forward.up", expit(x)
    yield "is softplus of feed_forward.up", softplus
    yield "is mish of feed_forward.up", x * np.tanh(softplus)
    yield "is ReLU squared of feed_forward.up", np.maximum(x, 0.0) ** 2
    yield "is ReLU6 of feed_forward.up", np.clip(x, 0.0, 6.0)
    for slope in (0.01, 0.1, 0.2):
        yield f"is leaky ReLU with slope {slope} of feed_forward.up", np.where(x > 0, x, slope * x)
    yield "is ELU of feed_forward.up", np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))
    selu = 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))
    yield "is SELU of feed_forward.up", selu
    yield "is the hard swish of feed_forward.up", x * np.clip(x + 3.0, 0.0, 6.0) / 6.0
    yield "is the absolute value of feed_forward.up", np.abs(x)
    yield "is GELU applied twice", 0.5 * gelu * (1.0 + erf(gelu / math.sqrt(2.0)))
    without_root = 0.5 * x * (1.0 + erf(x))
    yield "is x (1 + erf(x)) / 2 of feed_forward.up, without the root of 2", without_root
    yield "is x (1 + erf(x / sqrt(2))) of feed_forward.up, without the 1/2", 2.0 * gelu
    yield "is the gate of GELU, not multiplied by x", 0.5 * (1.0 + erf(x / math.sqrt(2.0)))
    yield (
        "is x (1 + tanh(sqrt(2/pi) x)) / 2 of feed_forward.up, without the cubic term",
        (0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * x))),
    )


def alone(case: Case, block: str, _: str) -> Finding | None:
    """Say that yours is a function of its input: neighbouring inputs, neighbouring outputs."""
    x = case.activations[f"{block}.feed_forward.up"]
    order = np.argsort(x, axis=None)
    inputs, wrong = x.ravel()[order], (case.yours - case.golden).ravel()[order]
    steps, changes = np.diff(inputs), np.abs(np.diff(wrong))
    close = steps < 0.01 * (inputs[-1] - inputs[0])
    if close.sum() < 30 or (changes[close] > 3.0 * steps[close] + 2.0 * case.budget).any():
        return None
    # Were the difference no function of the input, neighbours would differ as much as any two.
    if np.median(changes[close]) > 0.05 * wrong.std():
        return None
    return Finding("is a function of feed_forward.up alone, entry by entry, but none that is known")
