"""``marref watch``: a page that runs a run's model in a browser, step by step."""

import argparse
from pathlib import Path
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref watch run",
    "marref watch run --out decode.html",
    "marref watch marref-demo/parameters.npz",
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    watch = commands.add_parser(
        "watch",
        help="write a page that decodes with a run's model in a browser",
        description="Write one HTML file that needs nothing else: it runs the best checkpoint of a "
        "run in the browser, step by step.",
        epilog=_EXAMPLES,
    )
    watch.add_argument(
        "path",
        metavar="RUN",
        type=Path,
        help="the folder of marref train, or an .npz file of marref.save_model",
    )
    watch.add_argument("--out", type=Path, default=Path("decode.html"), help="default: decode.html")
    watch.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from marref.teach import watch

    arguments.check_folder("--out", parsed.out)
    watched = watch.of_path(parsed.path)
    size = watch.write(parsed.out, watched)
    print(f"Wrote {parsed.out}, {watched.title}, {size / 1e6:.1f} MB; open it in a browser.")
    if size > watch.SMALL:
        print("A model of this size may take the browser more than a tenth of a second a step.")
    return 0
