"""Draw the figures of the pages, or stamp pictures that something else has drawn.

    python docs/tools/figures.py NAME...                     draw docs/NAME.png (extra viz)
    python docs/tools/figures.py --stamp COMMAND PICTURE...  write into pictures what drew them

Every picture says in its metadata the commit at which it was drawn and the command; one that is
drawn here also a digest of its function, so that a test can tell when it is older than its code.
The second form is for pictures of `marref demo`, which does not know in which copy it runs.
"""

import argparse
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import pictures
from marref import mar_loss, trees
from marref.model import loss_and_grads
from marref.verify import golden, measure, trace
from marref.verify.rounding import PRECISIONS, in_precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]


def rounding() -> "Figure":
    """Draw the error of every activation, relative to its largest entry, by precision."""
    from matplotlib.figure import Figure

    model = golden.PRESETS["small"]
    params, batch = golden.draw(model, seed=0)
    exact = trace.activations(model, params, batch["tokens"])
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for precision, marker in zip(PRECISIONS[1:], "osDv^*", strict=True):
        narrow = trees.map_leaves(lambda leaf, to=precision: in_precision(leaf, to), params)
        found = trace.activations(model, narrow, batch["tokens"])
        errors = [
            measure.relative(
                measure.difference(np.asarray(found[name]), array), measure.largest(array)
            )
            for name, array in exact.items()
        ]
        axes.plot(errors, range(len(errors)), marker + "-", linewidth=0.7, label=precision)
    axes.set_yticks(range(len(exact)), exact)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="largest error / largest entry, against float64")
    axes.grid(axis="x", color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(0.33, 0.5))
    return figure


def steps() -> "Figure":
    """Draw the error of numerical derivatives of a model's loss over the size of the step."""
    from matplotlib.figure import Figure

    model = golden.PRESETS["tiny"]
    params, batch = golden.draw(model, seed=0)
    rng = np.random.default_rng(0)
    direction = trees.map_leaves(lambda leaf: rng.normal(size=leaf.shape), params)
    tokens, targets, mask = (batch[name] for name in ("tokens", "targets", "mask"))
    _, grads = loss_and_grads(model, params, tokens, targets, mask)
    products = trees.map_leaves(np.multiply, grads, direction)
    exact = sum(float(leaf.sum()) for leaf in trees.flatten(products).values())

    def loss(step: complex, dtype: type) -> complex:
        moved = trees.map_leaves(lambda p, v: (p + step * v).astype(dtype), params, direction)
        return complex(mar_loss(model(moved, tokens), targets, mask))

    def central(step: float, dtype: type) -> float:
        return (loss(step, dtype) - loss(-step, dtype)).real / (2 * step)

    derivatives: dict[str, Callable[[float], float]] = {
        "central differences, float32": lambda step: central(step, np.float32),
        "one-sided differences, float64": lambda step: (
            (loss(step, np.float64) - loss(0.0, np.float64)).real / step
        ),
        "central differences, float64": lambda step: central(step, np.float64),
        "complex step": lambda step: loss(1j * step, np.complex128).imag / step,
    }
    sizes = np.logspace(-1, -20, 77)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, derivative in derivatives.items():
        errors = [abs(derivative(size) / exact - 1) for size in sizes]
        # What is 0 has no logarithm: half a unit of the last place stands for it.
        axes.plot(sizes, np.maximum(errors, 2.0**-53), label=name)
    axes.set(xscale="log", yscale="log", xlabel="step h", ylabel="relative error", ylim=(5e-17, 10))
    axes.invert_xaxis()
    axes.grid(color="0.9")
    axes.legend()
    return figure


FIGURES: dict[str, Callable[[], "Figure"]] = {"rounding": rounding, "steps": steps}


def digest(name: str) -> str:
    """Give the SHA-256 of the source of the function that draws a figure."""
    return hashlib.sha256(inspect.getsource(FIGURES[name]).encode()).hexdigest()


def main() -> None:
    """Draw or stamp."""
    parser = argparse.ArgumentParser(prog="python docs/tools/figures.py")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--stamp", metavar="COMMAND", help="names are pictures that it has drawn")
    parsed = parser.parse_args()
    for name in parsed.names:
        if parsed.stamp is not None:
            pictures.stamp(Path(name), parsed.stamp)
            continue
        if name not in FIGURES:
            parser.error(f"no figure {name!r}, expected one of {', '.join(FIGURES)}")
        path = DOCS / f"{name}.png"
        FIGURES[name]().savefig(path, dpi=110)
        pictures.stamp(path, f"python docs/tools/figures.py {name}", Digest=digest(name))


if __name__ == "__main__":
    main()
