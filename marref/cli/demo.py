"""``marref demo``: train on the digits that ship, and generate new ones."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref demo",
    "marref demo --quick --out digits",
    "marref demo --continuous",
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    demo = commands.add_parser(
        "demo",
        help="train on 8x8 digits and generate new ones",
        description="Train on 8x8 digits, measure on held-out ones, generate a row of each, and "
        "write a page that decodes in a browser.",
        epilog=_EXAMPLES,
    )
    demo.add_argument("--steps", type=arguments.positive, help="number of training steps")
    demo.add_argument("--seed", type=arguments.not_negative, default=0, help="default: 0")
    demo.add_argument(
        "--out", type=Path, default=Path("marref-demo"), help="folder, default: marref-demo"
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    demo.add_argument(
        "--continuous",
        action="store_true",
        help="the paper's own model: tokens are patches of 2x2 grey values, learnt by diffusion",
    )
    demo.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from marref import demo
    from marref.demo import continuous

    which: Any = continuous if parsed.continuous else demo
    settings = which.QUICK if parsed.quick else which.DEFAULT
    if parsed.steps is not None:
        config = dataclasses.replace(settings.config, num_steps=parsed.steps)
        settings = dataclasses.replace(settings, config=config)
    which.run(settings, parsed.out, parsed.seed)
    return 0
