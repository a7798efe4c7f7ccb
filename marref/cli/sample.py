"""``marref sample``: generate from a run, or fill in the blanks of a text."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

import marref
from marref import chance, checks, data, files
from marref.cli import arguments, classes
from marref.cli.pictures import shown
from marref.data.codecs import Bytes, Characters, Codec, Pixels, Tokenizer
from marref.decoding import ORDERS
from marref.schedules import SCHEDULES
from marref.training import runs
from marref.training.checkpoints import Checkpoint
from marref.trees import Array

# MaskGIT's published code; without noise the surest tokens come first, and in text these are
# blanks, until there is nothing else.
_CHOICE_TEMPERATURE = 4.5
_SUFFIXES = (".npy", ".png", ".txt")
_EXAMPLES = arguments.examples(
    "marref sample run",
    "marref sample run --num 8 --steps 32 --temperature 0.8 --seed 1",
    'marref sample run --prompt "The quick ________ fox" --show-steps',
    "marref sample run --num 64 --out samples.png",
    "marref sample run --class 7 --guidance-scale 2",
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    sample = commands.add_parser(
        "sample",
        help="generate from a run, or fill in blanks",
        description="Generate with the best checkpoint of a run: one token a step, in random "
        "order, drawn from the model's own distribution, unless you say otherwise.",
        epilog=_EXAMPLES,
    )
    sample.add_argument("run_folder", metavar="RUN", type=Path, help="the folder of marref train")
    sample.add_argument("--num", type=arguments.positive, default=4, help="default: 4")
    sample.add_argument("--steps", type=arguments.positive, help="default: one a blank")
    sample.add_argument("--temperature", type=arguments.real, default=1.0, help="default: 1")
    sample.add_argument(
        "--choice-temperature",
        type=arguments.real,
        help=f"noise on confidence; default: {_CHOICE_TEMPERATURE} with --order confidence",
    )
    sample.add_argument(
        "--order", choices=ORDERS, help="default: random; with --choice-temperature: confidence"
    )
    sample.add_argument("--schedule", choices=tuple(SCHEDULES), default="cosine")
    sample.add_argument("--seed", type=arguments.not_negative, default=0, help="default: 0")
    sample.add_argument(
        "--prompt", metavar="TEXT", help=r"text with a _ for each token to fill in; \_ is a _"
    )
    sample.add_argument(
        "--out", type=Path, metavar="FILE", help="raw ids to .npy, pictures to .png, text to .txt"
    )
    classes.add_arguments(sample)
    sample.add_argument("--show-steps", action="store_true", help="print every step, blanks as _")
    sample.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    checkpoint = runs.best(parsed.run_folder)
    codec = data.codec_from_dict(checkpoint.codec)
    _check_out(parsed.out, codec)
    settings = runs.read_settings(parsed.run_folder)
    length = settings["data"]["length"]
    labels = classes.drawn(parsed, runs.classes_of(settings))
    start = np.zeros(length, np.int64)
    if parsed.prompt is not None:
        start = prompt_tokens(parsed.prompt, codec, length)
    generated = []
    for index in range(parsed.num):
        tokens, steps = _sample(checkpoint, start, labels[index], index, parsed)
        generated.append(tokens)
        if parsed.show_steps:
            for number, stage in enumerate(steps["tokens"][:, 0], 1):
                print(f"--- {index + 1}, step {number}/{len(steps['tokens'])}")
                print(shown(codec, stage))
        elif parsed.out is None:
            print(f"--- {index + 1}")
            print(shown(codec, tokens), flush=True)
    if parsed.out is not None:
        _write(parsed.out, codec, np.stack(generated))
        print(f"Wrote {parsed.num} to {parsed.out}.")
    return 0


def _sample(
    checkpoint: Checkpoint,
    start: Array,
    label: int | None,
    index: int,
    parsed: argparse.Namespace,
) -> tuple[Array, dict[str, Array]]:
    """Generate one sequence, which depends on its number and not on how many there are."""
    order = parsed.order or ("confidence" if parsed.choice_temperature else "random")
    noise = parsed.choice_temperature
    if noise is None:
        noise = _CHOICE_TEMPERATURE if order == "confidence" else 0.0
    tokens, steps = marref.iterative_decode(
        checkpoint.model,
        checkpoint.state.averaged,
        tokens=start[np.newaxis],
        num_steps=parsed.steps or int((start == 0).sum()),
        temperature=parsed.temperature,
        choice_temperature=noise,
        order=order,
        schedule=parsed.schedule,
        labels=None if label is None else [label],
        guidance_scale=parsed.guidance_scale,
        guidance=parsed.guidance,
        rng=chance.generator(parsed.seed, "sample", index),
        return_steps=True,
    )
    return tokens[0], steps


def prompt_tokens(prompt: str, codec: Codec, length: int) -> Array:
    r"""Make tokens of a text in which every ``_`` is a token to fill in, and ``\_`` a ``_``."""
    if not isinstance(codec, Bytes | Characters | Tokenizer):
        raise ValueError(f"--prompt: received for {codec.kind}, expected a run on text")
    parts = []
    for part in re.findall(r"(?:\\_|[^_])+|_", prompt):
        if part == "_":
            parts.append(np.zeros(1, np.int64))
        else:
            try:
                parts.append(codec.encode(part.replace(r"\_", "_")))
            except ValueError as error:
                raise ValueError(f"--prompt: {error}") from error
    tokens = np.concatenate(parts) if parts else np.ones(0, np.int64)
    if not (tokens == 0).any():
        raise ValueError("--prompt: has no _, expected one for each token to fill in")
    if len(tokens) > length:
        raise ValueError(f"--prompt: has {len(tokens)} tokens, expected at most {length}")
    return tokens


def _check_out(out: Path | None, codec: Codec) -> None:
    if out is None:
        return
    checks.choice("--out: suffix", out.suffix, _SUFFIXES)
    if not out.parent.is_dir():
        raise ValueError(f"--out: received {out}, whose folder does not exist")
    is_text = isinstance(codec, Bytes | Characters | Tokenizer)
    fits = {".npy": True, ".png": isinstance(codec, Pixels), ".txt": is_text}
    if not fits[out.suffix]:
        raise ValueError(f"--out: received {out} for {codec.kind}, expected .npy")
    if out.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ImportError('--out: .png needs the viz extra: pip install ".[viz]"') from None


def _write(out: Path, codec: Codec, tokens: Array) -> None:
    if out.suffix == ".png":
        from marref import plots

        plots.grid(out, codec.decode(tokens))
        return
    with files.replacing(out) as temporary:
        if out.suffix == ".txt":
            temporary.write_text("\n".join(codec.decode(tokens)) + "\n", "utf-8")
        else:
            with temporary.open("wb") as file:
                np.save(file, tokens - 1)
