"""The demo: train on 8x8 digits with their classes, measure, and generate a row of each digit.

Everything that it does is the public face of marref; `run` is also an example of how to use it.
"""

import csv
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from marref import chance, data, fast, files, training
from marref.data import Dataset
from marref.demo import quality
from marref.fast import iterative_decode
from marref.model import MAR
from marref.teach import watch
from marref.training import StepRecord, loop
from marref.training.config import Config
from marref.trees import Array, Tree, flatten

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

MASK_RATIOS = (0.25, 0.5, 0.75, 1.0)
NUM_CLASSES = 10
NUM_OF_EACH = 10
_SHOWN_DIGITS = 3
_SHOWN_STEPS = 5
_INK = " .:-=+*#%@"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo trains and how it generates.

    Parameters
    ----------
    config : Config
        Of the model and its training.
    decode_steps, temperature, guidance_scale
        See `marref.decoding.iterative_decode`; the order is random.
    """

    config: Config
    decode_steps: int
    temperature: float
    guidance_scale: float


DEFAULT = Settings(
    Config(
        embed_dim=48,
        num_layers=2,
        num_heads=4,
        dropout=0.0,
        gelu="tanh",
        num_steps=2000,
        batch_size=32,
        learning_rate=6e-3,
    ),
    decode_steps=64,
    temperature=1.0,
    guidance_scale=1.5,
)
QUICK = dataclasses.replace(
    DEFAULT, config=dataclasses.replace(DEFAULT.config, num_steps=30), decode_steps=8
)


def run(
    settings: Settings, out: Path, seed: int, echo: Callable[[str], None] = print
) -> dict[float, tuple[float, float]]:
    """Train, measure, generate, and write the results to a folder.

    Parameters
    ----------
    settings : Settings
    out : pathlib.Path
        Made if missing.  Receives ``parameters.npz``, ``history.csv``, ``decode.html`` and, with
        the ``viz`` extra, ``loss.png``, ``samples.png`` and ``unmasking.png``.
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
    train, held_out = digits()
    config = dataclasses.replace(settings.config, seed=seed).resolved(train)
    model = config.model(train.vocab_size, NUM_CLASSES)
    params, history = train_on(config, model, train, echo)
    training.save_model(out / "parameters.npz", model, params)
    write_history(out / "history.csv", history)
    watch.write(out / "decode.html", watched(model, params, held_out))

    bits = measure(model, params, train, held_out, seed)
    echo(f"\nHeld-out bits per masked token ({len(held_out)} digits):\n")
    echo("  mask ratio    marref    per-position frequencies")
    for ratio, (ours, baseline) in bits.items():
        echo(f"  {ratio:10.2f}    {ours:6.3f}    {baseline:6.3f}")

    names = ["parameters.npz", "history.csv", "decode.html"]
    generated, steps = generate(settings, model, params, seed)
    _show_steps(steps["tokens"], echo)
    judge(generated, train, held_out, seed, echo)
    try:
        from marref import plots
    except ImportError:
        echo('No pictures: the viz extra, pip install ".[viz]", adds loss.png, samples.png and')
        echo("unmasking.png (matplotlib) and a progress bar (tqdm).")
    else:
        plots.loss(out / "loss.png", history, *loop.PLOTTED)
        plots.samples(out / "samples.png", by_class(held_out), generated)
        first = slice(None, None, NUM_OF_EACH)
        plots.unmasking(out / "unmasking.png", steps["tokens"][:, first], steps["mask"][:, first])
        names += ["loss.png", "samples.png", "unmasking.png"]
    echo(f"Wrote {', '.join(names)} to {out}.")
    echo(f"To watch the model decode, open {out / 'decode.html'} in a browser.")
    return bits


def watched(model: MAR, params: Tree, held_out: Dataset) -> watch.Watched:
    """Tell what the live decoder shows: the model, and a held-out digit of each class."""
    firsts = by_class(held_out)[::NUM_OF_EACH]
    return watch.Watched(
        title="marref demo",
        model=model,
        params=params,
        codec=held_out.codec,
        length=held_out.length,
        classes=tuple(map(str, range(NUM_CLASSES))),
        examples={f"a real {digit}": tokens for digit, tokens in enumerate(firsts)},
        ink=True,
    )


def digits() -> tuple[Dataset, Dataset]:
    """Load the digits to train on and those that are held out, with their classes."""
    whole = data.load("digits")
    parts = zip(data.digits(), data.digit_labels(), strict=True)
    train, held_out = (
        dataclasses.replace(whole, tokens=tokens - 1, labels=labels) for tokens, labels in parts
    )
    return train, held_out


def train_on(
    config: Config, model: MAR, train: Dataset, echo: Callable[[str], None]
) -> tuple[Tree, list[StepRecord]]:
    """Return the average of the parameters after training, and the history of it."""
    state = loop.init(config, model)
    num_parameters = sum(leaf.size for leaf in flatten(state.params).values())
    echo(
        f"Training {num_parameters:,} parameters on {len(train)} digits of 8x8 pixels, "
        f"{config.num_steps} steps of {config.batch_size} sequences."
    )
    history = []
    with Progress(config.num_steps, echo) as progress:
        for number in range(config.num_steps):
            state, record = loop.step(config, model, train, state, number)
            history.append(record)
            progress(record)
    return state.averaged, history


def generate(
    settings: Settings, model: MAR, params: Tree, seed: int
) -> tuple[Array, dict[str, Array]]:
    """Generate `NUM_OF_EACH` digits of each class, one class after the other.

    Returns
    -------
    tokens : int64 array [NUM_CLASSES·NUM_OF_EACH, 64]
    steps : dict
        See `marref.decoding.iterative_decode`.
    """
    tokens, steps = iterative_decode(
        model,
        params,
        num_steps=settings.decode_steps,
        temperature=settings.temperature,
        order="random",
        labels=np.repeat(np.arange(NUM_CLASSES), NUM_OF_EACH),
        guidance_scale=settings.guidance_scale,
        rng=chance.generator(seed, "sample"),
        return_steps=True,
    )
    return tokens, steps


def _show_steps(tokens: Array, echo: Callable[[str], None]) -> None:
    """Show some digits while they are unmasked: tokens are [steps, digits, 64]."""
    stages = shown_stages(len(tokens))
    numbers = ", ".join(str(stage + 1) for stage in stages)
    echo(f"\nGenerated digits, after steps {numbers} (? is [MASK]):\n")
    for digit in range(_SHOWN_DIGITS):
        echo(side_by_side([tokens[stage, digit * NUM_OF_EACH] for stage in stages]) + "\n")


def judge(
    generated: Array, train: Dataset, held_out: Dataset, seed: int, echo: Callable[[str], None]
) -> tuple[float, quality.TwoSamples]:
    """Say whether the digits are what was asked for, and as diverse as real ones.

    Parameters
    ----------
    generated : integer array [NUM_CLASSES·NUM_OF_EACH, 64]
        Tokens, one class after the other.
    train, held_out : Dataset
    seed : int
    echo : callable

    Returns
    -------
    agreement : float
        How many are seen as what was asked for.
    statistic : quality.TwoSamples
    """
    examples, classes = rows_and_labels(train)
    real, real_classes = rows_and_labels(held_out)
    classify = functools.partial(
        quality.nearest_neighbour_classes, examples=examples, labels=classes
    )
    asked = np.repeat(np.arange(NUM_CLASSES), NUM_OF_EACH)
    agreement = float((classify(generated) == asked).mean())
    echo(
        f"A nearest-neighbour classifier sees the digit that was asked for in "
        f"{agreement:.0%} of {len(generated)};\n"
        f"of the held-out real ones it is right in {(classify(real) == real_classes).mean():.0%}."
    )
    rng = chance.generator(seed, "validation")
    found = quality.two_samples(generated, real, rng)
    others = examples[rng.choice(len(examples), len(generated), replace=False)]
    floor = quality.two_samples(others, real, rng)
    echo(
        f"Two-sample statistic (MMD², unbiased) against the held-out: {found.statistic:.4f}; of as "
        f"many real ones\nit is {floor.statistic:.4f}, and 0 ± {floor.noise:.4f} on average."
    )
    return agreement, found


def rows_and_labels(digits: Dataset) -> tuple[Array, Array]:
    """Read all digits, and their classes."""
    assert digits.labels is not None
    return digits.rows(np.arange(len(digits))), digits.labels


def by_class(digits: Dataset) -> Array:
    """Choose the first `NUM_OF_EACH` of each class, one class after the other."""
    rows, labels = rows_and_labels(digits)
    chosen = [np.flatnonzero(labels == label)[:NUM_OF_EACH] for label in range(NUM_CLASSES)]
    return rows[np.concatenate(chosen)]


def measure(
    model: MAR, params: Tree, train: Dataset, held_out: Dataset, seed: int
) -> dict[float, tuple[float, float]]:
    """Bits per masked token at `MASK_RATIOS`: the model's, and those of pixel frequencies.

    Both are measured at the same positions; the model is told the class.
    """
    examples, _ = rows_and_labels(train)
    real, classes = rows_and_labels(held_out)
    frequencies = training.position_log_frequencies(examples, model.vocab_size)
    predict = functools.partial(fast.logits, model, params)

    def baseline(tokens: Array, labels: Array) -> Array:
        return np.broadcast_to(frequencies, (*tokens.shape, model.vocab_size))

    def bits(predict: Callable[..., Array], ratio: float) -> float:
        rng = np.random.default_rng(seed)
        return training.bits_per_token(predict, real, ratio, rng, labels=classes)

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


class Progress:
    """A tqdm bar or, without tqdm, ten lines: losses (smoothed), learning rate, tokens a second.

    Parameters
    ----------
    num_steps : int
    echo : callable
    losses : sequence of str
        Which attributes of a record to show.
    """

    def __init__(
        self, num_steps: int, echo: Callable[[str], None], losses: Sequence[str] = ("loss",)
    ) -> None:
        self._num_steps = num_steps
        self._echo = echo
        self._smoothed = dict.fromkeys(losses, float("nan"))
        self._bar = tqdm(total=num_steps, unit="step") if tqdm else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, record: StepRecord) -> None:
        """Show a step."""
        for name, mean in self._smoothed.items():
            loss = getattr(record, name)
            self._smoothed[name] = loss if record.step == 1 else 0.95 * mean + 0.05 * loss
        losses = (f"{name.replace('_', ' ')} {mean:.3f}" for name, mean in self._smoothed.items())
        text = (
            f"{', '.join(losses)}, learning rate {record.learning_rate:.1e}, "
            f"{record.tokens_per_second:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif record.step * 10 // self._num_steps > (record.step - 1) * 10 // self._num_steps:
            self._echo(f"  step {record.step}/{self._num_steps}: {text}")


def write_history(path: Path, history: Sequence[StepRecord]) -> None:
    """Write a line of every step."""
    columns = [field.name for field in dataclasses.fields(history[0])]
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(dataclasses.astuple(record) for record in history)
