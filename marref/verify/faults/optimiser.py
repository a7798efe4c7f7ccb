"""Faults of Adam and clipping."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from marref import checks, trees
from marref.model import MAR
from marref.optim import clip_by_global_norm, step, update
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage

fault = Stage()


def _with_settings(fault: Fault, changed: Callable[[Array, Any], dict[str, float]]) -> None:
    """Update each parameter with changed(param, settings) in the place of these settings."""

    @fault.wraps(update)
    def _(old: Any, param: Array, *arrays: Array, **settings: float) -> Any:
        # adam-step-from-zero divides by 0.
        with np.errstate(divide="ignore", invalid="ignore"):
            return old(param, *arrays, **{**settings, **changed(param, settings)})


# Which is right in the end, where βᵗ is 0.
fault("adam-without-bias-correction").sets("adam step count").says(
    "m and v are used as they are, though they start at 0. The first step is larger by "
    "(1 - β₁)/√(1 - β₂) = 3.16, later ones come closer."
).of(_with_settings)(lambda param, settings: {"t": math.inf})

# NaN is what it computes: the checks against NaN must let it through.
from_zero = fault("adam-step-from-zero").sets("adam step count")
from_zero.says(
    "The first step is corrected with t = 0, where 1 - βᵗ = 0: every parameter is NaN after it."
)
from_zero.of(_with_settings)(lambda param, settings: {"t": settings["t"] - 1})
from_zero.replaces(checks.finite)(lambda argument, array: None)


@from_zero.wraps(clip_by_global_norm)
def _(old: Any, grads: Tree, max_norm: float) -> Any:
    finite = all(np.isfinite(leaf).all() for leaf in trees.flatten(grads).values())
    return old(grads, max_norm) if finite else (grads, math.nan)


fault("adam-step-ahead").sets("adam step count").says(
    "The count is one ahead, t = 2 in the first step: it is raised twice, or before an optimiser "
    "that raises it too. The first step is smaller by a quarter, and the difference fades."
).of(_with_settings)(lambda param, settings: {"t": settings["t"] + 1})


@fault("adam-epsilon-inside-root").wraps(update)
def _(old: Any, param: Array, *arrays: Array, t: int, **settings: float) -> Any:
    """m̂/√(v̂ + ε) instead of m̂/(√v̂ + ε). Gradients much smaller than 1e-4 = √ε hardly move their
    parameters; the others look right."""
    _, m, v = old(param, *arrays, t=t, **settings)
    corrected_m = m / (1.0 - settings["beta1"] ** t)
    corrected_v = v / (1.0 - settings["beta2"] ** t)
    direction = corrected_m / np.sqrt(corrected_v + settings["epsilon"])
    param = param - settings["learning_rate"] * (direction + settings["weight_decay"] * param)
    return np.asarray(param), m, v


fault("adam-epsilon-before-correction").says(
    "η √(1 - β₂ᵗ)/(1 - β₁ᵗ) · m/(√v + ε): the shorter form that the paper gives at the end of its "
    "section 2, with the same ε. It is that of TensorFlow. Epsilon is larger by 1/√(1 - β₂ᵗ), 32 "
    "times in the first step, and only small gradients show it."
).of(_with_settings)(lambda _, s: {"epsilon": s["epsilon"] * (1 - s["beta2"] ** s["t"]) ** -0.5})
fault("adam-epsilon-1e-7").sets("adam epsilon").says(
    "Epsilon is 1e-7, the default of Keras, instead of 1e-8. Only small gradients show it."
).of(_with_settings)(lambda param, settings: {"epsilon": 1e-7})
fault("adam-epsilon-1e-6").sets("adam epsilon").says(
    "Epsilon is 1e-6, once the default of AdamW in Hugging Face's transformers, instead of 1e-8. "
    "Only small gradients show it."
).of(_with_settings)(lambda param, settings: {"epsilon": 1e-6})
fault("adam-beta2-0.95").says(
    "β₂ is 0.95, usual for large language models, instead of 0.999. The first step is the same, "
    "whatever β₂ is."
).of(_with_settings)(lambda param, settings: {"beta2": 0.95})


@fault("adam-decay-in-gradient").wraps(update)
def _(old: Any, param: Array, grad: Array, *moments: Array, **settings: Any) -> Any:
    """λθ is added to the gradient (L2, torch.optim.Adam's weight_decay) instead of to the step
    (AdamW). Adam divides it by the gradient's size, so that it acts much more strongly. Without
    weight decay it does not show."""
    grad = grad + settings["weight_decay"] * param
    return old(param, grad, *moments, **{**settings, "weight_decay": 0.0})


@fault("adam-decay-without-learning-rate").wraps(update)
def _(old: Any, param: Array, *arrays: Array, **settings: Any) -> Any:
    """θ shrinks by λθ instead of ηλθ in each step, as the AdamW paper has it with a factor of 1 for
    the schedule. Parameters die away within 1/λ steps."""
    moved, m, v = old(param, *arrays, **{**settings, "weight_decay": 0.0})
    return np.asarray(moved - settings["weight_decay"] * param), m, v


fault("adam-decay-of-kernels-only").says(
    "Biases and norm scales are not decayed, which is usual in training code; AdamW with one group "
    "of parameters decays all. Kernels and the table are right."
).of(_with_settings)(lambda param, settings: {"weight_decay": 0.0} if param.ndim == 1 else {})


def _clipped_together(fault: Fault, array_of: Callable[[str], str]) -> None:
    """Clip the gradients that lie in one array by their own norm."""

    @fault.wraps(clip_by_global_norm)
    def _(old: Any, grads: Tree, max_norm: float) -> Any:
        norm, leaves = old(grads, max_norm)[1], trees.flatten(grads)
        for array in {array_of(name) for name in leaves}:
            inside = [name for name in leaves if array_of(name) == array]
            clipped, _ = old({"leaves": [leaves[name] for name in inside]}, max_norm)
            leaves |= dict(zip(inside, clipped["leaves"], strict=True))
        return trees.unflatten(leaves), norm


fault("clip-each-array").says(
    "Each array is clipped by its own norm instead of the norm of all: the direction of the "
    "gradient changes, and small arrays escape clipping."
).of(_clipped_together)(lambda name: name)
fault("clip-each-fused-array").says(
    "Each array is clipped by its own norm, and query, key and value are one array, as in "
    "torch.nn.MultiheadAttention: they share a norm, the others do not."
).of(_clipped_together)(lambda name: re.sub(r"\.(query|key|value)\.", ".fused.", name))


@fault("clip-without-1e-6").wraps(clip_by_global_norm)
def _(old: Any, grads: Tree, max_norm: float) -> Any:
    """The factor is max_norm/‖g‖, without PyTorch's 1e-6 beside the norm, as in
    optax.clip_by_global_norm. Adam divides most of it away: nothing in float32."""
    _, norm = old(grads, max_norm)
    factor = max_norm / max(norm, max_norm)
    return trees.map_leaves(lambda leaf: leaf * factor, grads), norm


@fault("clip-values").replaces(clip_by_global_norm)
def _(grads: Tree, max_norm: float) -> tuple[Tree, float]:
    """Entries are cut to [-max_norm, max_norm] (clip by value) instead of scaling all of them
    together."""
    clipped = trees.map_leaves(lambda leaf: leaf.clip(-max_norm, max_norm), grads)
    return clipped, math.hypot(*(np.linalg.norm(leaf) for leaf in trees.flatten(grads).values()))


class _WithGradients(dict[str, Any]):
    """Parameters that keep the gradients of the step that made them, as PyTorch's do."""

    grads: Tree


not_zeroed = fault("gradients-not-zeroed")


@not_zeroed.wraps(MAR.backward)
def _(old: Any, model: MAR, params: Tree, dlogits: Array, cache: Tree) -> Tree:
    """Gradients are added to those of the step before: optimizer.zero_grad() was forgotten. The
    first step is right; with a batch that repeats itself the second has twice its gradient, which
    Adam hardly minds, and with clipping the clipped one and a new one."""
    grads: Tree = old(model, params, dlogits, cache)
    if isinstance(params, _WithGradients):
        grads = trees.map_leaves(np.add, params.grads, grads)
    return grads


@not_zeroed.wraps(step)
def _(old: Any, params: Tree, grads: Tree, *args: Any, **options: Any) -> tuple[Tree, Tree]:
    params, state = old(params, grads, *args, **options)
    stepped = _WithGradients(params)
    stepped.grads = grads
    return stepped, state
