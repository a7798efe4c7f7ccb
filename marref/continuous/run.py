"""What `marref.training.runs` needs to train the continuous model on pictures into a folder.

The options, and the three functions that a run is made of, as `marref.training.loop` has them for
discrete MAR: `init`, `step` and `validation`.  Page: docs/continuous.md.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from marref import chance, checks
from marref.continuous import diffusion, loss, training
from marref.continuous.fast.training import loss_and_grads
from marref.continuous.hyperparameters import of_told_scale
from marref.continuous.model import ContinuousMAR
from marref.continuous.pixels import Scale, square
from marref.data import Dataset
from marref.data.codecs import Codec
from marref.fast import parallel
from marref.training import config as discrete
from marref.training import loop
from marref.training.loop import State
from marref.training.ranks import ALONE, REDUCE, Ranks, Share
from marref.trees import Array, Tree

VALIDATION_DRAWS = 4
"""How often each held-out picture is validated with, under masks, times and noise of its own."""
PLOTTED = ("squared_error", "squared error of the noise")
"""Of a `StepRecord`, and what it is; the bound has spikes that hide everything."""


@dataclasses.dataclass(frozen=True)
class RunConfig(training.Config):
    """The options of a run; where ``None``, `resolved` fills in what fits the others and the data.

    Parameters
    ----------
    num_steps, batch_size, learning_rate, …
        See `marref.continuous.Config`; the defaults that differ are the demo's.
    patch_size, encoder_dim, encoder_layers, decoder_dim, decoder_layers, num_heads, mlp_ratio, \
    buffer_size, label_drop, diffusion_dim, diffusion_layers, diffusion_batch_mul, \
    noise_schedule, dropout
        See `marref.continuous.hyperparameters.Hyperparameters`.
    image_size, channels : int, optional
        ``None``: those of the data.
    pixel_mean, pixel_std : float, optional
        What pictures are scaled by; ``None``: see `marref.continuous.pixels.Scale.of`.
    validate_every, checkpoint_every : int, optional
        In steps.  ``None``: ten times in a run.
    keep : int
        How many checkpoints are kept, the newest; beside them the best by validation.
    validation_fraction : float
        How much of the data to set aside, in [0, 1); 0: no validation.
    num_shards, reduce
        As of `marref.training.config.Config`; with shards ``num_parts`` is nothing to them, and
        each has a mask ratio of its own.

    Raises
    ------
    TypeError, ValueError
        An option is of another type or outside its range.
    """

    kind: ClassVar[str] = "continuous"

    num_steps: int = 1500
    mask_schedule: str = "cosine"
    patch_size: int = 2
    encoder_dim: int = 64
    encoder_layers: int = 2
    decoder_dim: int = 64
    decoder_layers: int = 2
    num_heads: int = 4
    mlp_ratio: float = 4.0
    buffer_size: int = 8
    label_drop: float = 0.1
    diffusion_dim: int = 64
    diffusion_layers: int = 3
    diffusion_batch_mul: int = 2
    noise_schedule: str = "linear"
    dropout: float = 0.0
    image_size: int | None = None
    channels: int | None = None
    pixel_mean: float | None = None
    pixel_std: float | None = None
    validate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 3
    validation_fraction: float = 0.1
    num_shards: int | None = None
    reduce: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("validate_every", "checkpoint_every", "keep"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), 1)
        checks.real("validation_fraction", self.validation_fraction, "[0, 1)")
        if self.num_shards is not None:
            checks.integer("num_shards", self.num_shards, 1, self.batch_size)
        checks.choice("reduce", self.reduce, REDUCE)
        if self.pixel_mean is not None:
            checks.real("pixel_mean", self.pixel_mean, "(-inf, inf)")
        if self.pixel_std is not None:
            checks.real("pixel_std", self.pixel_std, "(0, inf)")
        self._model(self.image_size or self.patch_size, self.channels or 1, None)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "RunConfig":
        """Build one from what JSON or TOML hold; an unknown option names the nearest."""
        return discrete.from_options(cls, options)

    def resolved(self, dataset: Dataset) -> "RunConfig":
        """Fill in every ``None``."""
        codec, scale = square(dataset.codec), Scale.of(dataset)
        tenth = math.ceil(self.num_steps / 10)
        found: dict[str, Any] = {
            "warmup_steps": self.num_steps // 20,
            "image_size": codec.height,
            "channels": codec.channels,
            "pixel_mean": scale.mean,
            "pixel_std": scale.std,
            "validate_every": tenth,
            "checkpoint_every": tenth,
        }
        for name in ("image_size", "channels"):
            if getattr(self, name) not in (None, found[name]):
                raise ValueError(
                    f"{name}: received {getattr(self, name)}, expected {found[name]} as the data"
                )
        return discrete.filled(self, found)

    def model(self, vocab_size: int, num_classes: int | None = None) -> ContinuousMAR:
        """Build the model of a resolved config; the size of a vocabulary is nothing to it."""
        if self.image_size is None or self.channels is None:
            raise ValueError("image_size: received None, expected a config that is resolved")
        return self._model(self.image_size, self.channels, num_classes)

    def scale(self, codec: Codec) -> Scale:
        """Scale pictures as a resolved config says."""
        if self.pixel_mean is None or self.pixel_std is None:
            raise ValueError("pixel_mean: received None, expected a config that is resolved")
        return Scale(square(codec), self.pixel_mean, self.pixel_std)

    def _model(self, image_size: int, channels: int, num_classes: int | None) -> ContinuousMAR:
        own = {field.name for field in dataclasses.fields(ContinuousMAR)}
        options = {name: value for name, value in vars(self).items() if name in own}
        sizes = {"image_size": image_size, "channels": channels, "num_classes": num_classes}
        return ContinuousMAR(**options | sizes)


@dataclasses.dataclass(frozen=True)
class RunRecord(training.StepRecord):
    """What happened in one step of a run: a line of ``history.csv``.

    Parameters
    ----------
    validation_error : float or None
        After the step, where validation is due: the squared error of the loss on the pictures that
        were set aside, of the averaged parameters, under the same draws each time.
    """

    validation_error: float | None = None

    @property
    def validation(self) -> float | None:
        """What is best where it is least."""
        return self.validation_error


init = training.init


def step(
    config: RunConfig,
    model: ContinuousMAR,
    dataset: Dataset,
    state: State,
    number: int,
    processes: Ranks = ALONE,
) -> tuple[State, training.StepRecord]:
    """Take a step of a run; see `marref.training.loop.step`."""
    if config.num_shards is None:
        images, labels = _batch(config, model, dataset, config.batch_size, number)
        return training.step(config, model, images, labels, state)
    start = time.perf_counter()
    of_shard = functools.partial(_of_shard, config, model, dataset, state.params, number)
    tokens = config.batch_size * model.length
    features = config.batch_size * (model.buffer_size + model.length) * model.decoder_dim
    num_threads = processes.threads(None, features)
    with loop.divergence_named(number):
        losses, grads = processes.mean(
            of_shard,
            config.num_shards,
            state.params,
            num_threads=num_threads,
            reduce=config.reduce,
        )
        return training.update(config, state, grads, losses, start, tokens, num_threads)


def _of_shard(
    config: RunConfig, model: ContinuousMAR, dataset: Dataset, params: Tree, number: int, shard: int
) -> Share:
    """Compute the mean over a shard's rows of the loss, of its two parts."""
    parts = parallel.split(config.batch_size, config.num_shards or 1)
    count = parts[shard].stop - parts[shard].start
    images, labels = _batch(config, model, dataset, count, number, shard)
    rng = chance.generator(config.seed, "diffusion", number, shard)
    draws = model.draw(rng, count, mask_schedule=config.mask_schedule)
    grads, *losses = loss_and_grads(model, params, images, labels, draws, 1)
    return Share(count * draws["num_masked"], losses, grads)


def _batch(
    config: RunConfig, model: ContinuousMAR, dataset: Dataset, count: int, *numbers: int
) -> tuple[Array, Array]:
    """Draw pictures, and their labels, by the step and the shard if there are any."""
    index = dataset.draw_index(chance.generator(config.seed, "batch", *numbers), count)
    images = config.scale(dataset.codec).to_images(dataset.rows(index))
    return images, model.check_labels(dataset.labels_at(index), count)


def validation(
    config: RunConfig, model: ContinuousMAR, held_out: Dataset, index: Array, state: State
) -> float:
    """Measure the squared error on some pictures of a dataset; see `RunRecord`."""
    images = config.scale(held_out.codec).to_images(held_out.rows(index))
    labels = held_out.labels_at(index)

    def errors_of(repeat: int, start: int) -> Array:
        rows = slice(start, start + config.batch_size)
        rng = chance.generator(config.seed, "validation", repeat, start)
        draws = model.draw(rng, len(images[rows]), mask_schedule=config.mask_schedule)
        of_rows = None if labels is None else labels[rows]
        return _squared_errors(model, state, images[rows], of_rows, draws)

    starts = range(0, len(images), config.batch_size)
    batches = [(repeat, start) for repeat in range(VALIDATION_DRAWS) for start in starts]
    # Each batch is one thread's: the result does not depend on how many cores there are.
    with of_told_scale(), parallel.threads(parallel.num_cores()) as run:
        errors = run(errors_of, *zip(*batches, strict=True))
    return float(np.concatenate(errors).mean())


def _squared_errors(
    model: ContinuousMAR, state: State, images: Array, labels: Array | None, draws: dict[str, Any]
) -> Array:
    """Compute those of a batch row by row, without dropout and with all labels."""
    draws = {**draws, "label_dropped": np.zeros(len(images), np.bool_)}
    draws.pop("keep", None)
    output, rows, _ = loss.forward(model, state.averaged, images, labels, draws)
    process = diffusion.process(model.noise_schedule)
    errors, _, _ = diffusion.loss_forward(process, output, rows.clean, rows.time, rows.noise)
    return errors
