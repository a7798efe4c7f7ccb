"""``marref sample``: generate from a run, or fill in the blanks of a text."""

import argparse
import functools
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

import marref
from marref import chance, checks, data, files
from marref.cli import arguments, classes, continuous, drawing, prompts, rules
from marref.cli.pictures import shown
from marref.continuous.run import RunConfig
from marref.data.codecs import Bytes, Characters, Codec, Pixels, Tokenizer
from marref.model import MAR
from marref.training import pool, runs
from marref.training.checkpoints import Checkpoint, discrete
from marref.trees import Array, Tree

_SUFFIXES = (".npy", ".png", ".txt")
_EXAMPLES = arguments.examples(
    "marref sample run",
    "marref sample run --num 8 --steps 32 --temperature 0.8 --seed 1",
    "marref sample run --reveal threshold:0.8 --block-length 16",
    "marref sample run --remask remdm-loop --steps 1000",
    'marref sample run --prompt "The quick ________ fox" --show-steps',
    "marref sample run --num 64 --out samples.png --gif unmasking.gif",
    "marref sample run --prompt picture-with-a-hole.png --num 16 --out filled.png",
    "marref sample run --class 7 --guidance-scale 2",
    "marref sample continuous-run --num 64 --out samples.png --diffusion-steps 25",
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
    sample.add_argument(
        "--steps",
        type=arguments.positive,
        help="default: one a blank, 16 of a run with --continuous",
    )
    rules.add_arguments(sample)
    arguments.add_processes(sample)
    sample.add_argument("--seed", type=arguments.not_negative, default=0, help="default: 0")
    sample.add_argument(
        "--prompt",
        help=r"text with a _ for each token to fill in, \_ is a _; of pictures a .png whose "
        "transparent pixels are, of ids an .npy with -1 where one is",
    )
    sample.add_argument(
        "--out", type=Path, metavar="FILE", help="raw ids to .npy, pictures to .png, text to .txt"
    )
    sample.add_argument(
        "--show-steps",
        action="store_true",
        help="print every step, blanks as _; with --out FILE.png draw them, a row a step",
    )
    sample.add_argument("--gif", type=Path, metavar="FILE", help="show pictures being unmasked")
    classes.add_arguments(sample)
    continuous.add_arguments(sample)
    sample.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    with pool.workers(parsed.processes) as (is_first, executor):
        if is_first:
            _generate(parsed, executor)
    return 0


def _generate(parsed: argparse.Namespace, executor: Executor | None) -> None:
    checkpoint = runs.best(parsed.run_folder)
    codec = data.codec_from_dict(checkpoint.codec)
    if codec.num_ids + 1 != checkpoint.vocab_size:
        raise ValueError(
            f"codec: {codec.kind} has {codec.num_ids} ids, expected {checkpoint.vocab_size - 1} as "
            "the model"
        )
    _check_out(parsed.out, codec)
    _check_gif(parsed.gif, codec)
    settings = runs.read_settings(parsed.run_folder)
    labels = classes.drawn(parsed, runs.classes_of(settings))
    if isinstance(checkpoint.config, RunConfig):
        tokens = continuous.sample(parsed, checkpoint, codec, labels, executor)
        for index, picture in enumerate(tokens):
            _say(picture[np.newaxis], index, codec, parsed)
        stages = tokens[np.newaxis]
    else:
        length = settings["data"]["length"]
        stages = _sequences(parsed, checkpoint, codec, length, labels, executor)
    _write(stages, codec, parsed)


def _sequences(
    parsed: argparse.Namespace,
    checkpoint: Checkpoint,
    codec: Codec,
    length: int,
    labels: list[int | None],
    executor: Executor | None,
) -> Array:
    """Generate with discrete MAR: [steps, num, length], all steps or the last."""
    continuous.check_discrete(parsed)
    _, model = discrete(checkpoint, "sample")
    start = np.zeros(length, np.int64)
    if parsed.prompt is not None:
        start = prompts.read(parsed.prompt, codec, length)
    options = rules.settings(parsed, codec)
    params = checkpoint.state.averaged
    sample = functools.partial(_sample, model, params, start, labels, parsed, options)
    drawn = []
    for index, stages in enumerate(pool.in_order(sample, range(parsed.num), executor)):
        _say(stages, index, codec, parsed)
        drawn.append(stages if parsed.gif or _draws_steps(parsed) else stages[-1:])
    return _together(drawn)


def _sample(
    model: MAR,
    params: Tree,
    start: Array,
    labels: list[int | None],
    parsed: argparse.Namespace,
    options: dict[str, Any],
    index: int,
) -> Array:
    """Generate one sequence, which depends on its number and not on how many there are.

    Returns
    -------
    int64 array [1 + steps, length]
        What it starts from, and the tokens after every step.
    """
    label = labels[index]
    _, steps = marref.iterative_decode(
        model,
        params,
        tokens=start[np.newaxis],
        num_steps=parsed.steps or int((start == 0).sum()),
        labels=None if label is None else [label],
        guidance_scale=parsed.guidance_scale,
        guidance=parsed.guidance,
        rng=chance.generator(parsed.seed, "sample", index),
        return_steps=True,
        **options,
    )
    return np.concatenate([start[np.newaxis], steps["tokens"][:, 0]])


def _together(drawn: list[Array]) -> Array:
    """Make [steps, num, length] of samples [steps, length]: those with fewer steps stay at last."""
    most = max(map(len, drawn))
    return np.stack(
        [np.pad(stages, ((0, most - len(stages)), (0, 0)), "edge") for stages in drawn], axis=1
    )


def _draws_steps(parsed: argparse.Namespace) -> bool:
    return parsed.show_steps and parsed.out is not None and parsed.out.suffix == ".png"


def _say(stages: Array, index: int, codec: Codec, parsed: argparse.Namespace) -> None:
    """Print a sample, or its steps, unless it is written to a file."""
    if parsed.show_steps and not _draws_steps(parsed):
        for number, stage in enumerate(stages[1:], 1):
            print(f"--- {index + 1}, step {number}/{len(stages) - 1}")
            print(shown(codec, stage), flush=True)
    elif parsed.out is None and parsed.gif is None:
        print(f"--- {index + 1}")
        print(shown(codec, stages[-1]), flush=True)


def _check_out(out: Path | None, codec: Codec) -> None:
    if out is None:
        return
    _check_name("--out", out, _SUFFIXES)
    is_text = isinstance(codec, Bytes | Characters | Tokenizer)
    fits = {".npy": True, ".png": isinstance(codec, Pixels), ".txt": is_text}
    if not fits[out.suffix]:
        raise ValueError(f"--out: received {out} for {codec.kind}, expected .npy")
    if out.suffix == ".png":
        drawing.check_installed("--out: .png")


def _check_gif(gif: Path | None, codec: Codec) -> None:
    if gif is None:
        return
    _check_name("--gif", gif, (".gif",))
    if not isinstance(codec, Pixels):
        raise ValueError(f"--gif: received for {codec.kind}, expected a run on pictures")
    drawing.check_installed("--gif")


def _check_name(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    checks.choice(f"{option}: suffix", path.suffix, suffixes)
    arguments.check_folder(option, path)


def _write(stages: Array, codec: Codec, parsed: argparse.Namespace) -> None:
    """Write the files that are asked for: stages are [steps, num, length]."""
    if parsed.out is not None and parsed.out.suffix == ".png":
        assert isinstance(codec, Pixels)
        if parsed.show_steps:
            drawing.unmasking(parsed.out, codec, stages)
        else:
            drawing.grid(parsed.out, codec, stages[-1])
    elif parsed.out is not None:
        with files.replacing(parsed.out) as temporary:
            if parsed.out.suffix == ".txt":
                temporary.write_text("\n".join(codec.decode(stages[-1])) + "\n", "utf-8")
            else:
                with temporary.open("wb") as file:
                    np.save(file, stages[-1] - 1)
    if parsed.gif is not None:
        assert isinstance(codec, Pixels)
        drawing.animation(parsed.gif, codec, stages)
    for path in (parsed.out, parsed.gif):
        if path is not None:
            print(f"Wrote {parsed.num} to {path}.")
