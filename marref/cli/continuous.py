"""``marref sample`` of a run of the continuous model: pictures, by chains of diffusion steps."""

import argparse
import functools
from concurrent.futures import Executor
from typing import Any

import numpy as np

from marref import chance, continuous
from marref.cli import arguments
from marref.continuous.model import ContinuousMAR
from marref.continuous.pixels import Scale
from marref.continuous.run import RunConfig
from marref.data.codecs import Codec
from marref.training import pool
from marref.training.checkpoints import Checkpoint
from marref.trees import Array, Tree

_MOST_AT_ONCE, _MOST_OF_A_PROCESS = 64, 16
# Numbers, of which 2**25 take 256 MB.
_MOST_NOISE = 2**25
_STEPS = 16
_DIFFUSION_STEPS = 100
_CLIP = 3.0
_OF_DISCRETE = (
    "top_k",
    "top_p",
    "min_p",
    "exclude_ids",
    "choice_temperature",
    "order_temperature",
    "score_temperature",
    "order",
    "schedule",
    "reveal",
    "block_length",
    "remask",
    "prompt",
    "show_steps",
    "gif",
)


def add_arguments(sample: argparse.ArgumentParser) -> None:
    """Add the options that only runs of the continuous model have."""
    own = sample.add_argument_group("of runs with --continuous only, see docs/continuous.md")
    own.add_argument(
        "--diffusion-steps",
        type=arguments.positive,
        help=f"of each token, of the 1,000; default: {_DIFFUSION_STEPS}",
    )
    own.add_argument(
        "--clip",
        type=_clip,
        metavar="BOUND",
        help=f"of the estimate of the clean token, or none, as published; default: {_CLIP:g}",
    )


def _clip(text: str) -> float:
    return np.inf if text == "none" else arguments.real(text)


def check_discrete(parsed: argparse.Namespace) -> None:
    """Raise if an option is given that only runs of the continuous model have."""
    _check_not_given(parsed, ("diffusion_steps", "clip"), "discrete MAR")


def _check_not_given(parsed: argparse.Namespace, names: tuple[str, ...], model: str) -> None:
    for name in names:
        value = getattr(parsed, name)
        if value is not None and value is not False and value != []:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: received for a run of {model}, which has none")


def sample(
    parsed: argparse.Namespace,
    checkpoint: Checkpoint,
    codec: Codec,
    labels: list[int | None],
    executor: Executor | None,
) -> Array:
    """Generate pictures; each depends on its number, and not on how many there are.

    But for rounding: products of other shapes have other last digits, which can move a pixel to
    the next level.

    Returns
    -------
    int64 array [num, codec.length]
        Tokens.
    """
    _check_not_given(parsed, _OF_DISCRETE, "the continuous model")
    config, model = checkpoint.config, checkpoint.model
    assert isinstance(config, RunConfig)
    assert isinstance(model, ContinuousMAR)
    scale = config.scale(codec)
    clip = _CLIP if parsed.clip is None else parsed.clip
    options: dict[str, Any] = {
        "num_steps": min(parsed.steps or _STEPS, model.length),
        "num_diffusion_steps": parsed.diffusion_steps or _DIFFUSION_STEPS,
        "temperature": parsed.temperature,
        "guidance_scale": parsed.guidance_scale,
        "guidance": parsed.guidance,
        "clip": None if np.isinf(clip) else clip,
    }
    noise = options["num_diffusion_steps"] * model.length * model.token_dim
    most = _MOST_AT_ONCE if executor is None else _MOST_OF_A_PROCESS
    at_once = max(1, min(most, _MOST_NOISE // noise))
    starts = range(0, parsed.num, at_once)
    parts = [range(start, min(start + at_once, parsed.num)) for start in starts]
    some = functools.partial(
        _some, model, checkpoint.state.averaged, labels, parsed.seed, options, scale
    )
    return np.concatenate(list(pool.in_order(some, parts, executor)))


def _some(
    model: ContinuousMAR,
    params: Tree,
    labels: list[int | None],
    seed: int,
    options: dict[str, Any],
    scale: Scale,
    numbers: range,
) -> Array:
    """Generate the pictures of some numbers."""
    classes = [label for label in labels[numbers.start : numbers.stop] if label is not None]
    draws = _draws(seed, model, numbers, options["num_diffusion_steps"])
    images = continuous.sample(model, params, classes or None, draws=draws, **options)
    return scale.to_tokens(images)


def _draws(seed: int, model: ContinuousMAR, numbers: range, num_steps: int) -> Tree:
    """Draw what is random of some samples, each by its number."""
    drawn = [
        continuous.draw(model, chance.generator(seed, "sample", index), 1, num_steps)
        for index in numbers
    ]
    axes = {"orders": 0, "start_noise": 0, "step_noise": 1}
    return {name: np.concatenate([one[name] for one in drawn], axis) for name, axis in axes.items()}
