"""``marref golden``: write golden vectors for another implementation."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from marref.cli import arguments

_EXAMPLES = arguments.examples(
    "marref golden golden.npz",
    'marref golden golden.safetensors --config \'{"gelu": "tanh"}\'',
    "marref golden own.npz --params model.safetensors --names torch",
    "marref golden golden.npz --continuous",
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    golden = commands.add_parser(
        "golden",
        help="write golden vectors for another implementation",
        description="Write everything that it takes to check an implementation to one file.",
        epilog=_EXAMPLES,
    )
    golden.add_argument(
        "out", help="file to write: .safetensors or .npz; with --where: tiny, which ships"
    )
    golden.add_argument("--where", action="store_true", help="print where the shipped file is")
    golden.add_argument("--preset", choices=("tiny", "small"), help="default: tiny")
    golden.add_argument(
        "--continuous", action="store_true", help="of the model with continuous tokens"
    )
    golden.add_argument(
        "--config", help='hyper-parameters to change, as JSON: \'{"gelu": "tanh"}\''
    )
    golden.add_argument("--seed", type=arguments.not_negative, default=0, help="default: 0")
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
    golden.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from marref import files
    from marref.verify import checkpoint, golden

    if parsed.where:
        print(golden.shipped(parsed.out))
        return 0
    files.check_suffix("out", parsed.out)
    config = json.loads(parsed.config or "{}")
    if parsed.continuous:
        return _continuous(parsed, config)
    if parsed.params:
        model, params, batch, notes = checkpoint.load(
            parsed.params,
            names_of=parsed.names,
            config=config,
            tokens=parsed.tokens,
            seed=parsed.seed,
        )
        for note in notes:
            print(f"names: {note}", file=sys.stderr)
    elif parsed.names or parsed.tokens:
        raise ValueError("--names and --tokens: expected --params beside them")
    else:
        model = dataclasses.replace(golden.PRESETS[parsed.preset or "tiny"], **config)
        params, batch = golden.draw(model, parsed.seed)
    arrays, metadata = golden.make_from(
        model,
        params,
        batch,
        seed=parsed.seed,
        dtype=parsed.dtype,
        activations=parsed.activations,
    )
    return _save(parsed, arrays, metadata)


def _continuous(parsed: argparse.Namespace, config: dict[str, Any]) -> int:
    from marref.verify import golden_continuous

    of_discrete = {
        "--preset": parsed.preset,
        "--params": parsed.params,
        "--names": parsed.names,
        "--tokens": parsed.tokens,
        "--activations": parsed.activations != ("*",),
    }
    given = [name for name, value in of_discrete.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)}: of discrete MAR, received beside --continuous")
    model = dataclasses.replace(golden_continuous.TINY, **config)
    return _save(parsed, *golden_continuous.make(model, parsed.seed, parsed.dtype))


def _save(parsed: argparse.Namespace, arrays: dict[str, Any], metadata: dict[str, Any]) -> int:
    from marref import files

    files.save(parsed.out, arrays, metadata)
    print(f"{parsed.out}: {len(arrays)} arrays of {parsed.dtype}")
    return 0
