"""``marref train``: train on one's own data into a folder, from which a run goes on."""

import argparse
import dataclasses
import math
import sys
import time
import tomllib
import typing
from pathlib import Path
from typing import Any

from marref import data, files, training
from marref.cli import arguments
from marref.data.codecs import KINDS
from marref.training import models, runs
from marref.training.config import Config

_HELP = {
    "embed_dim": "width of the model",
    "num_layers": "blocks",
    "num_heads": "attention heads of a block",
    "dropout": "probability of dropout",
    "gelu": "erf or tanh",
    "positions": "layout of the position table",
    "seq_len": "the longest sequence",
    "num_steps": "steps of training",
    "batch_size": "sequences that are computed at once",
    "accumulate": "batches of a step",
    "learning_rate": "the peak",
    "warmup_steps": "steps to the peak",
    "weight_decay": "of AdamW",
    "decay": "what decays: matrices or all",
    "max_norm": "to which gradients are clipped",
    "label_drop": "share of the labels that are dropped, to train without a class too",
    "label_smoothing": "share of the uniform distribution in the targets",
    "average_decay": "of the average of the parameters; 0: none",
    "mask_schedule": "how mask ratios are drawn",
    "mask_per": "what has a mask ratio of its own: sequence or batch",
    "dtype": "float32 or float64",
    "seed": "of everything that is drawn",
    "validate_every": "in steps",
    "checkpoint_every": "in steps",
    "keep": "how many of the newest checkpoints are kept",
    "validation_fraction": "of the data, set aside; 0: no validation",
    "num_threads": "threads that share the work",
}
_OF_DATA = ("kind", "length", "num_ids", "tokenizer", "levels", "colour", "labels")
_EXAMPLES = arguments.examples(
    "marref train book.txt --out run",
    "marref train book.txt --out run --num-steps 500 --embed-dim 64 --length 64",
    "marref train digits --out run",
    "marref train pictures --out run --levels 8 --config options.toml",
    "marref train --out run --resume",
)
_SMOOTHING = 0.95


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    train = commands.add_parser(
        "train",
        help="train on your own data",
        description="Train a model on text, arrays of ids, images or digits, into a folder.",
        epilog=_EXAMPLES,
    )
    train.add_argument(
        "data", nargs="*", help="text files, or .npy, .npz, .bin, a folder of images, or digits"
    )
    train.add_argument("--out", required=True, type=Path, help="the folder of the run")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    train.add_argument("--config", type=Path, metavar="FILE.toml", help="options of training")
    source = train.add_argument_group("data")
    source.add_argument("--kind", help=f"what tokens are: {', '.join(KINDS)}")
    source.add_argument("--length", type=arguments.integer, help="of the windows of a stream")
    source.add_argument("--num-ids", type=arguments.integer, help="how many ids an array has")
    source.add_argument("--tokenizer", metavar="FILE.json", help="of the tokenizers package")
    source.add_argument("--levels", type=arguments.integer, help="of a channel of images")
    source.add_argument("--colour", action="store_true", default=None, help="read images in colour")
    source.add_argument("--labels", metavar="FILE", help="the class of every sequence, one a line")
    source.add_argument(
        "--no-labels", action="store_true", default=None, help="train without the data's classes"
    )
    options = train.add_argument_group("training, see docs/training.md")
    for field in dataclasses.fields(Config):
        default = "follows from the others" if field.default is None else field.default
        options.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_READERS[_type_of(field)],
            metavar=_type_of(field).__name__.upper(),
            help=f"{_HELP[field.name]}; default: {default}",
        )
    train.set_defaults(run=_run)


_READERS: dict[type, Any] = {int: arguments.integer, float: arguments.real, str: str}


def _type_of(field: dataclasses.Field[Any]) -> type:
    """Return int of ``int | None``, and so on."""
    types = typing.get_args(field.type) or (field.type,)
    return types[0]  # type: ignore[no-any-return]


def _run(parsed: argparse.Namespace) -> int:
    try:
        run = _resume(parsed) if parsed.resume else _start(parsed)
    except KeyboardInterrupt as error:
        _say_how_to_go_on(parsed.out, str(error))
        return 130
    except SystemExit:  # SIGTERM
        _say_how_to_go_on(parsed.out, "stopped")
        raise
    print(f"Done. Sample from it: marref sample {parsed.out}")
    validated = [r for r in run.history if r.validation_bits is not None]
    if validated:
        best = min(validated, key=lambda record: record.validation_bits or 0.0)
        print(f"Best validation: {best.validation_bits:.3f} bits per token, step {best.step}.")
    return 0


def _start(parsed: argparse.Namespace) -> runs.Run:
    if not parsed.data:
        raise ValueError("data: received none, expected a file, a folder or digits")
    given = {name: getattr(parsed, name) for name in _OF_DATA}
    config = Config.from_dict(_options(parsed))
    dataset = data.load(parsed.data if len(parsed.data) > 1 else parsed.data[0], **given)
    if parsed.no_labels:
        if parsed.labels is not None:
            raise ValueError("--no-labels: received with --labels, expected one of them")
        dataset = dataset.without_labels()
    config = config.resolved(dataset)
    _say_what(dataset, config, parsed.out)
    return runs.start(
        dataset,
        parsed.out,
        config,
        source=[_absolute(path) for path in parsed.data],
        labels=None if parsed.labels is None else _absolute(parsed.labels),
        on_step=_Progress(config.num_steps),
    )


def _resume(parsed: argparse.Namespace) -> runs.Run:
    names = [
        *_OF_DATA,
        "no_labels",
        *(field.name for field in dataclasses.fields(Config)),
        "config",
    ]
    for name in names:
        if getattr(parsed, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: received with --resume, which goes on with the "
                f"options in {parsed.out / 'config.json'}"
            )
    dataset = runs.read_dataset(parsed.out, parsed.data)
    config = Config.from_dict(runs.read_settings(parsed.out)["config"])
    _say_what(dataset, config, parsed.out)
    return runs.resume(parsed.out, dataset, on_step=_Progress(config.num_steps))


def _options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Take the options of the file and, over them, those of the command line."""
    options = {}
    if parsed.config is not None:
        files.regular(parsed.config)
        try:
            options = tomllib.loads(parsed.config.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{parsed.config}: is no TOML that can be read ({error})") from error
    names = [field.name for field in dataclasses.fields(Config)]
    given = {name: getattr(parsed, name) for name in names}
    return options | {name: value for name, value in given.items() if value is not None}


def _absolute(path: str) -> str:
    return path if path == "digits" else str(Path(path).absolute())


def _say_what(dataset: data.Dataset, config: Config, out: Path) -> None:
    model = config.model(dataset.vocab_size, dataset.num_classes)
    count = config.batch_size * config.accumulate
    print(
        f"Training {models.num_parameters(model):,} parameters (width {config.embed_dim}, "
        f"{config.num_layers} layers) into {out}: {config.num_steps:,} steps of {count} sequences."
    )
    what = "windows" if dataset.is_stream else "sequences"
    print(
        f"Data: {dataset.tokens.size:,} tokens of {dataset.codec.num_ids:,} kinds, "
        f"{len(dataset):,} {what} of {dataset.length}{_of_classes(dataset)}; "
        f"{config.validation_fraction:.0%} set aside for validation.",
        flush=True,
    )


def _of_classes(dataset: data.Dataset) -> str:
    return "" if dataset.num_classes is None else f" in {dataset.num_classes:,} classes"


def _say_how_to_go_on(out: Path, why: str) -> None:
    print(f"\n{why or 'stopped'}; go on with: marref train --out {out} --resume", flush=True)


class _Progress:
    """Says how training goes: in a terminal on one line, elsewhere on a new one a minute."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._rewrites = sys.stdout.isatty()
        self._interval = 0.2 if self._rewrites else 60.0
        self._started = self._said = time.monotonic()
        self._first: int | None = None
        self._loss = math.nan
        self._best = math.inf

    def __call__(self, record: runs.RunRecord) -> None:
        if self._first is None:
            self._first, self._loss = record.step, record.loss
        self._loss = _SMOOTHING * self._loss + (1.0 - _SMOOTHING) * record.loss
        now, is_last = time.monotonic(), record.step == self._num_steps
        if now - self._said >= self._interval or is_last:
            self._said = now
            end = "\x1b[K\r" if self._rewrites and not is_last else "\n"
            print(self._line(record, now), end=end, flush=True)
        if record.validation_bits is not None:
            self._say_validation(record.step, record.validation_bits)

    def _line(self, record: training.StepRecord, now: float) -> str:
        assert self._first is not None
        taken = record.step - self._first + 1
        left = (now - self._started) / taken * (self._num_steps - record.step)
        return (
            f"step {record.step:,}/{self._num_steps:,}: loss {self._loss:.3f}, "
            f"{self._loss / math.log(2):.3f} bits per token, "
            f"{record.tokens_per_second:,.0f} tokens/s, {_duration(left)} left"
        )

    def _say_validation(self, step: int, bits: float) -> None:
        is_best = bits < self._best
        self._best = min(bits, self._best)
        print(
            f"step {step:,}/{self._num_steps:,}: validation {bits:.3f} bits per token"
            f"{', the best so far' if is_best else ''}{self._erased}",
            flush=True,
        )

    @property
    def _erased(self) -> str:
        return "\x1b[K" if self._rewrites else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
