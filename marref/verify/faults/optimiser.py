"""Faults of Adam and clipping."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from marref import checks, optim, trees
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Patch, replace, wrap


class _Settings(NamedTuple):
    """The numbers of one step: η, β₁, β₂, ε, λ and the count t."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int

    def corrected(self, m: Array, v: Array) -> tuple[Array, Array]:
        """m̂ = m/(1 - β₁ᵗ), v̂ = v/(1 - β₂ᵗ)."""
        return m / (1.0 - self.beta1**self.step), v / (1.0 - self.beta2**self.step)


_Update = Callable[[Array, Array, Array, _Settings], Array]


def _adam(update: _Update) -> tuple[Patch]:
    """Adam with another update θ ← update(θ, m, v, settings)."""

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
    ) -> tuple[Tree, Tree]:
        count = int(state["step"]) + 1
        settings = _Settings(learning_rate, beta1, beta2, epsilon, weight_decay, count)
        first = trees.map_leaves(
            lambda m, g: beta1 * m + (1.0 - beta1) * g, state["first_moment"], grads
        )
        second = trees.map_leaves(
            lambda v, g: beta2 * v + (1.0 - beta2) * (g * g), state["second_moment"], grads
        )
        new_params = trees.map_leaves(
            lambda param, m, v: update(param, m, v, settings), params, first, second
        )
        new_step = np.array(count, np.int64)
        return new_params, {"step": new_step, "first_moment": first, "second_moment": second}

    return (replace(optim, "step", step),)


def _descend(param: Array, direction: Array, settings: _Settings) -> Array:
    """θ - η (direction + λ θ)."""
    return param - settings.learning_rate * (direction + settings.weight_decay * param)


def _uncorrected(param: Array, m: Array, v: Array, settings: _Settings) -> Array:
    """M / (√v + ε)."""
    return _descend(param, m / (np.sqrt(v) + settings.epsilon), settings)


def _count_moved(by: int) -> _Update:
    """Correct the moments with t + by in the place of t."""

    def update(param: Array, m: Array, v: Array, settings: _Settings) -> Array:
        count = settings.step + by
        with np.errstate(divide="ignore", invalid="ignore"):
            m = m / np.float64(1.0 - settings.beta1**count).astype(m.dtype)
            v = v / np.float64(1.0 - settings.beta2**count).astype(v.dtype)
            return _descend(param, m / (np.sqrt(v) + settings.epsilon), settings)

    return update


def _inside_the_root(param: Array, m: Array, v: Array, settings: _Settings) -> Array:
    """m̂ / √(v̂ + ε)."""
    m, v = settings.corrected(m, v)
    return _descend(param, m / np.sqrt(v + settings.epsilon), settings)


def _epsilon_first(param: Array, m: Array, v: Array, settings: _Settings) -> Array:
    """√(1 - β₂ᵗ)/(1 - β₁ᵗ) · m / (√v + ε)."""
    rate = math.sqrt(1.0 - settings.beta2**settings.step) / (1.0 - settings.beta1**settings.step)
    return _descend(param, rate * m / (np.sqrt(v) + settings.epsilon), settings)


def _decay_by_itself(param: Array, m: Array, v: Array, settings: _Settings) -> Array:
    """θ - η m̂/(√v̂ + ε) - λ θ."""
    m, v = settings.corrected(m, v)
    direction = m / (np.sqrt(v) + settings.epsilon)
    return param - settings.learning_rate * direction - settings.weight_decay * param


def _coupled(old: Any) -> Any:
    """Take g ← g + λ θ, and no decay beside the moments."""

    def step(
        params: Tree,
        grads: Tree,
        state: Tree,
        learning_rate: float,
        *,
        weight_decay: float = 0.0,
        **rest: Any,
    ) -> Any:
        grads = trees.map_leaves(lambda g, param: g + weight_decay * param, grads, params)
        return old(params, grads, state, learning_rate, **rest)

    return step


def _kernels_only(old: Any) -> Any:
    """λ = 0 for every array of one dimension."""

    def step(
        params: Tree,
        grads: Tree,
        state: Tree,
        learning_rate: float,
        *,
        weight_decay: float = 0.0,
        **rest: Any,
    ) -> Any:
        decayed, state_after = old(
            params, grads, state, learning_rate, weight_decay=weight_decay, **rest
        )
        plain, _ = old(params, grads, state, learning_rate, **rest)
        chosen = trees.map_leaves(lambda a, b: b if b.ndim == 1 else a, decayed, plain)
        return chosen, state_after

    return step


def _setting(**changed: float) -> tuple[Patch]:
    """Override settings, whatever the caller says."""
    return (wrap(optim, "step", lambda old: lambda *args, **rest: old(*args, **(rest | changed))),)


def _clip_unless_nan(old: Any) -> Any:
    """Leave gradients with NaN as they are."""

    def clip(grads: Tree, max_norm: float) -> tuple[Tree, float]:
        if all(np.isfinite(leaf).all() for leaf in trees.flatten(grads).values()):
            clipped: tuple[Tree, float] = old(grads, max_norm)
            return clipped
        return grads, math.nan

    return clip


def _clip_each(grads: Tree, max_norm: float) -> tuple[Tree, float]:
    """Each array times min(1, max_norm/(‖array‖ + 1e-6))."""
    norms = [float(np.linalg.norm(leaf)) for leaf in trees.flatten(grads).values()]

    def clip(leaf: Array) -> Array:
        return leaf * min(1.0, max_norm / (float(np.linalg.norm(leaf)) + 1e-6))

    return trees.map_leaves(clip, grads), math.hypot(*norms)


def _clip_values(grads: Tree, max_norm: float) -> tuple[Tree, float]:
    """Each entry is clipped to [-max_norm, max_norm]."""
    norms = [float(np.linalg.norm(leaf)) for leaf in trees.flatten(grads).values()]
    clipped = trees.map_leaves(lambda leaf: leaf.clip(-max_norm, max_norm), grads)
    return clipped, math.hypot(*norms)


FAULTS = (
    Fault(
        "adam-without-bias-correction",
        "m and v are used as they are, though they start at 0. The first step is larger by "
        "(1 - β₁)/√(1 - β₂) = 3.16, later ones come closer.",
        _adam(_uncorrected),
    ),
    Fault(
        "adam-step-from-zero",
        "The first step is corrected with t = 0, where 1 - βᵗ = 0: every parameter is NaN "
        "after it.",
        # NaN is what it computes: the checks against NaN must let it through.
        (
            *_adam(_count_moved(-1)),
            wrap(checks, "finite", lambda old: lambda *_: None),
            wrap(optim, "clip_by_global_norm", _clip_unless_nan),
        ),
    ),
    Fault(
        "adam-step-ahead",
        "The count is one ahead, t = 2 in the first step: it is raised twice, or before an "
        "optimiser that raises it too. The first step is smaller by a quarter, and the "
        "difference fades.",
        _adam(_count_moved(1)),
    ),
    Fault(
        "adam-epsilon-inside-root",
        "m̂/√(v̂ + ε) instead of m̂/(√v̂ + ε). Gradients much smaller than 1e-4 = √ε hardly move "
        "their parameters; the others look right.",
        _adam(_inside_the_root),
    ),
    Fault(
        "adam-epsilon-before-correction",
        "η √(1 - β₂ᵗ)/(1 - β₁ᵗ) · m/(√v + ε): the shorter form that the paper gives at the end "
        "of its section 2, with the same ε. It is that of TensorFlow. Epsilon is larger by "
        "1/√(1 - β₂ᵗ), 32 times in the first step, and only small gradients show it.",
        _adam(_epsilon_first),
    ),
    Fault(
        "adam-epsilon-1e-7",
        "Epsilon is 1e-7, the default of Keras, instead of 1e-8. Only small gradients show it.",
        _setting(epsilon=1e-7),
    ),
    Fault(
        "adam-beta2-0.95",
        "β₂ is 0.95, usual for large language models, instead of 0.999. The first step is the "
        "same, whatever β₂ is.",
        _setting(beta2=0.95),
    ),
    Fault(
        "adam-decay-in-gradient",
        "λθ is added to the gradient (L2, torch.optim.Adam's weight_decay) instead of to the "
        "step (AdamW). Adam divides it by the gradient's size, so that it acts much more "
        "strongly. Without weight decay it does not show.",
        (wrap(optim, "step", _coupled),),
    ),
    Fault(
        "adam-decay-without-learning-rate",
        "θ shrinks by λθ instead of ηλθ in each step, as the AdamW paper has it with a factor "
        "of 1 for the schedule. Parameters die away within 1/λ steps.",
        _adam(_decay_by_itself),
    ),
    Fault(
        "adam-decay-of-kernels-only",
        "Biases and norm scales are not decayed, which is usual in training code; AdamW with "
        "one group of parameters decays all. Kernels and the table are right.",
        (wrap(optim, "step", _kernels_only),),
    ),
    Fault(
        "clip-each-array",
        "Each array is clipped by its own norm instead of the norm of all: the direction of the "
        "gradient changes, and small arrays escape clipping.",
        (replace(optim, "clip_by_global_norm", _clip_each),),
    ),
    Fault(
        "clip-values",
        "Entries are cut to [-max_norm, max_norm] (clip by value) instead of scaling all of "
        "them together.",
        (replace(optim, "clip_by_global_norm", _clip_values),),
    ),
)
