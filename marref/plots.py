"""The pictures of the demo and of runs (extra ``viz``: matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from marref import data, files
from marref.training import StepRecord
from marref.trees import Array

_MASKED_COLOUR = (0.86, 0.55, 0.38)
_GAP = 1


def loss(path: Path, history: Sequence[StepRecord], name: str, label: str) -> None:
    """Draw a loss of training, by its name, and its running mean; the learning rate below."""
    steps = [record.step for record in history]
    losses = np.array([getattr(record, name) for record in history])
    window = max(1, len(losses) // 20)
    means = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(steps, losses, color="0.8", linewidth=0.8, label="batch")
    upper.plot(steps[window - 1 :], means, color="C0", label=f"mean of {window}")
    upper.set_ylabel(label)
    upper.legend()
    lower.plot(steps, [record.learning_rate for record in history], color="C1")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    _write(path, figure)


def samples(path: Path, real: Array, generated: Array) -> None:
    """Draw real and generated images side by side, in two squares: of 100, ten in a row."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for axes, tokens, title in zip(
        figure.subplots(1, 2), (real, generated), ("real (held out)", "generated"), strict=True
    ):
        columns = int(np.ceil(np.sqrt(len(tokens))))
        rows = [_row(tokens[start : start + columns]) for start in range(0, len(tokens), columns)]
        _show(axes, np.concatenate(rows), title)
    _write(path, figure)


def unmasking(path: Path, tokens: Array, mask: Array) -> None:
    """Draw the decoder at work: a row a step, a column a sequence, masked pixels in colour.

    Parameters
    ----------
    path : pathlib.Path
    tokens, mask : arrays [num_steps, batch, length]
        As in the ``steps`` of `marref.iterative_decode`.  At most 12 steps are drawn.
    """
    shown = np.unique(np.linspace(0, len(tokens) - 1, 12).round().astype(int))
    picture = np.concatenate([_row(tokens[step], mask[step]) for step in shown])
    figure = Figure(figsize=(7, 0.75 * len(shown) + 0.5), layout="constrained")
    axes = figure.subplots()
    _show(axes, picture, "masked pixels in colour")
    height = data.DIGITS_SHAPE[0] + _GAP
    axes.set_yticks(
        [height * row + data.DIGITS_SHAPE[0] / 2 - 0.5 for row in range(len(shown))],
        [f"step {step + 1}: {1 - mask[step].mean():.0%}" for step in shown],
    )
    _write(path, figure)


def rules(path: Path, rows: dict[str, tuple[Array, Array]], num_stages: int) -> None:
    """Draw decoders beside each other: a row a rule, and in it the stages of each sequence.

    Parameters
    ----------
    path : pathlib.Path
    rows : dict
        Names of rules to tokens and mask [num_steps, batch, length], see `unmasking`.
    num_stages : int
        How many steps are drawn, evenly spread, the first and the last among them.
    """
    drawn, names = [], []
    for name, (tokens, mask) in rows.items():
        stages = np.linspace(0, len(tokens) - 1, num_stages).round().astype(int)
        images = [array[stages].swapaxes(0, 1) for array in (tokens, mask)]
        drawn.append(_row(*(array.reshape(-1, array.shape[-1]) for array in images)))
        names.append(f"{name} ({len(tokens)})")
    figure = Figure(figsize=(10.2, 0.47 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots()
    _show(axes, np.concatenate(drawn), "rules, and how many steps they took")
    height = data.DIGITS_SHAPE[0] + _GAP
    axes.set_yticks([height * (row + 0.5) - 1 for row in range(len(rows))], names)
    axes.tick_params(length=0)
    _write(path, figure)


def _row(tokens: Array, mask: Array | None = None) -> Array:
    """Images of tokens [count, length] beside each other, as RGB with a gap after each."""
    height, width = data.DIGITS_SHAPE
    ink = np.clip(tokens - 1, 0, None) / (data.DIGITS_VOCAB_SIZE - 2)
    pixels = np.repeat(1.0 - ink[..., np.newaxis], 3, axis=-1)
    if mask is not None:
        pixels[mask] = _MASKED_COLOUR
    images = pixels.reshape(len(tokens), height, width, 3)
    padded = np.pad(images, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=0.75)
    return np.concatenate(list(padded), axis=1)


def _show(axes: Any, picture: Array, title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write(path: Path, figure: Figure) -> None:
    FigureCanvasAgg(figure)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
