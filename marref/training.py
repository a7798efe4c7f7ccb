"""Training: the loop, evaluation, and models on disk."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, files, masking, optim, trees
from marref.fast import adam_step, loss_and_grads
from marref.loss import mar_loss
from marref.masking import mask_tokens, sample_mask_ratio
from marref.model import MAR, check_model
from marref.trees import Array, Tree


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
    on_step: Callable[[StepRecord], None] | None = None,
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
        Draws batches, masks and dropout.
    warmup_steps : int
    weight_decay : float
        See `marref.optim.step`.
    max_norm : float
        Gradients are clipped to this global norm; see `marref.optim.clip_by_global_norm`.
    mask_schedule : str
        See `marref.masking.sample_mask_ratio`.
    mask_token_id : int
    on_step : callable, optional
        Called with the record of every step, as it ends.
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
        The logits are no longer finite; the message says in which step.
    """
    check_model(model)
    tokens = model.check_inputs(params, tokens)
    checks.integer("num_steps", num_steps, 1)
    checks.integer("batch_size", batch_size, 1)
    checks.real("learning_rate", learning_rate, "(0, inf)")
    checks.integer("warmup_steps", warmup_steps, 0, num_steps - 1)
    checks.choice("mask_schedule", mask_schedule, masking.SCHEDULES)
    checks.integer("mask_token_id", mask_token_id, 0, model.vocab_size - 1)
    checks.no_mask_token("tokens", tokens, mask_token_id)
    checks.generator("rng", rng)
    if num_threads is not None:
        checks.integer("num_threads", num_threads, 1)

    params = trees.map_leaves(np.copy, params)
    state = optim.init(params)
    history = []
    for step in range(num_steps):
        start = time.perf_counter()
        targets = tokens[rng.integers(len(tokens), size=batch_size)]
        ratio = sample_mask_ratio(rng, mask_schedule, size=batch_size)
        inputs, mask = mask_tokens(targets, ratio, rng, mask_token_id)
        try:
            loss, grads = loss_and_grads(
                model, params, inputs, targets, mask, rng, num_threads=num_threads
            )
        except ValueError as error:
            raise FloatingPointError(f"training diverged in step {step + 1}: {error}") from error
        grads, grad_norm = optim.clip_by_global_norm(grads, max_norm)
        rate = optim.warmup_cosine(
            step, peak=learning_rate, warmup_steps=warmup_steps, total_steps=num_steps
        )
        params, state = adam_step(
            params, grads, state, rate, weight_decay=weight_decay, num_threads=num_threads
        )
        speed = targets.size / (time.perf_counter() - start)
        history.append(StepRecord(step + 1, float(loss.real), grad_norm, rate, speed))
        if on_step is not None:
            on_step(history[-1])
    return params, history


def bits_per_token(
    predict: Callable[[Array], Array],
    tokens: npt.ArrayLike,
    ratio: float,
    rng: np.random.Generator,
    *,
    mask_token_id: int = 0,
    batch_size: int = 256,
) -> float:
    """Mean cross-entropy at a fixed mask ratio, in bits per masked token.

    Parameters
    ----------
    predict : callable
        Masked tokens [batch, length] to logits [batch, length, vocab_size]; for a model,
        ``functools.partial(marref.fast.logits, model, params)``.
    tokens : integer array [num_sequences, length]
        Without ``mask_token_id``.
    ratio : float
        In [0, 1]; every sequence has the same number of masked positions.
    rng : numpy.random.Generator
        Draws the masks: the same seed gives the same masks.
    mask_token_id : int
    batch_size : int
        How many sequences are predicted at once; the result does not depend on it.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        There are no sequences, or an argument is none of `marref.masking.mask_tokens`.
    """
    checks.integer("batch_size", batch_size, 1)
    checks.function("predict", predict)
    targets = checks.token_ids("tokens", tokens, np.iinfo(np.int64).max)
    if len(targets) == 0:
        raise ValueError(f"tokens: shape {list(targets.shape)}, expected at least one sequence")
    checks.no_mask_token("tokens", targets, mask_token_id)
    masked, mask = mask_tokens(targets, ratio, rng, mask_token_id)
    nats = 0.0
    for start in range(0, len(targets), batch_size):
        part = slice(start, start + batch_size)
        loss = mar_loss(predict(masked[part]), targets[part], mask[part])
        nats += float(loss.real) * int(mask[part].sum())
    return nats / (int(mask.sum()) * math.log(2))


def position_log_frequencies(tokens: npt.ArrayLike, vocab_size: int) -> npt.NDArray[np.float64]:
    """Logarithm of how often each id occurs at each position: the baseline of a model.

    Every count starts at 1 (Laplace), so that no id is impossible.

    Parameters
    ----------
    tokens : integer array [num_sequences, length]
    vocab_size : int

    Returns
    -------
    float64 array [length, vocab_size]
    """
    checks.integer("vocab_size", vocab_size, 2)
    tokens = checks.token_ids("tokens", tokens, vocab_size)
    counts = 1.0 + (tokens[:, :, np.newaxis] == np.arange(vocab_size)).sum(axis=0)
    log_frequencies: npt.NDArray[np.float64] = np.log(counts / counts.sum(axis=1, keepdims=True))
    return log_frequencies


def save_model(path: str | os.PathLike[str], model: MAR, params: Tree) -> None:
    """Write a model and its parameters to one ``.npz`` file, whole or not at all.

    Parameters
    ----------
    path : path
        Written as given: no suffix is added.
    model : MAR
    params : dict

    Raises
    ------
    TypeError, ValueError
        The parameters do not fit the model.
    """
    check_model(model)
    trees.check_like("params", params, model.parameter_shapes)
    files.save(path, trees.flatten(params), {"model": dataclasses.asdict(model)})


def load_model(path: str | os.PathLike[str]) -> tuple[MAR, Tree]:
    """Read what `save_model` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    model : MAR
    params : dict

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It holds no model, or parameters that do not fit it.
    """
    leaves, metadata = files.load(path)
    config: Any = metadata.get("model")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the metadata hold no model")
    try:
        model = MAR(**config)
        params = trees.unflatten(leaves)
        trees.check_like("params", params, model.parameter_shapes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model, params
