"""Gradient checks by two methods that know nothing of the chain rule.

Complex step (Squire and Trapp 1998, SIAM Review 40(1)): for a real-analytic f,

    f(x + ih) = f(x) + i h f′(x) - h²/2 f″(x) - …     so     f′(x) = Im f(x + ih) / h + O(h²)

Nothing is subtracted, so nothing cancels: with h = 1e-30 the result is exact to rounding.

Central differences: f′(x) = (f(x + h) - f(x - h)) / 2h + O(h²).  Here the subtraction loses
digits as h shrinks; h = ε^(1/3) max(1, |x|) balances both errors near 1e-10 (ε = 2⁻⁵²).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref import checks, trees
from marref.trees import Array, Tree
from marref.verify import measure

METHODS = ("complex-step", "central")

_COMPLEX_STEP = 1e-30
_CENTRAL_STEP: float = 2.0 ** (-52 / 3)


def check_gradients(
    function: Callable[[Tree], Any],
    point: Tree,
    gradients: Tree,
    *,
    method: str = "complex-step",
    max_entries: int | None = None,
    rng: np.random.Generator | None = None,
) -> dict[str, float]:
    """Compare gradients with numerical derivatives, entry by entry.

    Parameters
    ----------
    function : callable
        Takes a tree like ``point``, returns a scalar.  For ``"complex-step"`` it must accept
        complex128 leaves and be analytic: no ``abs``, no complex conjugate, comparisons on the
        real part only.
    point : tree of float64 arrays
        Where to differentiate.
    gradients : tree of float64 arrays
        The derivatives of ``function`` at ``point``, as computed by the code under test.
    method : {"complex-step", "central"}
    max_entries : int, optional
        Check that many entries of each leaf, drawn at random; all of them by default.
    rng : numpy.random.Generator, optional
        For ``max_entries``.

    Returns
    -------
    dict of str to float
        For every leaf, by dotted name, the largest |gradient - derivative| over the checked
        entries, relative to the largest entry of all of ``gradients``; infinite where one is not
        finite.  (Not of the leaf: a true gradient of 0, such as that of the key bias, has rounding
        for its largest entry.)

    Raises
    ------
    TypeError, ValueError
        The trees differ or are not float64, or the method is unknown.
    """
    checks.function("function", function)
    checks.choice("method", method, METHODS)
    leaves = trees.flatten(point)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    for argument, tree in (("point", point), ("gradients", gradients)):
        dtype = trees.check_like(argument, tree, shapes)
        if dtype != np.float64:
            raise TypeError(f"{argument}: dtype {dtype}, expected float64")
    if max_entries is not None:
        checks.integer("max_entries", max_entries, 1)
        checks.generator("rng", rng)

    claimed = trees.flatten(gradients)
    largest = measure.largest(*claimed.values())
    derivative = _complex_step if method == "complex-step" else _central
    errors = {}
    for name, leaf in leaves.items():
        entries = np.arange(leaf.size)
        if rng is not None and max_entries is not None and max_entries < leaf.size:
            entries = rng.choice(entries, max_entries, replace=False)
        found = np.array([derivative(function, leaves, name, int(entry)) for entry in entries])
        difference = measure.difference(claimed[name].ravel()[entries], found)
        errors[name] = measure.relative(difference, largest)
    return errors


def check_layer(
    forward: Callable[[Tree], tuple[Array, Any]],
    backward: Callable[[Tree, Array, Any], Tree],
    point: Tree,
    rng: np.random.Generator,
    *,
    method: str = "complex-step",
) -> dict[str, float]:
    """Check a layer's backward through the scalar Σ y ⊙ dy, for a random dy.

    Parameters
    ----------
    forward : callable
        The point (inputs and parameters) to ``(y, cache)``.
    backward : callable
        ``(point, dy, cache)`` to the gradients, a tree like ``point``.
    point : tree of float64 arrays
    rng : numpy.random.Generator
        Draws dy.
    method : {"complex-step", "central"}

    Returns
    -------
    dict of str to float
        See `check_gradients`.
    """
    y, cache = forward(point)
    dy = rng.normal(size=y.shape)
    return check_gradients(
        lambda moved: (forward(moved)[0] * dy).sum(),
        point,
        backward(point, dy, cache),
        method=method,
    )


def _complex_step(
    function: Callable[[Tree], Any], leaves: dict[str, Array], name: str, entry: int
) -> float:
    lifted = {key: leaf.astype(np.complex128) for key, leaf in leaves.items()}
    lifted[name].flat[entry] += 1j * _COMPLEX_STEP
    value = function(trees.unflatten(lifted))
    if not np.iscomplexobj(value):
        raise TypeError(
            f"function: returned {type(value).__name__} for complex numbers, expected a complex "
            "number: something drops the imaginary part (abs, .real, float); "
            'method="central" does without'
        )
    return float(np.imag(value)) / _COMPLEX_STEP


def _central(
    function: Callable[[Tree], Any], leaves: dict[str, Array], name: str, entry: int
) -> float:
    x = float(leaves[name].flat[entry])
    step = _CENTRAL_STEP * max(1.0, abs(x))
    values: list[float] = []
    for moved in (x + step, x - step):
        leaf = leaves[name].copy()
        leaf.flat[entry] = moved
        values.append(float(function(trees.unflatten({**leaves, name: leaf}))))
    above, below = values
    return (above - below) / (2 * step)
