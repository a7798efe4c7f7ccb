"""The loop over data in memory, and the step of a run.

`train` draws everything from one generator, one thing after the other.  `step`, of which
`marref.training.runs` is made, draws by name (`marref.chance`): what a step draws depends on its
number alone, so that a run that was stopped goes on as if it had not been.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from marref import chance, checks, masking, optim, trees
from marref.data import Dataset
from marref.fast import adam_step, logits, loss_and_grads, parallel
from marref.fast.optim import run_step
from marref.masking import drop_labels, mask_tokens, sample_mask_ratio
from marref.model import MAR, check_model
from marref.training.config import Config
from marref.training.evaluation import bits_per_token
from marref.training.ranks import ALONE, Ranks, Share
from marref.trees import Array, Tree

VALIDATION_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The mask ratios over which the validation is the mean."""
PLOTTED = ("loss", "loss [nats per masked token]")
"""Of a `StepRecord`, and what it is."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What happened in one training step.

    Parameters
    ----------
    step : int
        Counted from 1.
    loss : float
        Nats per masked token, on this step's batch.
    grad_norm : float
        Global norm of the gradient, before clipping.
    learning_rate : float
    tokens_per_second : float
        Tokens of the batch, masked or not, over the step's wall-clock time.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class RunRecord(StepRecord):
    """What happened in one step of a run: a line of ``history.csv``.

    Parameters
    ----------
    validation_bits : float or None
        After the step, where validation is due: bits per masked token of the data that were set
        aside, of the averaged parameters where there is an average; the mean over
        `VALIDATION_RATIOS`, behind the same masks each time.
    """

    validation_bits: float | None = None

    @property
    def validation(self) -> float | None:
        """What is best where it is least."""
        return self.validation_bits


def train(
    model: MAR,
    params: Tree,
    tokens: npt.ArrayLike,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    rng: np.random.Generator,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
    mask_schedule: str = "one-minus-cosine",
    mask_token_id: int = 0,
    labels: npt.ArrayLike | None = None,
    label_drop: float = 0.1,
    on_step: Callable[[StepRecord], None] | None = None,
    on_state: "Callable[[StepRecord, State], None] | None" = None,
    num_threads: int | None = None,
) -> tuple[Tree, list[StepRecord]]:
    """Train a model with AdamW on randomly masked sequences.

    Every step draws a batch of sequences with replacement and a mask ratio for each of them.

    Parameters
    ----------
    model : MAR
    params : dict
        Where to start; not written to.
    tokens : integer array [num_sequences, length]
        The data, without ``mask_token_id``.
    num_steps, batch_size : int
    learning_rate : float
        The peak, reached after ``warmup_steps``; see `marref.optim.warmup_cosine`.
    rng : numpy.random.Generator
        Draws batches, masks, dropout, and which labels are dropped.
    warmup_steps : int
    weight_decay : float
        See `marref.optim.step`.
    max_norm : float
        Gradients are clipped to this global norm; see `marref.optim.clip_by_global_norm`.
    mask_schedule : str
        See `marref.masking.sample_mask_ratio`.
    mask_token_id : int
    labels : integer array [num_sequences], optional
        The class of every sequence, for a model with classes.
    label_drop : float
        The probability of a sequence to be trained on as one of no class, see
        `marref.masking.drop_labels`.
    on_step : callable, optional
        Called with the record of every step, as it ends.
    on_state : callable, optional
        Called before ``on_step`` with the record and the state: parameters and moments.  The next
        step writes over the arrays, so what is to be kept must be copied.
    num_threads : int, optional
        How many threads share each batch; see `marref.loss_and_grads`.  The same bits on every
        machine need a number.

    Returns
    -------
    params : dict
        The trained parameters.
    history : list of StepRecord

    Raises
    ------
    TypeError, ValueError
        An argument is of another type or outside its range.
    FloatingPointError
        Logits or gradients are no longer finite; the message says in which step.
    """
    check_model(model)
    tokens = model.check_inputs(params, tokens)
    labels = model.check_labels(labels, len(tokens))
    checks.real("label_drop", label_drop, "[0, 1)")
    checks.integer("num_steps", num_steps, 1)
    checks.integer("batch_size", batch_size, 1)
    checks.real("learning_rate", learning_rate, "(0, inf)")
    checks.integer("warmup_steps", warmup_steps, 0, num_steps - 1)
    checks.choice("mask_schedule", mask_schedule, masking.SCHEDULES)
    checks.integer("mask_token_id", mask_token_id, 0, model.vocab_size - 1)
    checks.no_mask_token("tokens", tokens, mask_token_id)
    checks.generator("rng", rng)
    check_callbacks(on_step, on_state)
    if num_threads is not None:
        checks.integer("num_threads", num_threads, 1)

    params = trees.map_leaves(np.copy, params)
    state = optim.init(params)
    history = []
    for step in range(num_steps):
        start = time.perf_counter()
        chosen = rng.integers(len(tokens), size=batch_size)
        targets, classes = tokens[chosen], None
        if labels is not None and model.num_classes is not None:
            classes = drop_labels(labels[chosen], label_drop, rng, model.num_classes)
        ratio = sample_mask_ratio(rng, mask_schedule, size=batch_size)
        inputs, mask = mask_tokens(targets, ratio, rng, mask_token_id)
        with divergence_named(step):
            loss, grads = loss_and_grads(
                model, params, inputs, targets, mask, rng, labels=classes, num_threads=num_threads
            )
            grads, grad_norm = optim.clip_by_global_norm(grads, max_norm)
        rate = optim.warmup_cosine(
            step, peak=learning_rate, warmup_steps=warmup_steps, total_steps=num_steps
        )
        params, state = adam_step(
            params, grads, state, rate, weight_decay=weight_decay, num_threads=num_threads
        )
        speed = targets.size / (time.perf_counter() - start)
        history.append(StepRecord(step + 1, float(loss.real), grad_norm, rate, speed))
        if on_state is not None:
            on_state(history[-1], State(params, state, None))
        if on_step is not None:
            on_step(history[-1])
    return params, history


def check_callbacks(on_step: object, on_state: object) -> None:
    """Raise unless both can be called, or are None."""
    for name, callback in (("on_step", on_step), ("on_state", on_state)):
        if callback is not None:
            checks.function(name, callback)


class State(NamedTuple):
    """What a run carries from step to step.

    Parameters
    ----------
    params : dict
    optimiser : dict
        See `marref.optim.init`.
    average : dict or None
        The average of the parameters; ``None`` where the config has none.
    """

    params: Tree
    optimiser: Tree
    average: Tree | None

    @property
    def averaged(self) -> Tree:
        """What to evaluate and to sample with: the average or, without one, the parameters."""
        return self.params if self.average is None else self.average


def init(config: Config, model: MAR) -> State:
    """Make the state before the first step.

    Parameters
    ----------
    config : Config
        Resolved.
    model : MAR
        Kernels and the embedding table are drawn with the standard deviation 1/√embed_dim, which
        lets a narrow model learn; see `MAR.init`.

    Notes
    -----
    Query kernels are drawn twice as large, and key kernels start as their query kernels, so that
    q·k is largest between inputs that are alike.  The positions being the largest part of the first
    input, attention starts near its own place, from where it finds neighbours soon; from
    independent kernels it starts anywhere, and on text a model stays for long where it knows no
    more than how often each token occurs.  Trockman and Kolter 2023 (arXiv 2305.09828) found
    W_Q W_Kᵀ near the identity in trained models, and started from there.  The factor 2 was the best
    of 1, 1.5, 2 and 3 on a text, by validation after half a minute.
    """
    rng = chance.generator(config.seed, "parameters")
    params = model.init(rng, config.dtype, std=config.embed_dim**-0.5)
    for block in params["blocks"]:
        block["attention"]["query"]["kernel"] *= 2.0
        block["attention"]["key"]["kernel"][...] = block["attention"]["query"]["kernel"]
    average = trees.map_leaves(np.copy, params) if config.average_decay else None
    return State(params, optim.init(params), average)


def step(
    config: Config,
    model: MAR,
    dataset: Dataset,
    state: State,
    number: int,
    processes: Ranks = ALONE,
) -> tuple[State, StepRecord]:
    """Take a step of a run.

    Parameters
    ----------
    config : Config
        Resolved.
    model : MAR
    dataset : Dataset
    state : State
        Its arrays are written over.
    number : int
        How many steps were taken before.
    processes : Ranks
        Who share the shards, if the config has any.

    Returns
    -------
    state : State
        A function of the arguments and nothing else, to the bit; and not of the processes unless
        the config reduces fast.
    record : StepRecord

    Raises
    ------
    FloatingPointError
        Logits or gradients are no longer finite: training diverged.
    """
    start = time.perf_counter()
    count = config.accumulate * config.batch_size
    size = count * dataset.length
    num_threads = config.num_threads
    rate = config.learning_rate_at(number)
    with divergence_named(number):
        if config.num_shards is None:
            batch = _batch(config, model, dataset, count, number)
            loss, grads = _loss_and_grads(config, model, state.params, batch, num_threads, number)
        else:
            num_threads = processes.threads(num_threads, size * model.embed_dim)
            (loss,), grads = processes.mean(
                functools.partial(_of_shard, config, model, dataset, state.params, number),
                config.num_shards,
                state.params,
                num_threads=num_threads,
                reduce=config.reduce,
            )
        optimiser, grad_norm = run_step(
            state.params,
            grads,
            state.optimiser,
            state.average,
            rate,
            max_norm=config.max_norm,
            weight_decay=config.weight_decay,
            decay=config.decay,
            average_decay=config.average_decay or 0.0,
            num_threads=num_threads,
        )
    speed = size / (time.perf_counter() - start)
    record = StepRecord(number + 1, loss, grad_norm, rate, speed)
    return State(state.params, optimiser, state.average), record


def validation(config: Config, model: MAR, held_out: Dataset, index: Array, state: State) -> float:
    """Measure the bits per masked token of some sequences of a dataset; see `RunRecord`."""
    # With shards the bits do not depend on how many threads there are.
    num_threads = config.num_threads if config.num_shards is None else 1
    predict = functools.partial(logits, model, state.averaged, num_threads=num_threads)
    bits = [
        bits_per_token(
            predict,
            held_out.rows(index),
            ratio,
            chance.generator(config.seed, "validation", number),
            labels=held_out.labels_at(index),
            batch_size=config.batch_size,
        )
        for number, ratio in enumerate(VALIDATION_RATIOS)
    ]
    return sum(bits) / len(bits)


class _Batch(NamedTuple):
    """Sequences of a step, [batch, length]: all, or those of a shard."""

    inputs: Array
    targets: Array
    mask: Array
    labels: Array | None


def _batch(config: Config, model: MAR, dataset: Dataset, count: int, *numbers: int) -> _Batch:
    """Draw so many sequences by the step, and the shard if there are any."""
    index = dataset.draw_index(chance.generator(config.seed, "batch", *numbers), count)
    targets, labels = dataset.rows(index), None
    if dataset.labels is not None and model.num_classes is not None:
        rng = chance.generator(config.seed, "label", *numbers)
        labels = drop_labels(dataset.labels[index], config.label_drop, rng, model.num_classes)
    rng = chance.generator(config.seed, "mask", *numbers)
    ratio: float | Array
    if config.mask_per == "batch":
        step, *shard = numbers
        of_step = chance.generator(config.seed, "mask", step) if shard else rng
        ratio = sample_mask_ratio(of_step, config.mask_schedule)
    else:
        ratio = sample_mask_ratio(rng, config.mask_schedule, size=count)
    inputs, mask = mask_tokens(targets, ratio, rng)
    return _Batch(inputs, targets, mask, labels)


def _of_shard(
    config: Config, model: MAR, dataset: Dataset, params: Tree, number: int, shard: int
) -> Share:
    """Compute the mean over the masked positions of a shard."""
    rows = parallel.split(config.accumulate * config.batch_size, config.num_shards or 1)[shard]
    batch = _batch(config, model, dataset, rows.stop - rows.start, number, shard)
    loss, grads = _loss_and_grads(config, model, params, batch, 1, number, shard)
    return Share(int(batch.mask.sum()), (loss,), grads)


def _loss_and_grads(
    config: Config,
    model: MAR,
    params: Tree,
    batch: _Batch,
    num_threads: int | None,
    *numbers: int,
) -> tuple[float, Tree]:
    """Compute those of a step, or of a shard, batch_size sequences at a time.

    The loss is a mean over masked positions, so each part has the weight of its share of them.
    """
    loss, sums = 0.0, dict[str, Array]()
    num_masked = int(batch.mask.sum())
    for part, start in enumerate(range(0, len(batch.mask), config.batch_size)):
        rows = slice(start, start + config.batch_size)
        mask = batch.mask[rows]
        part_loss, grads = loss_and_grads(
            model,
            params,
            batch.inputs[rows],
            batch.targets[rows],
            mask,
            chance.generator(config.seed, "dropout", *numbers, part),
            label_smoothing=config.label_smoothing,
            labels=None if batch.labels is None else batch.labels[rows],
            num_threads=num_threads,
        )
        share = int(mask.sum()) / num_masked
        loss += share * float(part_loss)
        for name, grad in trees.flatten(grads).items():
            if share < 1.0:
                grad *= share
            sums[name] = sums[name] + grad if part else grad
    return loss, trees.unflatten(sums)


@contextlib.contextmanager
def divergence_named(step: int) -> Iterator[None]:
    """Call what is no longer finite by its name; whatever else goes wrong keeps its own."""
    try:
        yield
    except (checks.NotFinite, FloatingPointError) as error:
        raise FloatingPointError(f"training diverged in step {step + 1}: {error}") from error
