"""Training of a continuous MAR, by default as its authors did but for what a short run needs.

A step draws a batch and what else is random by name (`marref.chance`), so that it depends on the
seed, the number of the step and the state alone: a run that was stopped goes on bit for bit.

    θ ← AdamW(β₁ = 0.9, β₂ = 0.95, weight decay 0.02 on some, gradients of norm 3 at most)
    a ← a + (1 - d)(θ - a),     d = min(average_decay, (n + 1)/(n + 10)) in step n = 0, 1, …

a, the average of the parameters, is what to sample with.  With d = 0.9999 from the start, as
published, it takes 100,000 steps to forget how the model began; warmed up, it reaches over the last
tenth of the steps so far.  Li et al. 2024 (arXiv 2406.11838, published code).  Page:
docs/continuous.md.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from marref import chance, checks, masking, optim, trees
from marref.continuous.fast.training import loss_and_grads
from marref.continuous.model import ContinuousMAR, check_model
from marref.fast import memory
from marref.fast.optim import run_step
from marref.training import loop
from marref.training.config import DTYPES
from marref.training.loop import State
from marref.trees import Array, Tree

DECAYED = ("published", "kernels")
SCHEDULES = ("constant", "cosine")
BETA1, BETA2 = 0.9, 0.95


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of a training run.

    Parameters
    ----------
    num_steps, batch_size : int
    learning_rate : float
        The peak.  Published: 1e-4 for a batch of 256, and in proportion to the batch.
    warmup_steps : int, optional
        Over which the rate rises linearly.  ``None``: a twentieth of the steps.
    schedule : {"constant", "cosine"}
        How the rate goes on: as published, or down to 0 along a cosine.
    weight_decay : float
        As in AdamW; see `marref.optim`.
    decay : {"published", "kernels"}
        What decays.  As published: all parameters of two axes and more, and none of the diffusion
        network; so the tables of classes and positions and the mask vector (which has three axes
        there) are drawn to 0.  Otherwise the kernels, of the whole model.
    mask_schedule : str
        Of the mask ratio, one a batch; see `marref.masking`.  As published at least 0.7 is masked,
        which is cheaper; late steps of sampling see more than that ever shows.
    max_norm : float
        See `marref.optim.clip_by_global_norm`.
    average_decay : float
        d in [0, 1); 0: no average.
    average_warmup : bool
        Whether d is smaller at first, or as published.
    num_parts : int
        Each batch is cut into so many parts, and every core takes one.  They are added up, so the
        last digits depend on it, and not on how many cores there are.
    dtype : {"float32", "float64"}
    seed : int
        Of everything that is drawn; see `marref.chance`.

    Raises
    ------
    TypeError, ValueError
        An option is of another type or outside its range.
    """

    num_steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.02
    decay: str = "published"
    mask_schedule: str = "truncated-normal"
    max_norm: float = 3.0
    average_decay: float = 0.9999
    average_warmup: bool = True
    num_parts: int = 2
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        steps = checks.integer("num_steps", self.num_steps, 1, 2**32 - 1)
        checks.integer("batch_size", self.batch_size, 1)
        if self.warmup_steps is not None:
            checks.integer("warmup_steps", self.warmup_steps, 0, steps - 1)
        checks.integer("num_parts", self.num_parts, 1)
        checks.integer("seed", self.seed, 0, 2**128 - 1)
        checks.real("learning_rate", self.learning_rate, "(0, inf)")
        checks.real("weight_decay", self.weight_decay, "[0, inf)")
        checks.real("max_norm", self.max_norm, "(0, inf)")
        checks.real("average_decay", self.average_decay, "[0, 1)")
        if not isinstance(self.average_warmup, bool):
            received = type(self.average_warmup).__name__
            raise TypeError(f"average_warmup: received {received}, expected bool")
        checks.choice("schedule", self.schedule, SCHEDULES)
        checks.choice("decay", self.decay, DECAYED)
        checks.choice("mask_schedule", self.mask_schedule, masking.SCHEDULES)
        checks.choice("dtype", self.dtype, DTYPES)

    def learning_rate_at(self, step: int) -> float:
        """Compute the learning rate after so many steps."""
        warmup = self.num_steps // 20 if self.warmup_steps is None else self.warmup_steps
        if self.schedule == "cosine":
            return optim.warmup_cosine(
                step,
                peak=self.learning_rate,
                warmup_steps=warmup,
                total_steps=self.num_steps,
            )
        return self.learning_rate * min(1.0, (step + 1) / (warmup + 1))

    def average_decay_at(self, step: int) -> float:
        """Compute d after so many steps."""
        if not self.average_warmup:
            return self.average_decay
        return min(self.average_decay, (step + 1) / (step + 10))


@dataclasses.dataclass(frozen=True)
class StepRecord(loop.StepRecord):
    """What happened in one training step: as of discrete MAR, and the two parts of the loss.

    Parameters
    ----------
    squared_error : float
    bound : float
        In bits; a single row at t = 999 can make it hundreds.
    """

    squared_error: float
    bound: float


def train(
    model: ContinuousMAR,
    images: npt.ArrayLike,
    labels: npt.ArrayLike | None = None,
    *,
    config: Config,
    state: State | None = None,
    on_step: Callable[[StepRecord, State], None] | None = None,
) -> tuple[State, list[StepRecord]]:
    """Train a model.

    Parameters
    ----------
    model : ContinuousMAR
    images : float array [num_images, channels, image_size, image_size]
        Scaled to a standard deviation of about 1.
    labels : integer array [num_images], optional
        The class of every image, for a model with classes.
    config : Config
    state : State, optional
        Where to go on: from `load`, or from an earlier call.  Not written to.
    on_step : callable, optional
        Called after every step with its record and the state.  The next step writes over the
        arrays, so what is to be kept must be copied, or saved.

    Returns
    -------
    state : State
        After ``config.num_steps`` steps; ``state.averaged`` is what to sample with.
    history : list of StepRecord
        Of the steps taken here.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit the model or is outside its range.
    FloatingPointError
        Gradients are no longer finite; the message says in which step.

    Examples
    --------
    >>> from marref import continuous
    >>> model = continuous.build(**continuous.CONFIGURATIONS["digits"])
    >>> images = np.random.default_rng(0).normal(size=(20, 1, 8, 8))
    >>> state, history = train(model, images, [3] * 20, config=Config(2, batch_size=4))
    >>> [record.step for record in history], continuous.sample(model, state.averaged, [3],
    ...     np.random.default_rng(0), num_diffusion_steps=2).shape
    ([1, 2], (1, 1, 8, 8))
    """
    check_model(model)
    images = model.check_images(images)
    classes = model.check_labels(labels, len(images))
    if on_step is not None:
        checks.function("on_step", on_step)
    state = init(config, model) if state is None else _copied(checked(config, model, state))
    memory.keep_by_default()
    history = []
    for number in range(int(state.optimiser["step"]), config.num_steps):
        rng = chance.generator(config.seed, "batch", number)
        chosen = rng.integers(len(images), size=config.batch_size)
        state, record = step(config, model, images[chosen], classes[chosen], state)
        history.append(record)
        if on_step is not None:
            on_step(record, state)
    return state, history


def init(config: Config, model: ContinuousMAR) -> State:
    """Make the state before the first step."""
    params = model.init(chance.generator(config.seed, "parameters"), config.dtype)
    average = trees.map_leaves(np.copy, params) if config.average_decay else None
    return State(params, optim.init(params), average)


def decayed(params: Tree, decay: str) -> set[str]:
    """Name the parameters that decay; see `Config`."""
    leaves = trees.flatten(params)
    if decay == "kernels":
        return {name for name in leaves if name.endswith(".kernel")}
    transformer = {name for name in leaves if not name.startswith("diffusion.")}
    return {name for name in transformer if leaves[name].ndim > 1} | {"mask_vector"}


def checked(config: Config, model: ContinuousMAR, state: State) -> State:
    """Return the state; raise unless it fits the config and the model."""
    dtype = trees.check_like("state.params", state.params, model.parameter_shapes)
    if dtype != config.dtype:
        raise TypeError(f"state.params: dtype {dtype}, expected {config.dtype} as in the config")
    optim.check_state(state.params, state.params, state.optimiser)
    checks.integer("state.step", state.optimiser["step"][()], 0, config.num_steps)
    if (state.average is not None) != (config.average_decay > 0.0):
        received = "none" if state.average is None else "one"
        raise ValueError(f"state.average: received {received}, but {config.average_decay=}")
    if state.average is not None:
        trees.check_like("state.average", state.average, model.parameter_shapes)
    return state


def _copied(state: State) -> State:
    return State(*(trees.map_leaves(np.copy, part) for part in state))


def step(
    config: Config, model: ContinuousMAR, images: Array, labels: Array, state: State
) -> tuple[State, StepRecord]:
    """Take a step on a batch, in place; draws depend on the seed and the number of the step."""
    start = time.perf_counter()
    number = int(state.optimiser["step"])
    draws = model.draw(
        chance.generator(config.seed, "diffusion", number),
        len(images),
        mask_schedule=config.mask_schedule,
    )
    with loop.divergence_named(number):
        grads, *losses = loss_and_grads(
            model, state.params, images, labels, draws, config.num_parts
        )
        return update(config, state, grads, losses, start, len(images) * model.length)


def update(
    config: Config,
    state: State,
    grads: Tree,
    losses: Sequence[float],
    start: float,
    tokens: int,
    num_threads: int | None = None,
) -> tuple[State, StepRecord]:
    """Move the parameters along the gradients of a step, and say what happened.

    Parameters
    ----------
    config : Config
    state : State
        Its arrays are written over.
    grads : dict
    losses : sequence of float
        The squared error and the bound.
    start : float
        When the step began, in seconds.
    tokens : int
        Of the batch.
    num_threads : int, optional
        By default as many as pay.
    """
    number = int(state.optimiser["step"])
    rate = config.learning_rate_at(number)
    optimiser, grad_norm = run_step(
        state.params,
        grads,
        state.optimiser,
        state.average,
        rate,
        beta1=BETA1,
        beta2=BETA2,
        max_norm=config.max_norm,
        weight_decay=config.weight_decay,
        decay=decayed(state.params, config.decay),
        average_decay=config.average_decay_at(number),
        num_threads=num_threads,
    )
    speed = tokens / (time.perf_counter() - start)
    record = StepRecord(number + 1, sum(losses), grad_norm, rate, speed, *losses)
    return State(state.params, optimiser, state.average), record
