"""``marref check``: hold every gradient to numerical derivatives."""

import argparse
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref check",
    "marref check --seed 1",
    "marref check --continuous",
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    check = commands.add_parser(
        "check",
        help="hold every gradient to numerical derivatives",
        description="Hold every gradient to complex-step derivatives and central differences.",
        epilog=_EXAMPLES,
    )
    check.add_argument("--seed", type=arguments.not_negative, default=0, help="default: 0")
    check.add_argument(
        "--continuous", action="store_true", help="those of the model with continuous tokens"
    )
    check.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    import numpy as np

    from marref.verify import check_continuous, self_check

    run = check_continuous.run if parsed.continuous else self_check.run
    print("Largest error of every gradient, relative to the largest entry of its part.\n")
    print(f"{'part':<14}{'gradient of':<46}{'shape':<10}{'complex step':>14}{'central':>10}")
    failed = 0
    worst = dict.fromkeys(self_check.BOUNDS, 0.0)
    for row in run(parsed.seed):
        failed += not row.passed
        worst = {m: float(np.maximum(worst[m], error)) for m, error in row.errors.items()}
        shape = "x".join(map(str, row.shape))
        print(
            f"{row.part:<14}{row.name:<46}{shape:<10}{row.errors['complex-step']:>14.1e}"
            f"{row.errors['central']:>10.1e}{'' if row.passed else '   FAILED'}"
        )
    print()
    for method, bound in self_check.BOUNDS.items():
        print(f"{method}: largest error {worst[method]:.1e}, allowed {bound:.0e}")
    print(f"{failed} failed" if failed else "all gradients agree")
    return 1 if failed else 0
