"""The rule of the decoder, as ``marref sample`` is told it."""

import argparse
from typing import Any

from marref import checks
from marref.cli import arguments
from marref.data.codecs import Codec
from marref.decoding import ORDERS, P2, REMASKS, REVEALS
from marref.schedules import SCHEDULES

# MaskGIT's published code; without noise the surest tokens come first, and in text these are
# blanks, until there is nothing else.
_CHOICE_TEMPERATURE = 4.5
_REVEAL = arguments.Named(REVEALS)
_REMASK = arguments.Named(REMASKS)


def add_arguments(sample: argparse.ArgumentParser) -> None:
    """Add the options that say what a step predicts, reveals and takes back."""
    add = sample.add_argument
    add("--temperature", type=arguments.real, default=1.0, help="default: 1; 0: no chance")
    add("--top-k", type=arguments.positive, help="draw from so many ids")
    add("--top-p", type=arguments.real, help="draw from the likeliest ids that have this share")
    add("--min-p", type=arguments.real, help="draw from ids with this part of the largest p")
    add(
        "--exclude-ids",
        type=arguments.integers,
        default=[],
        metavar="IDS",
        help="raw ids that are never drawn, numbered as in the data and in .npy files: 3,7,12",
    )
    add(
        "--choice-temperature",
        type=arguments.real,
        help=f"noise on confidence; default: {_CHOICE_TEMPERATURE} with --order confidence alone, "
        "without --order-temperature, --reveal and --remask",
    )
    add(
        "--order-temperature",
        type=arguments.real,
        help="draw positions from softmax(score / T); default: 0, the surest first",
    )
    add(
        "--score-temperature",
        type=arguments.real,
        help="of the confidence that orders positions; default: that of --temperature",
    )
    add(
        "--order",
        choices=ORDERS,
        help="default: that of --reveal (entropy-bounded: entropy, independent: random, others: "
        "confidence) or --remask (remdm: random, p2: confidence); else, with --choice-temperature "
        "or --order-temperature, confidence; else random",
    )
    add("--schedule", choices=tuple(SCHEDULES), help="default: cosine")
    add(
        "--reveal",
        type=_REVEAL,
        metavar="RULE",
        help=f"how many a step, instead of the schedule: {_REVEAL.described()}; the numbers are "
        "the defaults; threshold, factor and entropy-bounded take as many steps as they need",
    )
    add("--block-length", type=arguments.positive, help="fill blocks of so many from the left")
    add(
        "--remask",
        type=_REMASK,
        metavar="RULE",
        help=f"what is taken back: {_REMASK.described()}; may take more steps than blanks",
    )


def settings(parsed: argparse.Namespace, codec: Codec) -> dict[str, Any]:
    """Make arguments of `marref.iterative_decode` of what was said, and of what it implies."""
    order = _order(parsed)
    return {
        "temperature": parsed.temperature,
        "top_k": parsed.top_k,
        "top_p": parsed.top_p,
        "min_p": parsed.min_p,
        "exclude_ids": _excluded(parsed.exclude_ids, codec),
        "choice_temperature": _choice_temperature(parsed, order),
        "order_temperature": parsed.order_temperature or 0.0,
        "score_temperature": parsed.score_temperature,
        "order": order,
        "schedule": parsed.schedule or "cosine",
        "reveal": parsed.reveal,
        "block_length": parsed.block_length,
        "remask": parsed.remask,
    }


def _excluded(ids: list[int], codec: Codec) -> list[int]:
    """Make tokens of raw ids: one more, since token 0 is [MASK]."""
    if ids:
        checks.token_ids("--exclude-ids", ids, codec.num_ids, batched=False)
    if len(set(ids)) == codec.num_ids:
        raise ValueError(f"--exclude-ids: received all {len(set(ids))}, expected one to be left")
    return [raw + 1 for raw in ids]


def _order(parsed: argparse.Namespace) -> str:
    said: str | None = parsed.order
    for rule in (parsed.reveal, parsed.remask):
        said = said or getattr(rule, "order", None)
    scores = parsed.choice_temperature or parsed.order_temperature or isinstance(parsed.remask, P2)
    return said or ("confidence" if scores else "random")


def _choice_temperature(parsed: argparse.Namespace, order: str) -> float:
    if parsed.choice_temperature is not None:
        return float(parsed.choice_temperature)
    alone = not (parsed.order_temperature or parsed.reveal or parsed.remask)
    return _CHOICE_TEMPERATURE if alone and order == "confidence" else 0.0
