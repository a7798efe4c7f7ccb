"""Exercise on GELU."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr

from marref.layers import gelu
from marref.teach.exercise import Exercise, Part, Point, Rng, after_forward
from marref.trees import Array


def _gelu_points(rng: Rng) -> Sequence[Point]:
    return [{"x": rng.normal(0.0, 1.5, shape), "gelu": kind} for shape, kind in _GELU]


_GELU = (((7,), "erf"), ((2, 5), "tanh"))


def _gelu_with(values: Any) -> Any:
    def forward(x: Array, gelu: str) -> Any:
        value, derivative = values(x, gelu)
        return x * value, {"slope": value + x * derivative}

    return forward


def _gate_without_root_two(x: Array, kind: str) -> Any:
    if kind != "erf":
        return gelu.gate(x, kind)
    return ndtr(x * math.sqrt(2)), math.sqrt(2) * gelu.gate(x * math.sqrt(2), kind)[1]


def _density_unnormalised(x: Array, kind: str) -> Any:
    value, derivative = gelu.gate(x, kind)
    return value, derivative * math.sqrt(2 * math.pi) if kind == "erf" else derivative


def _tanh_without_inner(x: Array, kind: str) -> Any:
    value, derivative = gelu.gate(x, kind)
    if kind == "erf":
        return value, derivative
    return value, derivative / (math.sqrt(2 / math.pi) * (1.0 + 3 * 0.044715 * x * x))


_ROOT = math.sqrt(2 / math.pi)


def _tanh_with(root: float = _ROOT, cubic: float = _ROOT * 0.044715, power: float = 3.0) -> Any:
    """Compute with u = root x + cubic x³, and power x² for the derivative of x³."""

    def values(x: Array, kind: str) -> Any:
        if kind == "erf":
            return gelu.gate(x, kind)
        tanh = np.tanh(root * x + cubic * x**3)
        return (1 + tanh) / 2, (1 - tanh**2) / 2 * (root + power * cubic * x**2)

    return values


def _tanh_unhalved(x: Array, kind: str) -> Any:
    value, derivative = gelu.gate(x, kind)
    return (value, derivative) if kind == "erf" else (2 * value, 2 * derivative)


def _density_without_half(x: Array, kind: str) -> Any:
    value, derivative = gelu.gate(x, kind)
    return value, derivative * np.exp(-0.5 * x * x) if kind == "erf" else derivative


def _square_of_difference(x: Array, kind: str) -> Any:
    value, derivative = gelu.gate(x, kind)
    if kind == "erf":
        return value, derivative
    tanh = 2 * value - 1
    return value, derivative * (1 - tanh) / (1 + tanh)


def _slope_without_x(x: Array, gelu: str) -> Any:
    y, _ = _reference_gelu(x, gelu)
    value, derivative = _reference_gate(x, gelu)
    return y, {"slope": value + derivative}


_reference_gelu, _reference_gate = gelu.forward, gelu.gate


GELU = Exercise(
    "gelu",
    "GELU, exact and approximate, and its slope",
    "gelu.md",
    (
        Part(
            "forward",
            gelu.forward,
            ("y", "cache"),
            _gelu_points,
            {"y": "y = x gate(x)", "cache.slope": "y′ = gate + x gate′, the product rule"},
            {
                "erf(x) stands where erf(x/√2) belongs": _gelu_with(_gate_without_root_two),
                "the normal density lacks its 1/√(2π)": _gelu_with(_density_unnormalised),
                "the derivative of the tanh gate lacks the inner derivative u′": _gelu_with(
                    _tanh_without_inner
                ),
                "√(2π) stands where √(2/π) belongs": _gelu_with(
                    _tanh_with(math.sqrt(2 * math.pi), math.sqrt(2 * math.pi) * 0.044715)
                ),
                "the term with x³ is missing: u = √(2/π) x": _gelu_with(_tanh_with(cubic=0.0)),
                "√(2/π) multiplies x alone: u = √(2/π) (x + 0.044715 x³)": _gelu_with(
                    _tanh_with(cubic=0.044715)
                ),
                "the 3 of the cube's derivative is missing: u′ = √(2/π) (1 + 3·0.044715 x²)": (
                    _gelu_with(_tanh_with(power=1.0))
                ),
                "the ½ is missing: the gate is (1 + tanh u)/2, between 0 and 1": _gelu_with(
                    _tanh_unhalved
                ),
                "(1 - tanh u)² stands where 1 - tanh² u belongs": _gelu_with(_square_of_difference),
                "the normal density lacks the ½ in its exponent, exp(-x²/2)": _gelu_with(
                    _density_without_half
                ),
                "the slope lacks the factor x before gate′": _slope_without_x,
            },
        ),
        Part(
            "backward",
            gelu.backward,
            ("dx",),
            after_forward(gelu.forward, _gelu_points),
            {"dx": "dx = dy ⊙ y′, entry by entry"},
            {
                "dy is not used: dx is the slope alone": lambda dy, cache: cache["slope"],
                "dy is passed on as it is: the slope is not used": lambda dy, cache: dy,
            },
        ),
    ),
    (
        "y = x gate(x) is a product of two functions of x.",
        "For the exact kind gate is the normal distribution function, scipy.special.ndtr, and "
        "gate′ the normal density exp(-x²/2)/√(2π).",
        "For tanh: gate = (1 + tanh u)/2 with u = √(2/π) (x + 0.044715 x³), so "
        "gate′ = ½ (1 - tanh² u) √(2/π) (1 + 3·0.044715 x²).",
    ),
)
