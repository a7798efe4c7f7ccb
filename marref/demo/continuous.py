"""The demo of the continuous model: the same digits as 16 tokens of 2x2 grey values.

Page: docs/continuous.md.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from marref import chance, continuous
from marref.continuous import Config, ContinuousMAR, StepRecord
from marref.continuous.pixels import Scale
from marref.data import Dataset
from marref.demo import (
    NUM_CLASSES,
    NUM_OF_EACH,
    Progress,
    by_class,
    digits,
    judge,
    quality,
    rows_and_labels,
    side_by_side,
    write_history,
)
from marref.training import State

_SHOWN_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo trains and how it generates.

    Parameters
    ----------
    model : dict
        Arguments of `marref.continuous.build`.
    config : marref.continuous.Config
    sampling : dict
        Arguments of `marref.continuous.sample`.
    """

    model: dict[str, Any]
    config: Config
    sampling: dict[str, Any]


DEFAULT = Settings(
    {
        **continuous.CONFIGURATIONS["digits"],
        "diffusion_dim": 64,
        "diffusion_batch_mul": 2,
        "noise_schedule": "linear",
    },
    Config(1500, batch_size=64, learning_rate=2e-3, mask_schedule="cosine"),
    {"num_steps": 16, "num_diffusion_steps": 100, "guidance_scale": 1.5},
)
QUICK = Settings(
    DEFAULT.model,
    dataclasses.replace(DEFAULT.config, num_steps=20),
    {**DEFAULT.sampling, "num_steps": 4, "num_diffusion_steps": 10},
)


def run(
    settings: Settings, out: Path, seed: int, echo: Callable[[str], None] = print
) -> tuple[float, quality.TwoSamples]:
    """Train, generate, measure, and write the results to a folder.

    Parameters
    ----------
    settings : Settings
    out : pathlib.Path
        Made if missing.  Receives ``checkpoint.npz``, ``history.csv`` and, with the ``viz`` extra,
        ``samples.png``.
    seed : int
        Of everything that is drawn.
    echo : callable
        Takes the lines of the report.

    Returns
    -------
    agreement : float
        How many of the digits a nearest-neighbour classifier sees as what was asked for.
    statistic : quality.TwoSamples
        Against the held-out digits.
    """
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = digits()
    scale = Scale.of(train)
    config = dataclasses.replace(settings.config, seed=seed)
    model = continuous.build(**settings.model)
    state, history = train_on(config, model, train, scale, echo)
    continuous.save(out / "checkpoint.npz", model, config, state)
    write_history(out / "history.csv", history)

    images = continuous.sample(
        model,
        state.averaged,
        np.repeat(np.arange(NUM_CLASSES), NUM_OF_EACH),
        chance.generator(seed, "sample"),
        **settings.sampling,
    )
    generated = scale.to_tokens(images)
    echo("\nGenerated digits:\n")
    shown = [generated[digit * NUM_OF_EACH] for digit in range(NUM_CLASSES)]
    for start in range(0, NUM_CLASSES, _SHOWN_DIGITS):
        echo(side_by_side(shown[start : start + _SHOWN_DIGITS]) + "\n")
    found = judge(generated, train, held_out, seed, echo)
    names = ["checkpoint.npz", "history.csv"]
    try:
        from marref import plots
    except ImportError:
        echo('No pictures: the viz extra, pip install ".[viz]", adds samples.png (matplotlib) and')
        echo("a progress bar (tqdm).")
    else:
        plots.samples(out / "samples.png", by_class(held_out), generated)
        names.append("samples.png")
    echo(f"Wrote {', '.join(names)} to {out}.")
    return found


def train_on(
    config: Config,
    model: ContinuousMAR,
    train: Dataset,
    scale: Scale,
    echo: Callable[[str], None],
) -> tuple[State, list[StepRecord]]:
    """Train on the digits, and show how it goes."""
    tokens, labels = rows_and_labels(train)
    num_parameters = sum(np.prod(shape, dtype=int) for shape in model.parameter_shapes.values())
    echo(
        f"Training {num_parameters:,} parameters on {len(train)} digits of {model.length} tokens "
        f"of 2x2 grey values,\n{config.num_steps} steps of {config.batch_size} digits."
    )
    with Progress(config.num_steps, echo, ("squared_error", "bound")) as progress:
        return continuous.train(
            model,
            scale.to_images(tokens),
            labels,
            config=config,
            on_step=lambda record, _: progress(record),
        )
