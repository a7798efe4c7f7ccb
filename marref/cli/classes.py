"""The classes of a run, as ``marref sample`` asks for them."""

import argparse

from marref import chance
from marref.cli import arguments
from marref.data import Classes
from marref.decoding import GUIDANCES

_NO_CLASS = "none"


def add_arguments(sample: argparse.ArgumentParser) -> None:
    """Add the options of class-conditional generation to the command's parser."""
    sample.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help=f"name or number of a class, or {_NO_CLASS}; default: drawn as often as in the data",
    )
    sample.add_argument(
        "--guidance-scale",
        type=arguments.real,
        default=1.0,
        help="from no class (0) to the class (1), and beyond it; default: 1",
    )
    sample.add_argument(
        "--guidance", choices=GUIDANCES, default="constant", help="of the scale over the steps"
    )


def drawn(parsed: argparse.Namespace, classes: Classes | None) -> list[int | None]:
    """Choose the label of every sample; ``None``: no class.

    Drawn as often as in the data, samples are as diverse as these: p(x) = Σ_c p(c) p(x | c).  The
    class of a sample depends on its number and not on how many there are.
    """
    if classes is None:
        if parsed.class_name is not None:
            raise ValueError("--class: received for a run on data without classes")
        return [None] * parsed.num
    if parsed.class_name == _NO_CLASS and _NO_CLASS not in (classes.names or ()):
        return [None] * parsed.num
    if parsed.class_name is not None:
        try:
            (number,) = classes.numbers([parsed.class_name])
        except ValueError as error:
            raise ValueError(f"--class: {error}") from error
        return [number] * parsed.num
    shares = classes.shares
    return [
        int(chance.generator(parsed.seed, "sample", index, 0).choice(len(shares), p=shares))
        for index in range(parsed.num)
    ]
