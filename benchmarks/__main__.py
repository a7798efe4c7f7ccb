"""Compare marref with PyTorch and JAX on this machine.

    python -m benchmarks

Prints what was measured; ``--write`` puts it into docs/performance.md and draws
docs/performance.png.
"""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

from benchmarks import cases, measuring, pictures, report
from benchmarks.measuring import Agreement, Result

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "performance.md", DOCS / "performance.png"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    """Measure, or read what was measured, and print or write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="run the cases whose name contains TEXT")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each case (default 7)")
    parser.add_argument("--quick", action="store_true", help="try everything on a tiny model")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}, {PICTURE.name}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured")
    parser.add_argument(
        "--from", metavar="FILE", type=Path, dest="source", help="read it instead of measuring"
    )
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.quick):
        parser.error("--write needs all cases, without --only and --quick")
    if arguments.write and not (PAGE.exists() and BEGIN in PAGE.read_text("utf-8")):
        parser.error(f"--write needs docs/{PAGE.name} with the lines {BEGIN} and {END}")
    if arguments.rounds < 1:
        parser.error("--rounds needs at least 1")
    packages = ["matplotlib"] * arguments.write + ["torch", "jax"] * (not arguments.source)
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'missing {", ".join(missing)}: pip install -e ".[bench]"')

    if arguments.source:
        machine, agreements, results = _read(arguments.source)
    else:
        chosen = _chosen(arguments.only, arguments.quick)
        if not chosen:
            parser.error(f"--only: no case's name contains {arguments.only!r}")
        machine = report.machine()
        agreements, results = measuring.measure(chosen, 1 if arguments.quick else arguments.rounds)
    if arguments.json:
        _write_json(arguments.json, machine, agreements, results)
    text = report.render(machine, agreements, results)
    if arguments.write:
        _write_page(text)
        from benchmarks import chart

        chart.draw(PICTURE, results)
        pictures.stamp(PICTURE, pictures.command_of("python -m benchmarks"))
    else:
        print(text)


def _chosen(only: str | None, quick: bool) -> list[cases.Case]:
    """Choose cases by name, and with them the products that tell the physical limit."""
    every = cases.quick_cases() if quick else cases.all_cases()
    named = [case for case in every if only is None or only in case.name]
    dtypes = {case.dtype for case in named}
    return [
        case for case in every if case in named or (case.task == "product" and case.dtype in dtypes)
    ]


def _write_page(text: str) -> None:
    """Replace what is between the markers of the page."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")


def _write_json(
    path: Path, machine: dict[str, str], agreements: list[Agreement], results: list[Result]
) -> None:
    contents = {
        "machine": machine,
        "agreements": [dataclasses.asdict(row) for row in agreements],
        "results": [dataclasses.asdict(result) for result in results],
    }
    path.write_text(json.dumps(contents, indent=1), "utf-8")


def _read(path: Path) -> tuple[dict[str, str], list[Agreement], list[Result]]:
    contents = json.loads(path.read_text("utf-8"))
    agreements = [Agreement(**row) for row in contents["agreements"]]
    results = [
        Result(**{**result, "case": cases.Case(**result["case"])}) for result in contents["results"]
    ]
    return contents["machine"], agreements, results


if __name__ == "__main__":
    main()
