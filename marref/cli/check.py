"""``marref check``: hold every gradient to numerical derivatives."""

import argparse
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref check",
    "marref check --seed 1",
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
    check.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    import numpy as np

    from marref.verify import self_check

    print("Largest error of every gradient, relative to the largest entry of its part.\n")
    print(f"{'part':<14}{'gradient of':<38}{'shape':<10}{'complex step':>14}{'central':>10}")
    failed = 0
    worst = dict.fromkeys(self_check.BOUNDS, 0.0)
    for row in self_check.run(parsed.seed):
        failed += not row.passed
        worst = {m: float(np.maximum(worst[m], error)) for m, error in row.errors.items()}
        shape = "x".join(map(str, row.shape))
        print(
            f"{row.part:<14}{row.name:<38}{shape:<10}{row.errors['complex-step']:>14.1e}"
            f"{row.errors['central']:>10.1e}{'' if row.passed else '   FAILED'}"
        )
    print()
    for method, bound in self_check.BOUNDS.items():
        print(f"{method}: largest error {worst[method]:.1e}, allowed {bound:.0e}")
    print(f"{failed} failed" if failed else "all gradients agree")
    return 1 if failed else 0
