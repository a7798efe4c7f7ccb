"""Adam, and what else an optimiser step needs; pure: state in, state out.

Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), with gradient g, step t = 1, 2, …:

    m ← β₁ m + (1 - β₁) g               v ← β₂ v + (1 - β₂) g²
    m̂ = m / (1 - β₁ᵗ)                   v̂ = v / (1 - β₂ᵗ)
    θ ← θ - η (m̂ / (√v̂ + ε) + λ θ)

The moments start at 0 and so are too small at first; m̂ and v̂ undo that.  λ > 0 is decoupled
weight decay (AdamW; Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2).  As in PyTorch,
the decay is multiplied by η; in the paper by the schedule's factor only.
"""

import math
from typing import Any

import numpy as np

from marref import checks, parallel, trees
from marref.trees import Array, Tree


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
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    in_place: bool = False,
    num_threads: int = 1,
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
    in_place : bool
        True writes to the arrays of ``params`` and ``state``, which saves the memory of a second
        set of them.
    num_threads : int
        How many threads share the work; the result does not depend on it.

    Returns
    -------
    params, state : dict
        New trees, and the arguments are left as they were; with ``in_place``, the same arrays.

    Raises
    ------
    TypeError, ValueError
        The trees differ in structure, shape or dtype, a number is outside its range, or an array
        that ``in_place`` would write to is read-only.
    """
    learning_rate = checks.real("learning_rate", learning_rate, "[0, inf)")
    beta1 = checks.real("beta1", beta1, "[0, 1)")
    beta2 = checks.real("beta2", beta2, "[0, 1)")
    epsilon = checks.real("epsilon", epsilon, "(0, inf)")
    weight_decay = checks.real("weight_decay", weight_decay, "[0, inf)")
    num_threads = checks.integer("num_threads", num_threads, 1)
    _check_state(params, grads, state)
    if in_place:
        _check_writeable("params", params)
        _check_writeable("state", state)

    count = int(state["step"]) + 1
    correction1 = 1.0 - beta1**count
    correction2 = 1.0 - beta2**count

    if not in_place:
        params, state = trees.map_leaves(np.copy, params), trees.map_leaves(np.copy, state)

    def update(param: Array, grad: Array, m: Array, v: Array) -> None:
        m *= beta1
        m += (1.0 - beta1) * grad
        v *= beta2
        v += (1.0 - beta2) * (grad * grad)
        change = np.sqrt(v)
        change += epsilon * math.sqrt(correction2)
        np.divide(m, change, out=change)
        change *= learning_rate * math.sqrt(correction2) / correction1
        if weight_decay > 0.0:
            param *= 1.0 - learning_rate * weight_decay
        param -= change

    with parallel.threads(num_threads) as run:
        pieces = trees.pieces(params, grads, state["first_moment"], state["second_moment"])
        run(update, *zip(*pieces, strict=True))
    return params, {**state, "step": np.array(count, np.int64)}


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
    # In float64: the square of 1e20 overflows float32.  No product of the BLAS, whose threads would
    # keep their cores busy for a while after it.
    squares = (np.square(piece, dtype=np.float64) for (piece,) in trees.pieces(grads))
    norm = math.sqrt(math.fsum(float(square.sum()) for square in squares))
    if not math.isfinite(norm):
        raise FloatingPointError(f"grads: their norm is {norm}")
    factor = min(1.0, max_norm / (norm + 1e-6))
    return trees.map_leaves(lambda leaf: leaf * factor, grads), norm


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate that rises linearly and then falls along a cosine.

    With w = warmup_steps, n = total_steps (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5,
    to 0, after a linear warm-up):

        step < w:    peak (step + 1) / (w + 1)
        step >= w:   peak (1 + cos(π (step - w) / (n - w))) / 2

    The first step already moves, step w has the peak, and the rate after the last is 0.

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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in trees.flatten(tree).items()}


def _real_dtype(argument: str, tree: Tree, shapes: dict[str, tuple[int, ...]]) -> np.dtype[Any]:
    dtype = trees.check_like(argument, tree, shapes)
    if dtype.kind == "c":
        raise TypeError(f"{argument}: dtype {dtype}, expected float32 or float64")
    return dtype


def _check_writeable(argument: str, tree: Tree) -> None:
    for name, leaf in trees.flatten(tree).items():
        if not leaf.flags.writeable:
            raise ValueError(f"{argument}: {name} is read-only, expected arrays to write to")


def _check_state(params: Tree, grads: Tree, state: Tree) -> None:
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
