"""``marref compare``: find where an implementation first differs from golden vectors."""

import argparse
import sys
import time
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref compare golden.npz yours.npz --diagnose",
    "marref compare tiny yours --dtype bf16-mixed --names auto",
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    compare = commands.add_parser(
        "compare",
        help="find where an implementation first differs from golden vectors",
        description="Compare arrays with golden vectors, within derived budgets of rounding.",
        epilog=_EXAMPLES,
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
        help="torch, flax, axon, a JSON file (your names -> ours), or auto: by the parameters; of "
        "continuous MAR mar, the published names",
    )
    compare.add_argument("--write-names", metavar="FILE", help="with --names auto: keep the map")
    compare.add_argument(
        "--diagnose", action="store_true", help="name the known mistakes that explain it"
    )
    compare.add_argument(
        "--fail-fast", action="store_true", help="stop at the first stage that differs"
    )
    compare.add_argument("--json", action="store_true", help="for machines")
    compare.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from marref import files
    from marref.interop import maps
    from marref.verify import comparison, diagnosis, golden, names

    path = golden.shipped("tiny") if parsed.golden == "tiny" else parsed.golden
    golden_vectors = comparison.Golden(*files.load(path))
    renamed = names.rename(golden_vectors, files.load_all(parsed.yours), parsed.names)
    for note in renamed.notes:
        print(f"names: {note}", file=sys.stderr)
    if parsed.write_names:
        if renamed.name_map is None:
            raise ValueError("--write-names: expected --names auto beside it")
        maps.write(parsed.write_names, renamed.name_map)
    arrays, precision = renamed.arrays, parsed.dtype
    report: comparison.Comparison | diagnosis.Diagnosis
    if parsed.diagnose:
        report = diagnosis.diagnose(golden_vectors, arrays, precision, progress=_Progress())
    else:
        report = comparison.compare(golden_vectors, arrays, precision, fail_fast=parsed.fail_fast)
    print(report.as_json() if parsed.json else report.as_table(sys.stdout.isatty()))
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
