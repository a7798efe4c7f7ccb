"""Faults of the noise schedule, of what follows from it, and of the diffusion loss."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from marref import trees
from marref.continuous import diffusion, loss
from marref.continuous.diffusion import NUM_TIMESTEPS, Process
from marref.layers.gelu import sigmoid
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage

fault, loss_fault = Stage(), Stage()

_LOW, _MEAN_OF_CLEAN = (vars(Process)[name].func for name in ("low", "mean_of_clean"))


fault("noise-linear-for-cosine").sets("noise schedule").says(
    "Noise follows the linear schedule of Ho et al. 2020 where the cosine of Nichol and Dhariwal "
    "2021 is asked for."
).wraps(diffusion.process)(lambda old, schedule, *args: old("linear", *args))


@fault("noise-cosine-without-offset").sets("noise schedule").wraps(diffusion.process)
def _(old: Any, schedule: str, num_steps: int = NUM_TIMESTEPS) -> Process:
    """ᾱ_t ∝ cos²(π t/2T), without the offset 0.008 of Nichol and Dhariwal 2021. The first steps add
    hardly any noise: β_0 is 2.5e-6 instead of 4.1e-5."""
    right: Process = old(schedule, num_steps)
    if schedule != "cosine":
        return right
    f = np.cos(np.arange(NUM_TIMESTEPS + 1) / NUM_TIMESTEPS * np.pi / 2) ** 2
    alpha_bar = np.cumprod(np.maximum(f[1:] / f[:-1], 0.001))[right.timestep]
    return Process(1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]), right.timestep)


fault("respaced-index-for-original").says(
    "The network is given the index among the few steps instead of that among the 1,000. Training "
    "is right; sampling in fewer steps sees times that are far too small."
).wraps(diffusion.process)(
    lambda old, *args: Process((steps := old(*args)).beta, np.arange(len(steps.beta)))
)
fault("respaced-betas-of-the-whole").says(
    "Fewer steps have the β of the steps that are kept, instead of 1 - ᾱ[m_i]/ᾱ[m_{i-1}]: hardly "
    "any noise is taken away in all. All 1,000 steps are right."
).wraps(diffusion.process)(
    lambda old, schedule, num_steps=NUM_TIMESTEPS: Process(
        old(schedule).beta[(kept := old(schedule, num_steps).timestep)], kept
    )
)
fault("respaced-by-whole-strides").says(
    "Fewer steps are 0, s, 2 s, … with s = floor(1000/K), as in DDIM, and leave out the last "
    "times: what sampling starts from is no longer pure noise there. (It samples better than the "
    "published choice, which starts at 999.)"
).replaces(diffusion.respace)(lambda num_steps: np.arange(num_steps) * (NUM_TIMESTEPS // num_steps))


@fault("variance-first-not-clipped").replaces(_LOW)
def _(steps: Process) -> Array:
    """log ṽ_0 is log 1e-20, the logarithm of a variance of 0 with a floor, instead of log ṽ_1. Only
    rows at t = 0 differ: the log variance is far too small there for most v."""
    variance = steps.beta * (1.0 - steps.alpha_bar_before) / (1.0 - steps.alpha_bar)
    return np.asarray(np.log(np.maximum(variance, 1e-20)))


@fault("posterior-mean-with-this-alpha-bar").replaces(_MEAN_OF_CLEAN)
def _(steps: Process) -> Array:
    """c₁ = β √ᾱ_t/(1 - ᾱ_t) instead of β √ᾱ_{t-1}/(1 - ᾱ_t). Hardly visible at small t; each
    sampling step shrinks the token, the first ones by much."""
    return np.asarray(steps.beta * np.sqrt(steps.alpha_bar) / (1.0 - steps.alpha_bar))


def _noisy(fault: Fault, shares: Callable[[Process], tuple[Array, Array]]) -> None:
    """Compute x_t with other shares of clean token and noise."""

    @fault.replaces(diffusion.add_noise)
    def _(steps: Process, clean: Array, index: Array, noise: Array) -> Array:
        of_clean, of_noise = (
            share[index][:, np.newaxis].astype(clean.real.dtype) for share in shares(steps)
        )
        return np.asarray(of_clean * clean + of_noise * noise)


fault("noisy-without-roots").says(
    "x_t = ᾱ x + (1 - ᾱ) ε, without the roots: noisy tokens are smaller than they should be."
).of(_noisy)(lambda steps: (steps.alpha_bar, 1.0 - steps.alpha_bar))
fault("noisy-one-step-early").says(
    "x_t has the ᾱ of t - 1, times being counted from 1 in one place and from 0 in another. At t "
    "= 0 there is no noise at all; elsewhere it is nearly right."
).of(_noisy)(lambda steps: (np.sqrt(steps.alpha_bar_before), np.sqrt(1.0 - steps.alpha_bar_before)))


def _variance(fault: Fault, change: Callable[[Array], tuple[Array, Array]]) -> None:
    """Let the fraction be (w + 1)/2 with w and its derivative by v from ``change(v)``."""

    @fault.wraps(diffusion.loss_forward)
    def _(old: Any, steps: Process, output: Array, *args: Any) -> Any:
        e, v = np.split(output, 2, axis=1)
        changed, slope = change(v)
        *rows, cache = old(steps, np.concatenate([e, changed], axis=1), *args)
        return (*rows, {**cache, "dv": cache["dv"] * slope})

    @fault.wraps(diffusion.step_back)
    def _(old: Any, steps: Process, output: Array, *args: Any, **options: Any) -> Any:
        e, v = np.split(output, 2, axis=1)
        return old(steps, np.concatenate([e, change(v)[0]], axis=1), *args, **options)


fault("variance-fraction-is-v").sets("variance fraction").says(
    "The log variance is v log β + (1 - v) log ṽ: the fraction is v instead of (v + 1)/2."
).of(_variance)(lambda v: (2.0 * v - 1.0, np.full_like(v, 2.0)))
fault("variance-fraction-sigmoid").sets("variance fraction").says(
    "The fraction between the two log variances is σ(v) instead of (v + 1)/2, which nothing keeps "
    "in [0, 1]. Right where v = 0, with half the slope."
).of(_variance)(lambda v: (2.0 * (gate := sigmoid(v)) - 1.0, 2.0 * gate * (1.0 - gate)))
fault("variance-v-tanh").sets("variance fraction").says(
    "v is squashed by tanh before it says where between the two log variances the variance lies. "
    "Right where v is near 0."
).of(_variance)(lambda v: ((squashed := np.tanh(v)), 1.0 - squashed**2))


def _bound_times(fault: Fault, factor: float) -> None:
    """Multiply the bound by a number."""

    @fault.wraps(diffusion.loss_forward)
    def _(old: Any, *args: Any) -> Any:
        squared_error, bound, cache = old(*args)
        return squared_error, factor * bound, {**cache, "dv": factor * cache["dv"]}


_bound_times(
    loss_fault("bound-in-nats")
    .sets("bound")
    .says(
        "The variational bound is in nats, without the division by log 2: smaller by 0.69 in every "
        "row, and so are the gradients through v."
    ),
    math.log(2.0),
)
_bound_times(
    loss_fault("bound-missing")
    .sets("bound")
    .says(
        "There is no variational bound: the loss is the squared error alone, and v is never "
        "trained, though sampling uses it."
    ),
    0.0,
)
_bound_times(
    loss_fault("bound-times-0.001")
    .sets("bound")
    .says(
        "The bound is multiplied by 0.001, as in the hybrid loss of Nichol and Dhariwal 2021; the "
        "published MAR code adds it as it is."
    ),
    1e-3,
)


@loss_fault("bound-first-step-as-the-others").wraps(diffusion.loss_forward)
def _(old: Any, steps: Process, output: Array, clean: Array, index: Array, noise: Array) -> Any:
    """Rows at t = 0 have the Kullback-Leibler divergence of the other rows instead of the
    probability of a bin. Only these rows differ."""
    squared_error, bound, cache = old(steps, output, clean, index, noise)
    e, v = np.split(output, 2, axis=1)
    dtype = output.real.dtype
    low, high = (np.asarray(table[0], dtype) for table in (steps.low, steps.high))
    scale = np.asarray(steps.mean_of_clean[0] * steps.to_clean[0], dtype)
    log_variance = diffusion.log_variance_of(v, low, high)
    narrow = np.exp(low - log_variance)
    wide = (scale * (e - noise).real) ** 2 * np.exp(-log_variance)
    kl = 0.5 * (log_variance - low - 1.0 + narrow + wide) / math.log(2.0)
    dv = 0.25 * (1.0 - narrow - wide) * (high - low) / math.log(2.0)
    last = index == 0
    bound = np.where(last, kl.mean(axis=1), bound)
    return squared_error, bound, {**cache, "dv": np.where(last[:, np.newaxis], dv, cache["dv"])}


@loss_fault("bound-not-detached").wraps(diffusion.loss_forward)
def _(old: Any, steps: Process, output: Array, clean: Array, index: Array, noise: Array) -> Any:
    """e is not detached in the bound, so that the bound trains it too. The loss is right; the
    gradients of e are not, at t = 999 by a factor of a thousand."""
    squared_error, bound, cache = old(steps, output, clean, index, noise)
    v = np.split(output, 2, axis=1)[1]
    low, high, scale = (
        table[index][:, np.newaxis].astype(output.real.dtype)
        for table in (steps.low, steps.high, steps.mean_of_clean * steps.to_clean)
    )
    log_variance = diffusion.log_variance_of(v, low, high)
    distance = scale * cache["error"].real
    slope = distance * np.exp(-log_variance)
    last = index == 0
    slope[last] = _slope_of_last_step(clean[last], distance[last], log_variance[last])
    # The backward pass doubles the error.
    error = cache["error"] + 0.5 * scale * slope / math.log(2.0)
    return squared_error, bound, {**cache, "error": error}


def _slope_of_last_step(clean: Array, distance: Array, log_variance: Array) -> Array:
    """Differentiate -log P at t = 0 by the distance of the means."""
    shrink = np.exp(-0.5 * log_variance)
    (above, above_slope), (below, below_slope) = (
        diffusion.normal(shrink * (distance + side)) for side in (1.0 / 255.0, -1.0 / 255.0)
    )
    lowest, highest = clean < -0.999, clean > 0.999
    p = np.where(highest, 1.0, above) - np.where(lowest, 0.0, below)
    dp = np.where(highest, 0.0, above_slope) - np.where(lowest, 0.0, below_slope)
    floored = p.real < 1e-12
    return np.asarray(np.where(floored, 0.0, -shrink * dp / np.where(floored, 1.0, p)))


@loss_fault("squared-error-summed").wraps(diffusion.loss_forward)
def _(old: Any, steps: Process, output: Array, *args: Any) -> Any:
    """The squared error is the sum over a token's numbers instead of their mean: larger by
    token_dim, while the bound is right."""
    squared_error, bound, cache = old(steps, output, *args)
    count = output.shape[1] // 2
    return count * squared_error, bound, {**cache, "error": count * cache["error"]}


@loss_fault("loss-over-all-rows").wraps(loss.loss_and_grads)
def _(
    old: Any, model: Any, params: Tree, images: Any, labels: Any, draws: Tree, **options: Any
) -> Any:
    """The sum over the masked rows is divided by the number of all rows: the mean of loss * mask
    instead of its sum over the sum of the mask. Loss and gradients are smaller by the masked share;
    each row is right."""
    share = int(draws["num_masked"]) / model.length
    value, grads, *parts = old(model, params, images, labels, draws, **options)
    scaled = [
        {name: part if name == "rows" else share * part for name, part in of.items()}
        for of in parts
    ]
    return share * value, trees.map_leaves(lambda leaf: share * leaf, grads), *scaled
