"""Faults of weight decay and of sampling."""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref import optim, trees
from marref.continuous import diffusion, sampling, training
from marref.continuous.diffusion import Process
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage

fault, decay_fault = Stage(), Stage()


def _decaying(fault: Fault, decays: Callable[[str, Array, bool], bool]) -> None:
    """Let decay what decays(name, leaf, as published) says."""

    @fault.sets("weight decay").wraps(training.decayed)
    def _(old: Any, params: Tree, decay: str) -> set[str]:
        published = old(params, "published")
        leaves = trees.flatten(params)
        return {name for name, leaf in leaves.items() if decays(name, leaf, name in published)}


decay_fault("decay-of-everything").says(
    "Weight decay acts on all parameters, as AdamW with one group has it; as published it acts on "
    "none of the diffusion network's, and on no bias or scale."
).of(_decaying)(lambda name, leaf, published: True)
decay_fault("decay-of-the-network-too").says(
    "Weight decay acts on the kernels of the diffusion network too, which the published code "
    "leaves out."
).of(_decaying)(lambda name, leaf, published: published or name.endswith("kernel"))
decay_fault("decay-without-tables").says(
    "Tables of positions and classes and the mask vector do not decay, only kernels: sane, but "
    "not as published, where they have more than one axis and so do."
).of(_decaying)(lambda name, leaf, published: published and name.endswith("kernel"))
decay_fault("decay-without-the-mask-vector").says(
    "The mask vector has one axis here and does not decay; it has three in the published code, "
    "and does."
).of(_decaying)(lambda name, leaf, published: published and leaf.ndim > 1)
decay_fault("adam-beta2-0.999").says(
    "β₂ is 0.999, the usual default, instead of 0.95. The first step is the same, whatever β₂ is."
).wraps(optim.update)(lambda old, *arrays, **settings: old(*arrays, **{**settings, "beta2": 0.999}))


def _log_variance(steps: Process, output: Array, index: int) -> Array:
    v = np.split(output, 2, axis=1)[1]
    return diffusion.log_variance_of(v, float(steps.low[index]), float(steps.high[index]))


@fault("sampling-noise-in-the-last-step").wraps(diffusion.step_back)
def _(
    old: Any,
    steps: Process,
    output: Array,
    noisy: Array,
    index: int,
    noise: Array,
    temperature: float,
    clip: float | None,
) -> Array:
    """Noise is added in the last step too. All steps before are right; what is generated is off by
    a hundredth."""
    x: Array = old(steps, output, noisy, index, noise, temperature, clip)
    if index > 0:
        return x
    return x + temperature * np.exp(0.5 * _log_variance(steps, output, index)) * noise


@fault("sampling-deviation-not-halved").wraps(diffusion.step_back)
def _(
    old: Any,
    steps: Process,
    output: Array,
    noisy: Array,
    index: int,
    noise: Array,
    temperature: float,
    clip: float | None,
) -> Any:
    """The noise is multiplied by exp(l), the variance, instead of exp(l/2), the standard
    deviation: far too little of it."""
    deviation = np.exp(0.5 * _log_variance(steps, output, index))
    return old(steps, output, noisy, index, deviation * noise, temperature, clip)


def _with_v(fault: Fault, value: float) -> None:
    """Sample with the same v everywhere."""

    @fault.sets("sampling variance").wraps(diffusion.step_back)
    def _(old: Any, steps: Process, output: Array, *args: Any, **options: Any) -> Any:
        e, v = np.split(output, 2, axis=1)
        return old(steps, np.concatenate([e, np.full_like(v, value)], axis=1), *args, **options)


_with_v(
    fault("sampling-variance-small").says(
        "Sampling ignores v and has the variance ṽ, fixed small in Ho et al. 2020."
    ),
    -1.0,
)
_with_v(
    fault("sampling-variance-large").says(
        "Sampling ignores v and has the variance β, fixed large in Ho et al. 2020."
    ),
    1.0,
)


@fault("sampling-temperature-on-the-mean").sets("temperature").wraps(diffusion.step_back)
def _(
    old: Any,
    steps: Process,
    output: Array,
    noisy: Array,
    index: int,
    noise: Array,
    temperature: float,
    clip: float | None,
) -> Any:
    """The temperature multiplies the mean of a step as well as its noise. Temperature 1 hides
    it."""
    return temperature * old(steps, output, noisy, index, noise, 1.0, clip)


@fault("sampling-temperature-on-the-start").wraps(sampling.Sampler.chain)
def _(old: Any, sampler: Any, plan: sampling.Plan, *args: Any) -> Any:
    """The noise that a chain starts from is multiplied by the temperature too. Temperature 1 hides
    it."""
    start = plan.temperature * plan.draws["start_noise"]
    return old(sampler, plan._replace(draws={**plan.draws, "start_noise": start}), *args)


fault("sampling-temperature-ignored").sets("temperature").says(
    "The noise of the steps is not multiplied by the temperature. Temperature 1 hides it."
).wraps(diffusion.step_back)(
    lambda old, steps, output, noisy, index, noise, temperature, clip: old(
        steps, output, noisy, index, noise, 1.0, clip
    )
)


@fault("sampling-clip-of-the-result").wraps(diffusion.step_back)
def _(
    old: Any,
    steps: Process,
    output: Array,
    noisy: Array,
    index: int,
    noise: Array,
    temperature: float,
    clip: float | None,
) -> Array:
    """What a step returns is clipped, noise and all, instead of the estimate of the clean token. It
    bounds the samples too, and cuts the noise's tails."""
    x: Array = old(steps, output, noisy, index, noise, temperature, None)
    return x if clip is None else np.clip(x, -clip, clip)


def _guiding(fault: Fault, guide: Callable[[Array, Array, float], Array]) -> None:
    fault.sets("guidance").replaces(sampling.guide)(guide)


fault("guidance-on-the-variance-too").says(
    "v is guided as e is, u + s (c - u); as published it is that of the class alone."
).of(_guiding)(lambda output, no_class, scale: no_class + scale * (output - no_class))


def _variance_of_no_class(output: Array, no_class: Array, scale: float) -> Array:
    (e, _), (of_none, v) = np.split(output, 2, axis=1), np.split(no_class, 2, axis=1)
    return np.concatenate([of_none + scale * (e - of_none), v], axis=1)


fault("guidance-variance-of-no-class").says(
    "With guidance v is that of no class instead of that of the class."
).of(_guiding)(_variance_of_no_class)
fault("guidance-one-plus-scale").says(
    "e = (1 + s) c - s u, the formula of Ho and Salimans 2022, in which s = 0 is no guidance. It "
    "is as if the scale were larger by 1."
).wraps(sampling.guide)(lambda old, output, no_class, scale: old(output, no_class, scale + 1.0))


def _scaling(fault: Fault, masked: Callable[[Array], Array]) -> None:
    """With linear guidance count as masked what ``masked(counts)`` says, step by step."""

    @fault.sets("linear guidance").wraps(sampling.scales_of)
    def _(old: Any, counts: Array, guidance_scale: float, guidance: str) -> Any:
        if guidance == "constant":
            return old(counts, guidance_scale, guidance)
        length = counts.sum()
        return 1.0 + (guidance_scale - 1.0) * (length - masked(counts)) / length


fault("guidance-linear-before-the-step").says(
    "Linear guidance has s = 1 + (scale - 1)(L - m)/L with m masked before the step instead of "
    "after it: the first step is not guided at all."
).of(_scaling)(lambda counts: counts.sum() - np.cumsum(counts) + counts)
fault("guidance-linear-to-the-end").says(
    "Linear guidance reaches the full scale in the last step; as published one token counts as "
    "masked there. Only the last step differs."
).of(_scaling)(lambda counts: counts.sum() - np.cumsum(counts))
fault("guidance-linear-ignored").says("Guidance is constant where it should be linear.").of(
    _scaling
)(lambda counts: np.zeros_like(counts))


@fault("sampling-order-from-the-start").wraps(sampling.sample)
def _(old: Any, *args: Any, draws: Tree, **options: Any) -> Any:
    """Tokens are generated from the start of each order on, instead of from its end. Training,
    where the first are masked, is right."""
    return old(*args, draws={**draws, "orders": draws["orders"][:, ::-1]}, **options)
