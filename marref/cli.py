"""The command line: ``marref demo``, ``check``, ``golden`` and ``compare``."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    0: success; 1: a check failed, or a comparison differs; 2: it could not be done.
    """
    parser = argparse.ArgumentParser(
        prog="marref", description="The NumPy reference implementation of MAR."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_check, _add_golden, _add_compare):
        add(commands)
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"marref: {error}", file=sys.stderr)
        return 2
    return status


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train on 8x8 digits and generate new ones",
        description="Train on 8x8 digits, measure on held-out ones, and generate new ones.",
    )
    demo.add_argument("--steps", type=_positive, help="number of training steps")
    demo.add_argument("--seed", type=_not_negative, default=0, help="default: 0")
    demo.add_argument(
        "--out", type=Path, default=Path("marref-demo"), help="folder, default: marref-demo"
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    demo.set_defaults(run=_demo)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="hold every gradient to numerical derivatives",
        description="Hold every gradient to complex-step derivatives and central differences.",
    )
    check.add_argument("--seed", type=_not_negative, default=0, help="default: 0")
    check.set_defaults(run=_check)


def _add_golden(commands: Any) -> None:
    golden = commands.add_parser(
        "golden",
        help="write golden vectors for another implementation",
        description="Write everything that it takes to check an implementation to one file.",
    )
    golden.add_argument(
        "out", help="file to write: .safetensors or .npz; with --where: tiny, which ships"
    )
    golden.add_argument("--where", action="store_true", help="print where the shipped file is")
    golden.add_argument("--preset", choices=("tiny", "small"), default="tiny")
    golden.add_argument(
        "--config", help='hyper-parameters to change, as JSON: \'{"gelu": "tanh"}\''
    )
    golden.add_argument("--seed", type=_not_negative, default=0, help="default: 0")
    golden.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    own = golden.add_argument_group("of a model of your own")
    own.add_argument("--params", metavar="FILE", help="its parameters, in place of a preset's")
    own.add_argument("--names", help="of the parameters: torch, flax, axon, or a JSON file")
    own.add_argument(
        "--tokens", metavar="FILE", help="a batch: .npy, or .npz with tokens and, if given, mask"
    )
    own.add_argument(
        "--activations", nargs="+", default=("*",), metavar="PATTERN", help="keep these only"
    )
    golden.set_defaults(run=_golden)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="find where an implementation first differs from golden vectors",
        description="Compare arrays with golden vectors, within derived budgets of rounding.",
    )
    compare.add_argument("golden", help="golden vectors: a file, or tiny, which ships")
    compare.add_argument(
        "yours", nargs="+", help=".npz or .safetensors files, or folders of these or .npy files"
    )
    compare.add_argument(
        "--dtype",
        help="your precision, if your arrays do not say it: float64, float32, float16, bfloat16, "
        "or tf32, fp16-mixed, bf16-mixed (in matrix products only)",
    )
    compare.add_argument(
        "--names",
        help="torch, flax, axon, a JSON file (your names -> ours), or auto: by the parameters",
    )
    compare.add_argument("--write-names", metavar="FILE", help="with --names auto: keep the map")
    compare.add_argument(
        "--diagnose", action="store_true", help="name the known mistakes that explain it"
    )
    compare.add_argument(
        "--fail-fast", action="store_true", help="stop at the first stage that differs"
    )
    compare.add_argument("--json", action="store_true", help="for machines")
    compare.set_defaults(run=_compare)


def _demo(arguments: argparse.Namespace) -> int:
    from marref import demo

    settings = demo.QUICK if arguments.quick else demo.DEFAULT
    if arguments.steps is not None:
        settings = dataclasses.replace(
            settings,
            num_steps=arguments.steps,
            warmup_steps=min(settings.warmup_steps, arguments.steps - 1),
        )
    demo.run(settings, arguments.out, arguments.seed)
    return 0


def _golden(arguments: argparse.Namespace) -> int:
    from marref import files
    from marref.verify import checkpoint, golden

    if arguments.where:
        print(golden.shipped(arguments.out))
        return 0
    files.check_suffix("out", arguments.out)
    config = json.loads(arguments.config or "{}")
    if arguments.params:
        model, params, batch, notes = checkpoint.load(
            arguments.params,
            names_of=arguments.names,
            config=config,
            tokens=arguments.tokens,
            seed=arguments.seed,
        )
        for note in notes:
            print(f"names: {note}", file=sys.stderr)
    elif arguments.names or arguments.tokens:
        raise ValueError("--names and --tokens: expected --params beside them")
    else:
        model = dataclasses.replace(golden.PRESETS[arguments.preset], **config)
        params, batch = golden.draw(model, arguments.seed)
    arrays, metadata = golden.make_from(
        model,
        params,
        batch,
        seed=arguments.seed,
        dtype=arguments.dtype,
        activations=arguments.activations,
    )
    files.save(arguments.out, arrays, metadata)
    print(f"{arguments.out}: {len(arrays)} arrays of {arguments.dtype}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from marref import files
    from marref.interop import maps
    from marref.verify import comparison, diagnosis, golden, names

    path = golden.shipped("tiny") if arguments.golden == "tiny" else arguments.golden
    golden_vectors = comparison.Golden(*files.load(path))
    renamed = names.rename(golden_vectors, files.load_all(arguments.yours), arguments.names)
    for note in renamed.notes:
        print(f"names: {note}", file=sys.stderr)
    if arguments.write_names:
        if renamed.name_map is None:
            raise ValueError("--write-names: expected --names auto beside it")
        maps.write(arguments.write_names, renamed.name_map)
    arrays, precision = renamed.arrays, arguments.dtype
    report: comparison.Comparison | diagnosis.Diagnosis
    if arguments.diagnose:
        report = diagnosis.diagnose(golden_vectors, arrays, precision, progress=_Progress())
    else:
        report = comparison.compare(
            golden_vectors, arrays, precision, fail_fast=arguments.fail_fast
        )
    print(report.as_json() if arguments.json else report.as_table(sys.stdout.isatty()))
    return 0 if report.agrees else 1


class _Progress:
    """Says on stderr what is being tried: each second in a terminal, elsewhere every ten."""

    def __init__(self) -> None:
        self.interval = 1.0 if sys.stderr.isatty() else 10.0
        self.said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self.said < self.interval:
            return
        self.said = time.monotonic()
        start, end = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}trying {what}: {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)


def _check(arguments: argparse.Namespace) -> int:
    import numpy as np

    from marref.verify import self_check

    print("Largest error of every gradient, relative to the largest entry of its part.\n")
    print(f"{'part':<14}{'gradient of':<38}{'shape':<10}{'complex step':>14}{'central':>10}")
    failed = 0
    worst = dict.fromkeys(self_check.BOUNDS, 0.0)
    for row in self_check.run(arguments.seed):
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


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _not_negative(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"received {text}, expected an integer >= {minimum}")
    return value
