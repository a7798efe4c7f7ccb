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

from marref import data, files
from marref.cli import arguments
from marref.continuous.run import RunConfig
from marref.data.codecs import KINDS
from marref.training import models, ranks, runs
from marref.training.config import AnyConfig, Config, from_told, kind_of
from marref.training.loop import RunRecord
from marref.training.ranks import Ranks

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
    "decay": "what decays: matrices or all; published or kernels",
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
    "num_shards": "parts of a step that processes share, 8 under mpiexec; see docs/scaling.md",
    "reduce": "how shards are added: exact or fast",
    "schedule": "of the learning rate: constant or cosine",
    "average_warmup": "whether the average is short at first: true or false",
    "num_parts": "parts of a batch, which cores share",
    "patch_size": "a token is so many pixels high and wide",
    "encoder_dim": "width of the encoder",
    "encoder_layers": "blocks of the encoder",
    "decoder_dim": "width of the decoder",
    "decoder_layers": "blocks of the decoder",
    "mlp_ratio": "hidden features over the width",
    "buffer_size": "places before the tokens that hold the class",
    "diffusion_dim": "width of the diffusion network",
    "diffusion_layers": "blocks of the diffusion network",
    "diffusion_batch_mul": "noises that each token is trained with in a step",
    "noise_schedule": "cosine or linear",
    "image_size": "height and width of a picture",
    "channels": "1 or 3",
    "pixel_mean": "what is taken off the levels of pixels",
    "pixel_std": "what they are then divided by",
}
_OF_DATA = ("kind", "length", "num_ids", "tokenizer", "levels", "colour", "labels")
_EXAMPLES = arguments.examples(
    "marref train book.txt --out run",
    "marref train book.txt --out run --num-steps 500 --embed-dim 64 --length 64",
    "marref train digits --out run",
    "marref train pictures --out run --levels 8 --config options.toml",
    "marref train pictures --continuous --out run",
    "marref train --out run --resume",
)
_SMOOTHING = 0.95
_LEVELS = 256
_FIELDS = {field.name: field for kind in (Config, RunConfig) for field in dataclasses.fields(kind)}


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
    train.add_argument(
        "--continuous",
        action="store_true",
        default=None,
        help="train the model of continuous tokens, on pictures",
    )
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
    own = train.add_argument_group("with --continuous only, see docs/continuous.md")
    of_discrete = {field.name for field in dataclasses.fields(Config)}
    for name, field in _FIELDS.items():
        group = options if name in of_discrete else own
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=_READERS[_type_of(field)],
            metavar=_type_of(field).__name__.upper(),
            help=f"{_HELP[name]}; default: {_default_of(name)}",
        )
    train.set_defaults(run=_run)


def _default_of(name: str) -> str:
    """Say what holds where nothing is said, of both kinds where they differ."""
    defaults = [
        "follows from the others" if field.default is None else str(field.default)
        for kind in (Config, RunConfig)
        for field in dataclasses.fields(kind)
        if field.name == name
    ]
    return ", with --continuous ".join(dict.fromkeys(defaults))


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"received {text!r}, expected true or false")
    return text == "true"


_READERS: dict[type, Any] = {
    int: arguments.integer,
    float: arguments.real,
    str: str,
    bool: _truth,
}


def _type_of(field: dataclasses.Field[Any]) -> type:
    """Return int of ``int | None``, and so on."""
    types = typing.get_args(field.type) or (field.type,)
    return types[0]  # type: ignore[no-any-return]


def _run(parsed: argparse.Namespace) -> int:
    processes = ranks.world()
    train = _resume if parsed.resume else _start
    try:
        with processes.ending_together():
            run = train(parsed, processes)
    except KeyboardInterrupt as error:
        if processes.is_first:
            _say_how_to_go_on(parsed.out, str(error))
        return 130
    except SystemExit:  # SIGTERM
        if processes.is_first:
            _say_how_to_go_on(parsed.out, "stopped")
        raise
    if processes.is_first:
        _say_the_end(parsed.out, run)
    return 0


def _say_the_end(out: Path, run: runs.Run) -> None:
    print(f"Done. Sample from it: marref sample {out}")
    validated = [(r.validation, r.step) for r in run.history if r.validation is not None]
    if validated:
        best, step = min(validated)
        print(f"Best validation: {_measure(run.history[-1], best)}, step {step}.")


def _measure(record: runs.AnyRecord, validation: float) -> str:
    if isinstance(record, RunRecord):
        return f"{validation:.3f} bits per token"
    return f"squared error {validation:.4f}"


def _start(parsed: argparse.Namespace, processes: Ranks) -> runs.Run:
    if not parsed.data:
        raise ValueError("data: received none, expected a file, a folder or digits")
    given = {name: getattr(parsed, name) for name in _OF_DATA}
    config = kind_of("continuous" if parsed.continuous else "discrete").from_dict(_options(parsed))
    if processes is not ranks.ALONE and config.num_shards is None:
        sequences = config.batch_size * getattr(config, "accumulate", 1)
        config = dataclasses.replace(config, num_shards=min(ranks.DEFAULT_SHARDS, sequences))
    is_folder = parsed.data[0] != "digits" and Path(parsed.data[0]).is_dir()
    if parsed.continuous and is_folder and parsed.levels is None:
        given["levels"] = _LEVELS
    dataset = data.load(parsed.data if len(parsed.data) > 1 else parsed.data[0], **given)
    if parsed.no_labels:
        if parsed.labels is not None:
            raise ValueError("--no-labels: received with --labels, expected one of them")
        dataset = dataset.without_labels()
    config = config.resolved(dataset)
    _say_what(dataset, config, parsed.out, processes)
    return runs.start(
        dataset,
        parsed.out,
        config,
        source=[_absolute(path) for path in parsed.data],
        labels=None if parsed.labels is None else _absolute(parsed.labels),
        on_step=_progress(config, processes),
        processes=processes,
    )


def _resume(parsed: argparse.Namespace, processes: Ranks) -> runs.Run:
    names = [
        *_OF_DATA,
        "no_labels",
        *_FIELDS,
        "config",
        "continuous",
    ]
    for name in names:
        if getattr(parsed, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: received with --resume, which goes on with the "
                f"options in {parsed.out / 'config.json'}"
            )
    dataset = runs.read_dataset(parsed.out, parsed.data)
    config = from_told(runs.read_settings(parsed.out))
    _say_what(dataset, config, parsed.out, processes)
    on_step = _progress(config, processes)
    return runs.resume(parsed.out, dataset, on_step=on_step, processes=processes)


def _progress(config: AnyConfig, processes: Ranks) -> "_Progress | None":
    return _Progress(config.num_steps) if processes.is_first else None


def _options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Take the options of the file and, over them, those of the command line."""
    options = {}
    if parsed.config is not None:
        files.regular(parsed.config)
        try:
            options = tomllib.loads(parsed.config.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{parsed.config}: is no TOML that can be read ({error})") from error
    given = {name: getattr(parsed, name) for name in _FIELDS}
    return options | {name: value for name, value in given.items() if value is not None}


def _absolute(path: str) -> str:
    return path if path == "digits" else str(Path(path).absolute())


def _say_what(dataset: data.Dataset, config: AnyConfig, out: Path, processes: Ranks) -> None:
    processes.warn_if_crowded(getattr(config, "num_threads", None) or 1)
    if not processes.is_first:
        return
    model = config.model(dataset.vocab_size, dataset.num_classes)
    if isinstance(config, Config):
        width, layers = config.embed_dim, str(config.num_layers)
        count = config.batch_size * config.accumulate
    else:
        width, count = config.encoder_dim, config.batch_size
        layers = f"{config.encoder_layers} + {config.decoder_layers}"
    print(
        f"Training {models.num_parameters(model):,} parameters (width {width}, {layers} layers) "
        f"into {out}: {config.num_steps:,} steps of {count} sequences."
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

    def __call__(self, record: runs.AnyRecord) -> None:
        loss = record.loss if isinstance(record, RunRecord) else record.squared_error
        if self._first is None:
            self._first, self._loss = record.step, loss
        self._loss = _SMOOTHING * self._loss + (1.0 - _SMOOTHING) * loss
        now, is_last = time.monotonic(), record.step == self._num_steps
        if now - self._said >= self._interval or is_last:
            self._said = now
            end = "\x1b[K\r" if self._rewrites and not is_last else "\n"
            print(self._line(record, now), end=end, flush=True)
        if record.validation is not None:
            self._say_validation(record, record.validation)

    def _line(self, record: runs.AnyRecord, now: float) -> str:
        assert self._first is not None
        taken = record.step - self._first + 1
        left = (now - self._started) / taken * (self._num_steps - record.step)
        if isinstance(record, RunRecord):
            told = f"loss {self._loss:.3f}, {self._loss / math.log(2):.3f} bits per token"
        else:
            told = f"squared error {self._loss:.3f}, bound {record.bound:.3f} bits"
        return (
            f"step {record.step:,}/{self._num_steps:,}: {told}, "
            f"{record.tokens_per_second:,.0f} tokens/s, {_duration(left)} left"
        )

    def _say_validation(self, record: runs.AnyRecord, validation: float) -> None:
        is_best = validation < self._best
        self._best = min(validation, self._best)
        print(
            f"step {record.step:,}/{self._num_steps:,}: validation {_measure(record, validation)}"
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
