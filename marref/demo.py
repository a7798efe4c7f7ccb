"""The demo: train on 8x8 digits, measure, generate, and show how the decoder unmasks.

Everything that it does is the public face of marref; `run` is also an example of how to use it.
"""

import csv
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from marref import data, fast, files, training
from marref.fast import iterative_decode
from marref.model import MAR
from marref.training import StepRecord
from marref.trees import Array, Tree, flatten

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

MASK_RATIOS = (0.25, 0.5, 0.75, 1.0)
NUM_GENERATED = 64
_SHOWN_DIGITS = 3
_SHOWN_STEPS = 5
_INK = " .:-=+*#%@"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo trains and how it generates.

    Parameters
    ----------
    model : MAR
    num_steps, batch_size, learning_rate, warmup_steps, mask_schedule
        See `marref.training.train`.
    decode_steps, temperature, choice_temperature
        See `marref.decoding.iterative_decode`.
    """

    model: MAR
    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    mask_schedule: str
    decode_steps: int
    temperature: float
    choice_temperature: float


DEFAULT = Settings(
    model=MAR(
        vocab_size=data.DIGITS_VOCAB_SIZE,
        embed_dim=64,
        num_layers=3,
        num_heads=8,
        seq_len=64,
        dropout=0.0,
        gelu="tanh",
    ),
    num_steps=2000,
    batch_size=16,
    learning_rate=4e-3,
    warmup_steps=100,
    mask_schedule="uniform",
    decode_steps=64,
    temperature=0.7,
    choice_temperature=30.0,
)
QUICK = dataclasses.replace(DEFAULT, num_steps=30, warmup_steps=5, decode_steps=8)


def run(
    settings: Settings, out: Path, seed: int, echo: Callable[[str], None] = print
) -> dict[float, tuple[float, float]]:
    """Train, measure, generate, and write the results to a folder.

    Parameters
    ----------
    settings : Settings
    out : pathlib.Path
        Made if missing.  Receives ``parameters.npz``, ``history.csv`` and, with the ``viz``
        extra, ``loss.png``, ``samples.png`` and ``unmasking.png``.
    seed : int
        Of everything that is drawn.
    echo : callable
        Takes the lines of the report.

    Returns
    -------
    dict
        For every mask ratio of `MASK_RATIOS` the bits per token of the model and of the baseline.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    train_tokens, held_out = data.digits()
    model = settings.model
    params = model.init(rng, np.float32, std=model.embed_dim**-0.5)
    num_parameters = sum(leaf.size for leaf in flatten(params).values())
    echo(
        f"Training {num_parameters:,} parameters on {len(train_tokens)} digits of 8x8 pixels, "
        f"{settings.num_steps} steps of {settings.batch_size} sequences."
    )
    with _Progress(settings.num_steps, echo) as progress:
        params, history = training.train(
            model,
            params,
            train_tokens,
            num_steps=settings.num_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            mask_schedule=settings.mask_schedule,
            rng=rng,
            on_step=progress,
        )
    training.save_model(out / "parameters.npz", model, params)
    _write_history(out / "history.csv", history)

    bits = measure(model, params, train_tokens, held_out, seed)
    echo(f"\nHeld-out bits per masked token ({len(held_out)} digits):\n")
    echo("  mask ratio    marref    per-position frequencies")
    for ratio, (ours, baseline) in bits.items():
        echo(f"  {ratio:10.2f}    {ours:6.3f}    {baseline:6.3f}")

    names = ["parameters.npz", "history.csv"]
    generated, steps = _generate(settings, params, rng, echo)
    try:
        from marref import plots
    except ImportError:
        echo('No pictures: the viz extra, pip install ".[viz]", adds loss.png, samples.png and')
        echo("unmasking.png (matplotlib) and a progress bar (tqdm).")
    else:
        plots.loss(out / "loss.png", history)
        plots.samples(out / "samples.png", held_out[:NUM_GENERATED], generated)
        plots.unmasking(out / "unmasking.png", steps["tokens"][:, :8], steps["mask"][:, :8])
        names += ["loss.png", "samples.png", "unmasking.png"]
    echo(f"Wrote {', '.join(names)} to {out}.")
    return bits


def _generate(
    settings: Settings, params: Tree, rng: np.random.Generator, echo: Callable[[str], None]
) -> tuple[Array, dict[str, Array]]:
    """Generate digits, and show some of them while they are unmasked."""
    generated, steps = iterative_decode(
        settings.model,
        params,
        batch_size=NUM_GENERATED,
        num_steps=settings.decode_steps,
        temperature=settings.temperature,
        choice_temperature=settings.choice_temperature,
        rng=rng,
        return_steps=True,
    )
    stages = shown_stages(len(steps["tokens"]))
    numbers = ", ".join(str(stage + 1) for stage in stages)
    echo(f"\nGenerated digits, after steps {numbers} (? is [MASK]):\n")
    for digit in range(_SHOWN_DIGITS):
        echo(side_by_side([steps["tokens"][stage, digit] for stage in stages]) + "\n")
    return generated, steps


def measure(
    model: MAR,
    params: Tree,
    train_tokens: npt.ArrayLike,
    held_out: npt.ArrayLike,
    seed: int,
) -> dict[float, tuple[float, float]]:
    """Bits per masked token at `MASK_RATIOS`: the model's, and those of pixel frequencies.

    Both are measured at the same positions.
    """
    frequencies = training.position_log_frequencies(train_tokens, model.vocab_size)
    predict = functools.partial(fast.logits, model, params)

    def baseline(tokens: Array) -> Array:
        return np.broadcast_to(frequencies, (*tokens.shape, model.vocab_size))

    def bits(predict: Callable[[Array], Array], ratio: float) -> float:
        return training.bits_per_token(predict, held_out, ratio, np.random.default_rng(seed))

    return {ratio: (bits(predict, ratio), bits(baseline, ratio)) for ratio in MASK_RATIOS}


def shown_stages(num_steps: int) -> list[int]:
    """Pick the steps to show: evenly spread, the last among them."""
    return sorted({round(step) for step in np.linspace(0, num_steps - 1, _SHOWN_STEPS)})


def side_by_side(images: list[Array]) -> str:
    """Draw images of tokens in characters, two to a pixel: the darker, the more ink."""
    height, width = data.DIGITS_SHAPE
    levels = data.DIGITS_VOCAB_SIZE - 2
    characters = ["?", *(_INK[grey * (len(_INK) - 1) // levels] for grey in range(levels + 1))]
    drawn = [[characters[token] * 2 for token in image] for image in images]
    return "\n".join(
        "  | ".join("".join(pixels[row * width : (row + 1) * width]) for pixels in drawn).rstrip()
        for row in range(height)
    )


class _Progress:
    """A tqdm bar or, without tqdm, ten lines: loss (smoothed), learning rate, tokens a second."""

    def __init__(self, num_steps: int, echo: Callable[[str], None]) -> None:
        self._num_steps = num_steps
        self._echo = echo
        self._loss = float("nan")
        self._bar = tqdm(total=num_steps, unit="step") if tqdm else None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, record: StepRecord) -> None:
        first = record.step == 1
        self._loss = record.loss if first else 0.95 * self._loss + 0.05 * record.loss
        text = (
            f"loss {self._loss:.3f}, learning rate {record.learning_rate:.1e}, "
            f"{record.tokens_per_second:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif record.step * 10 // self._num_steps > (record.step - 1) * 10 // self._num_steps:
            self._echo(f"  step {record.step}/{self._num_steps}: {text}")


def _write_history(path: Path, history: list[StepRecord]) -> None:
    columns = [field.name for field in dataclasses.fields(StepRecord)]
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(dataclasses.astuple(record) for record in history)
