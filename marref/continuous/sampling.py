"""Generation: tokens a few at a time in random order, each by a chain of diffusion steps.

After step k of K all tokens but m_k = max(1, min(m_{k-1} - 1, floor(L cos(πk/2K)))) are known, and
all after the last (`marref.schedules.cosine`).  Orders are used up from the end: what is masked is
always the beginning of the order.  With a guidance scale s the network is asked for the class and
for no class,

    e = e_u + s (e_c - e_u)

and its variance is that of the class.  s is the same in every step, or with linear guidance
1 + (scale - 1)(L - m_k)/L, and since m_k >= 1 there, 1 stands for 0 in the last.  Li et al. 2024
(arXiv 2406.11838, published code).  Page: docs/continuous.md.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from marref import checks, schedules, trees
from marref.continuous import diffusion, tokens
from marref.continuous.layers import network
from marref.continuous.loss import masked_by
from marref.continuous.model import ContinuousMAR, check_model
from marref.decoding import GUIDANCES
from marref.trees import Array, Tree


def sample(
    model: ContinuousMAR,
    params: Tree,
    labels: npt.ArrayLike | None = None,
    rng: np.random.Generator | None = None,
    *,
    draws: Tree | None = None,
    batch_size: int | None = None,
    num_steps: int = 16,
    num_diffusion_steps: int = 100,
    temperature: float = 1.0,
    guidance_scale: float = 1.0,
    guidance: str = "constant",
    clip: float | None = 3.0,
    sampler: "type[Sampler] | None" = None,
) -> Array:
    """Generate images.

    Parameters
    ----------
    model : ContinuousMAR
    params : dict
    labels : integer array [batch], optional
    rng : numpy.random.Generator, optional
        What is random is drawn from it, unless ``draws`` has it.
    draws : dict, optional
        From `draw`.
    batch_size : int, optional
        Number of images, 1 unless ``labels`` or ``draws`` say otherwise.
    num_steps : int
        K; published: 64, and 256 for evaluation, of 256 tokens.
    num_diffusion_steps : int
        Of the 1,000, see `marref.continuous.diffusion.respace`.
    temperature : float
        >= 0; scales the noise of the steps, not the noise that they start from.
    guidance_scale : float
        s >= 0; needs ``labels`` unless it is 1.
    guidance : {"constant", "linear"}
    clip : float or None
        Bounds the estimate of the clean token.  ``None`` is the published sampler, in which small
        models explode; see `marref.continuous.diffusion.step_back`.
    sampler : type, optional
        What computes: `Sampler`, the definition, or that of `marref.continuous.fast.sampling`,
        which is the default of `marref.continuous.sample`.

    Returns
    -------
    array [batch, channels, image_size, image_size]

    Raises
    ------
    TypeError, ValueError
        An argument does not fit the model or is outside its range.
    """
    check_model(model)
    trees.check_like("params", params, model.parameter_shapes)
    checks.integer("num_steps", num_steps, 1)
    checks.real("temperature", temperature, "[0, inf)")
    checks.real("guidance_scale", guidance_scale, "[0, inf)")
    checks.choice("guidance", guidance, GUIDANCES)
    if clip is not None:
        checks.real("clip", clip, "(0, inf)")
    steps = diffusion.process(model.noise_schedule, num_diffusion_steps)
    if guidance_scale != 1.0 and labels is None:
        raise ValueError(f"labels: received None, but guidance_scale={guidance_scale} needs them")
    if draws is None:
        count = len(np.asarray(labels)) if labels is not None else 1
        # The network's noise has the dtype of its parameters.
        dtype = np.float32 if params["mask_vector"].dtype == np.float32 else np.float64
        draws = draw(model, rng, batch_size or count, num_diffusion_steps, dtype)
    batch = len(draws["orders"])
    classes = [model.check_labels(labels, batch)]
    if guidance_scale != 1.0:
        classes.append(model.check_labels(None, batch))
    plan = Plan(draws, classes, num_steps, temperature, guidance_scale, guidance, clip)
    found = (sampler or Sampler)(model, params, steps).run(plan)
    return tokens.to_images(found, model.patch_size, model.channels, model.image_size)


def draw(
    model: ContinuousMAR,
    rng: np.random.Generator | None,
    batch_size: int,
    num_steps: int,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw everything that is random in sampling.

    Parameters
    ----------
    model : ContinuousMAR
    rng : numpy.random.Generator
    batch_size : int
    num_steps : int
        Of the diffusion.
    dtype : dtype
        Of the noise, which is drawn in float64 and rounded.

    Returns
    -------
    dict
        ``orders`` int64 [batch, length]; ``start_noise`` [batch, length, token_dim]; and
        ``step_noise`` [num_steps, batch, length, token_dim], in the order in which steps are
        taken, the last of which is not used.
    """
    checks.generator("rng", rng)
    assert rng is not None
    checks.integer("batch_size", batch_size, 1)
    shape = (batch_size, model.length, model.token_dim)
    orders = rng.permuted(np.tile(np.arange(model.length), (batch_size, 1)), axis=1)
    start_noise = rng.standard_normal(shape).astype(dtype)
    step_noise = np.empty((num_steps, *shape), dtype)
    for noise in step_noise:
        noise[...] = rng.standard_normal(shape)
    return {"orders": orders, "start_noise": start_noise, "step_noise": step_noise}


def scales_of(counts: Array, guidance_scale: float, guidance: str) -> Array:
    """Compute the guidance scale of every step, in which so many tokens are generated: [steps]."""
    if guidance == "constant":
        return np.full(len(counts), guidance_scale)
    length = counts.sum()
    left = np.maximum(length - np.cumsum(counts), 1)
    scales: Array = 1.0 + (guidance_scale - 1.0) * (length - left) / length
    return scales


def guide(output: Array, no_class: Array, scale: float) -> Array:
    """Move e, and leave v; all arrays [rows, 2·token_dim]."""
    (e, v), (of_none, _) = np.split(output, 2, axis=1), np.split(no_class, 2, axis=1)
    return np.concatenate([of_none + scale * (e - of_none), v], axis=1)


class Plan(NamedTuple):
    """What is random, what is asked for, and how; see `sample`.

    ``classes`` are those that are asked for, [batch], and behind them no class if that guides.
    """

    draws: Tree
    classes: list[Array]
    num_steps: int
    temperature: float
    guidance_scale: float
    guidance: str
    clip: float | None


class Sampler:
    """The definition of sampling, after its arguments have been checked."""

    def __init__(self, model: ContinuousMAR, params: Tree, steps: diffusion.Process) -> None:
        self.model = model
        self.params = params
        self.steps = steps
        self.dtype = params["mask_vector"].dtype

    def run(self, plan: Plan) -> Array:
        """Generate tokens [batch, length, token_dim], a few of each sequence at a time."""
        orders, length = plan.draws["orders"], self.model.length
        found = np.zeros((*orders.shape, self.model.token_dim), self.dtype)
        counts = schedules.cosine(length, plan.num_steps)
        scales = scales_of(counts, plan.guidance_scale, plan.guidance)
        left = length
        for count, scale in zip(counts.tolist(), scales.tolist(), strict=True):
            before, left = masked_by(orders, left), left - count
            now = before & ~masked_by(orders, left)
            conditions = self.conditions(found, plan.classes, before, now)
            found[now] = self.chain(plan, now, conditions, scale)
        return found

    def conditions(self, found: Array, classes: list[Array], masked: Array, now: Array) -> Any:
        """Compute z of the tokens ``now``, [rows, decoder_dim], for each of the classes."""
        return [self.model.forward(self.params, found, of, masked)[0][now] for of in classes]

    def outputs(self, x: Array, index: int, conditions: Any) -> list[Array]:
        """Compute [e, v] of noisy tokens [rows, token_dim] at a step, for each of the classes."""
        time = np.full(len(x), self.steps.timestep[index])
        return [network.forward(self.params["diffusion"], x, time, z)[0] for z in conditions]

    def chain(self, plan: Plan, now: Array, conditions: Any, scale: float) -> Array:
        """Make tokens [rows, token_dim] of noise, a diffusion step at a time."""
        last = len(self.steps.beta) - 1

        def output_of(x: Array, index: int) -> Array:
            output, *no_class = self.outputs(x, index, conditions)
            return guide(output, no_class[0], scale) if no_class else output

        def noise_of(index: int) -> Array:
            noise: Array = plan.draws["step_noise"][last - index][now]
            return noise.astype(self.dtype)

        x = plan.draws["start_noise"][now].astype(self.dtype)
        *_, x = diffusion.chain(self.steps, output_of, x, noise_of, plan.temperature, plan.clip)
        return x
