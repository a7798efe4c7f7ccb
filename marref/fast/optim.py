"""Adam in pieces that fit into a cache, for threads to take one by one."""

import functools
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from marref import optim, trees
from marref.fast import memory, parallel
from marref.fast.pieces import pieces
from marref.trees import Array, Tree

# The parameters that pay for a thread in a step; see docs/performance.md.
_WORTH_A_THREAD = 2**18


def adam_step(
    params: Tree,
    grads: Tree,
    state: Tree,
    learning_rate: float,
    *,
    beta1: float = optim.BETA1,
    beta2: float = optim.BETA2,
    epsilon: float = optim.EPSILON,
    weight_decay: float = 0.0,
    in_place: bool = True,
    num_threads: int | None = None,
) -> tuple[Tree, Tree]:
    """Take one step of Adam, or of AdamW, and write it over ``params`` and ``state``.

    Equal to `marref.optim.step`, its definition, up to rounding; the definition makes new arrays.

    Parameters
    ----------
    params, grads : trees of arrays
        Of one structure and one dtype.
    state : dict
        From `marref.optim.init` or the step before.
    learning_rate : float
        η >= 0.
    beta1, beta2, epsilon : float
        β₁, β₂ in [0, 1) and ε > 0; the defaults are the paper's.
    weight_decay : float
        λ >= 0; 0 is Adam, more is AdamW, on all parameters (as in PyTorch with one group).
    in_place : bool
        False leaves ``params`` and ``state`` as they were, and makes new arrays.  The default, to
        write over them as other optimisers do, saves the memory of a second set and some time.
    num_threads : int, optional
        How many threads share the work, by default as many as pay; the result does not depend on
        it.

    Returns
    -------
    params, state : dict
        The same arrays, written over; without ``in_place`` new ones.

    Raises
    ------
    TypeError, ValueError
        The trees differ in structure, shape or dtype, a number is outside its range, or an array
        that ``in_place`` would write to is read-only.
    """
    settings: dict[str, Any] = optim.check_settings(
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=weight_decay,
    )
    optim.check_state(params, grads, state)
    size = sum(leaf.size for leaf in trees.flatten(params).values())
    num_threads = parallel.choose(num_threads, size, _WORTH_A_THREAD)
    memory.keep_by_default()
    old = {"params": params, "m": state["first_moment"], "v": state["second_moment"]}
    if in_place:
        _check_writeable("params", params)
        _check_writeable("state", {name: state[name] for name in ("first_moment", "second_moment")})
    new = old if in_place else trees.map_leaves(np.empty_like, old)
    t = int(state["step"]) + 1
    with parallel.threads(num_threads) as run:
        parts = pieces(params, grads, old["m"], old["v"], new["params"], new["m"], new["v"])
        run(functools.partial(_update, t=t, **settings), *zip(*parts, strict=True))
    moments = {"first_moment": new["m"], "second_moment": new["v"]}
    return new["params"], {"step": np.array(t, np.int64), **moments}


def run_step(
    params: Tree,
    grads: Tree,
    state: Tree,
    average: Tree | None,
    learning_rate: float,
    *,
    max_norm: float,
    weight_decay: float,
    decay: Collection[str],
    average_decay: float,
    beta1: float = optim.BETA1,
    beta2: float = optim.BETA2,
    num_threads: int | None = None,
) -> tuple[Tree, float]:
    """Clip, decay, take a step of Adam and move the average: what a run does with gradients.

    Equal, to the bit, to `marref.optim.clip_by_global_norm`, θ ← (1 - ηλ)θ, `adam_step` and
    a ← a + (1 - d)(θ - a), one after the other; but each piece is brought to the cache once.
    (Adam's own part does not depend on θ:  θ - η(m̂/(√v̂ + ε) + λθ) = (1 - ηλ)θ - η m̂/(√v̂ + ε).)

    Parameters
    ----------
    params, grads, state : dict
        As in `adam_step`; of one structure, which is not checked.
    average : dict or None
        a, a tree like ``params``.
    learning_rate : float
        η
    max_norm : float
    weight_decay : float
        λ
    decay : {"matrices", "all"}, or names
        What decays: arrays of two axes and more, every one, or those of these dotted names.
    average_decay : float
        d
    beta1, beta2 : float
        β₁, β₂
    num_threads : int, optional

    Returns
    -------
    state : dict
        Its moments are those given, and written over, as are ``params`` and ``average``.
    norm : float
        Of the gradients, before clipping.

    Raises
    ------
    FloatingPointError
        The norm is not finite; nothing was written.
    """
    leaves = list(trees.flatten(grads).values())
    num_threads = parallel.choose(num_threads, sum(g.size for g in leaves), _WORTH_A_THREAD)
    m, v = state["first_moment"], state["second_moment"]
    t = int(state["step"]) + 1
    with parallel.threads(num_threads) as run:
        # Of whole leaves: the order of a sum decides its last digits.
        norm = math.sqrt(sum(run(optim.sum_of_squares, leaves)))
        of_piece = functools.partial(
            _step_of_piece,
            clip=optim.clip_factor(norm, max_norm),
            share=0.0 if average is None else 1.0 - average_decay,
            t=t,
            learning_rate=learning_rate,
            beta1=beta1,
            beta2=beta2,
        )
        keep = _kept(params, decay, 1.0 - learning_rate * weight_decay)
        parts = pieces(params, grads, m, v, params if average is None else average, keep)
        run(of_piece, *zip(*parts, strict=True))
    return {"step": np.array(t, np.int64), "first_moment": m, "second_moment": v}, norm


def _kept(params: Tree, decay: Collection[str], factor: float) -> Tree:
    """Make a tree like the parameters of what each keeps: the factor where it decays, else 1."""
    leaves = trees.flatten(params)
    if isinstance(decay, str):
        decay = {name for name, leaf in leaves.items() if decay == "all" or leaf.ndim >= 2}
    # Each has the shape of its parameter, but is one number in memory.
    return trees.unflatten(
        {
            name: np.broadcast_to(leaf.dtype.type(factor if name in decay else 1.0), leaf.shape)
            for name, leaf in leaves.items()
        }
    )


def _step_of_piece(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    mean: Array,
    keep: Array,
    *,
    clip: float,
    share: float,
    t: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
) -> None:
    if clip < 1.0:
        grad = grad * clip
    param *= keep
    _update(
        param,
        grad,
        m,
        v,
        param,
        m,
        v,
        t=t,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=optim.EPSILON,
        weight_decay=0.0,
    )
    if share > 0.0:
        mean += share * (param - mean)


def _update(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    new_param: Array,
    new_m: Array,
    new_v: Array,
    *,
    t: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """Do as `marref.optim.update`; the corrections of the moments act on the numbers of the step.

    With c₁ = 1 - β₁ᵗ and c₂ = 1 - β₂ᵗ:  m̂/(√v̂ + ε) = (√c₂/c₁) m/(√v + √c₂ ε).
    """
    correction1, root2 = 1.0 - beta1**t, math.sqrt(1.0 - beta2**t)
    change: Any = (1.0 - beta1) * grad
    np.multiply(m, beta1, out=new_m)
    new_m += change
    np.multiply(grad, grad, out=change)
    change *= 1.0 - beta2
    np.multiply(v, beta2, out=new_v)
    new_v += change
    np.sqrt(new_v, out=change)
    change += root2 * epsilon
    np.divide(new_m, change, out=change)
    change *= learning_rate * root2 / correction1
    if weight_decay > 0.0:
        np.multiply(param, 1.0 - learning_rate * weight_decay, out=new_param)
        param = new_param
    np.subtract(param, change, out=new_param)


def _check_writeable(argument: str, tree: Tree) -> None:
    for name, leaf in trees.flatten(tree).items():
        if not leaf.flags.writeable:
            raise ValueError(f"{argument}: {name} is read-only, expected arrays to write to")
