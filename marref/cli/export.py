"""``marref export``: a run's model for PyTorch or ONNX, checked before it is there."""

import argparse
from pathlib import Path
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref export run model.safetensors", "marref export run model.onnx"
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    export = commands.add_parser(
        "export",
        help="write a run's model for PyTorch or ONNX",
        description="Write the best checkpoint of a run, averaged parameters, as a PyTorch "
        "state_dict (.safetensors) or an ONNX graph (.onnx), and hold it to marref.",
        epilog=_EXAMPLES,
    )
    export.add_argument("run_folder", metavar="RUN", type=Path, help="the folder of marref train")
    export.add_argument("out", metavar="OUT", type=Path, help="ends in .safetensors or .onnx")
    export.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from marref.training.export import export

    checkpoint, found = export(parsed.run_folder, parsed.out)
    print(f"Wrote {parsed.out}, the model of step {checkpoint.step:,}; {found}.")
    return 0
