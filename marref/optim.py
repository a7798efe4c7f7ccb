"""Adam, and what else an optimiser step needs; pure: state in, state out.

Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), with gradient g, step t = 1, 2, …:

    m ← β₁ m + (1 - β₁) g               v ← β₂ v + (1 - β₂) g²
    m̂ = m / (1 - β₁ᵗ)                   v̂ = v / (1 - β₂ᵗ)
    θ ← θ - η (m̂ / (√v̂ + ε) + λ θ)

The moments start at 0 and so are too small at first; m̂ and v̂ undo that.  λ > 0 is decoupled
weight decay (AdamW; Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2).  As in PyTorch,
the decay is multiplied by η; in the paper by the schedule's factor only.

This is the definition, written to be read; `marref.adam_step` computes the same sooner.  Page:
docs/adam.md.
"""

import functools
import math
import operator
from typing import Any

import numpy as np

from marref import checks, trees
from marref.trees import Array, Tree

# Those of Kingma and Ba 2015.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

_RANGES = {
    "learning_rate": "[0, inf)",
    "beta1": "[0, 1)",
    "beta2": "[0, 1)",
    "epsilon": "(0, inf)",
    "weight_decay": "[0, inf)",
}


def init(params: Tree) -> Tree:
    """Make the state before the first step: t = 0, m = 0, v = 0.

    Parameters
    ----------
    params : tree of arrays

    Returns
    -------
    dict
        ``step`` int64 array [], ``first_moment`` m and ``second_moment`` v, trees like ``params``.
    """
    _real_dtype("params", params, _shapes(params))
    return {
        "step": np.zeros((), np.int64),
        "first_moment": trees.map_leaves(np.zeros_like, params),
        "second_moment": trees.map_leaves(np.zeros_like, params),
    }


def step(
    params: Tree,
    grads: Tree,
    state: Tree,
    learning_rate: float,
    *,
    beta1: float = BETA1,
    beta2: float = BETA2,
    epsilon: float = EPSILON,
    weight_decay: float = 0.0,
) -> tuple[Tree, Tree]:
    """Take one step of Adam.

    Parameters
    ----------
    params, grads : trees of arrays
        Of one structure and one dtype.
    state : dict
        From `init` or the step before.
    learning_rate : float
        η >= 0.
    beta1, beta2, epsilon : float
        β₁, β₂ in [0, 1) and ε > 0; the defaults are the paper's.
    weight_decay : float
        λ >= 0; 0 is Adam, more is AdamW, on all parameters (as in PyTorch with one group).

    Returns
    -------
    params, state : dict
        New trees; the arguments are left as they were.

    Raises
    ------
    TypeError, ValueError
        The trees differ in structure, shape or dtype, or a number is outside its range.
    """
    settings: dict[str, Any] = check_settings(
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=weight_decay,
    )
    check_state(params, grads, state)
    t = int(state["step"]) + 1
    updated = trees.map_leaves(
        functools.partial(update, t=t, **settings),
        params,
        grads,
        state["first_moment"],
        state["second_moment"],
    )
    params, m, v = (trees.map_leaves(operator.itemgetter(part), updated) for part in range(3))
    return params, {"step": np.array(t, np.int64), "first_moment": m, "second_moment": v}


def update(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    *,
    t: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> tuple[Array, Array, Array]:
    """Take step t on one array, by the formulas at the head of this file.

    Returns
    -------
    param, m, v : arrays
    """
    m = beta1 * m + (1.0 - beta1) * grad
    v = beta2 * v + (1.0 - beta2) * (grad * grad)
    corrected_m = m / (1.0 - beta1**t)
    corrected_v = v / (1.0 - beta2**t)
    direction = corrected_m / (np.sqrt(corrected_v) + epsilon)
    param = param - learning_rate * (direction + weight_decay * param)
    return np.asarray(param), np.asarray(m), np.asarray(v)


def clip_by_global_norm(grads: Tree, max_norm: float) -> tuple[Tree, float]:
    """Shrink gradients whose joint norm exceeds a bound (Pascanu et al. 2013, arXiv 1211.5063).

    All gradients are multiplied by min(1, max_norm / (‖g‖ + 1e-6)), ‖g‖ being the root of the sum
    of the squares of *all* their entries: the direction stays.  The 1e-6 is PyTorch's.

    Parameters
    ----------
    grads : tree of arrays
    max_norm : float
        Positive.

    Returns
    -------
    clipped : dict
        A tree like ``grads``.
    norm : float
        ‖g‖ before clipping.

    Raises
    ------
    TypeError, ValueError
        ``max_norm`` is not positive, or ``grads`` are no tree of real arrays of one dtype.
    FloatingPointError
        The norm is not finite.
    """
    max_norm = checks.real("max_norm", max_norm, "(0, inf)")
    _real_dtype("grads", grads, _shapes(grads))
    norm = math.sqrt(sum(map(sum_of_squares, trees.flatten(grads).values())))
    factor = clip_factor(norm, max_norm)
    return trees.map_leaves(lambda leaf: leaf * factor, grads), norm


def sum_of_squares(leaf: Array) -> float:
    """Add up the squares of an array in float64: that of 1e20 overflows float32."""
    return float(np.square(leaf, dtype=np.float64).sum())


def clip_factor(norm: float, max_norm: float) -> float:
    """Compute min(1, max_norm / (‖g‖ + 1e-6)); raise FloatingPointError unless ‖g‖ is finite."""
    if not math.isfinite(norm):
        raise FloatingPointError(f"grads: their norm is {norm}")
    return min(1.0, max_norm / (norm + 1e-6))


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate that rises linearly and then falls along a cosine.

    With w = warmup_steps, n = total_steps (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5,
    to 0, after a linear warm-up):

        step < w:    peak (step + 1) / (w + 1)
        step >= w:   peak (1 + cos(π (step - w) / (n - w))) / 2

    The first step already moves, step w has the peak, and at step = total_steps the rate is 0.

    Parameters
    ----------
    step : int
        The number of steps taken before this one, in [0, total_steps].
    peak : float
        The largest learning rate.
    warmup_steps : int
        In [0, total_steps).
    total_steps : int

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        A number is outside its range.
    """
    total_steps = checks.integer("total_steps", total_steps, 1)
    warmup_steps = checks.integer("warmup_steps", warmup_steps, 0, total_steps - 1)
    step = checks.integer("step", step, 0, total_steps)
    peak = checks.real("peak", peak, "[0, inf)")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def check_settings(**settings: float) -> dict[str, float]:
    """Return the numbers of `step` as floats; raise unless they are in their ranges."""
    return {name: checks.real(name, value, _RANGES[name]) for name, value in settings.items()}


def check_state(params: Tree, grads: Tree, state: Tree) -> None:
    """Raise unless gradients and moments are trees like the parameters, of the same dtype."""
    shapes = _shapes(params)
    dtype = _real_dtype("params", params, shapes)
    if not isinstance(state, dict) or set(state) != {"step", "first_moment", "second_moment"}:
        raise ValueError("state: expected the result of init or of the step before")
    checks.integer("state.step", np.asarray(state["step"])[()], 0)
    for name, tree in (
        ("grads", grads),
        ("state.first_moment", state["first_moment"]),
        ("state.second_moment", state["second_moment"]),
    ):
        found = trees.check_like(name, tree, shapes)
        if found != dtype:
            raise TypeError(f"{name}: dtype {found}, expected {dtype} as in params")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in trees.flatten(tree).items()}


def _real_dtype(argument: str, tree: Tree, shapes: dict[str, tuple[int, ...]]) -> np.dtype[Any]:
    dtype = trees.check_like(argument, tree, shapes)
    if dtype.kind == "c":
        raise TypeError(f"{argument}: dtype {dtype}, expected float32 or float64")
    return dtype
