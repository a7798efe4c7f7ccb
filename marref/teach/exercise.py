"""What an exercise is: functions to fill in, and what holds them to the reference.

Page: docs/exercises.md.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from marref import trees
from marref.trees import Array, Tree

Function = Callable[..., Any]
Point = Mapping[str, Any]
Rng = np.random.Generator
Points = Callable[[Rng], Sequence[Point]]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One function of an exercise.

    Parameters
    ----------
    name : str
        Of the function in the learner's file.
    reference : callable
        The solution: a function of the package, with the same arguments.
    outputs : tuple of str or None
        What it returns, in order; ``None``: not compared.
    points : callable
        Takes a generator and returns the arguments that the function is called with, one dict for
        each call.  Generic: no symmetry, no 0 and no 1 in which a mistake could hide.
    steps : dict of str to str
        The step of the derivation to look at, by the outputs that are wrong, in any order, joined
        by blanks; or by each of them, where all have a step of their own.
    mistakes : dict of str to callable
        Mistakes that the catalogue lacks, or names by what they are in a whole model: what computes
        them, by what is said of them.
    """

    name: str
    reference: Function
    outputs: tuple[str | None, ...]
    points: Points
    steps: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mistakes: Mapping[str, Function] = dataclasses.field(default_factory=dict)

    def draw(self) -> Sequence[Point]:
        """Make the points, the same each time."""
        return self.points(np.random.default_rng(sum(map(ord, self.name))))


@dataclasses.dataclass(frozen=True)
class Exercise:
    """Functions to fill in, as a file, with three hints.

    Parameters
    ----------
    name : str
        In kebab-case.
    title : str
        What is to be done, in one line.
    page : str
        The page of the documentation that derives it.
    parts : tuple of Part
    hints : tuple of str
        Three, from a nudge to all but the code.
    is_long : bool
        Takes an evening instead of half an hour.
    """

    name: str
    title: str
    page: str
    parts: tuple[Part, ...]
    hints: tuple[str, str, str]
    is_long: bool = False

    @property
    def file_name(self) -> str:
        """Of the learner's file."""
        return f"{self.name.replace('-', '_')}.py"

    def stub(self) -> str:
        """Give the file to fill in."""
        return (resources.files("marref.teach") / "stubs" / self.file_name).read_text("utf-8")

    def solution(self) -> str:
        """Give the code of the package's own functions."""
        sources = (
            f"# {part.name}: {part.reference.__module__}.{part.reference.__qualname__}\n"
            + inspect.getsource(part.reference)
            for part in self.parts
        )
        return "\n\n".join(sources)


def drawn(tree: Tree, rng: Rng) -> Tree:
    """Draw every parameter anew: fresh biases of 0 and scales of 1 would hide mistakes."""
    new: Tree = trees.map_leaves(lambda leaf: rng.normal(0.3, 0.7, leaf.shape), tree)
    return new


def after_forward(forward: Function, points: Points, gradient: str = "dy") -> Points:
    """Make the points of a backward: what the forward kept at its points, and a gradient.

    Parameters
    ----------
    forward : callable
        Returns a result and a cache.
    points : callable
        Those of the forward.
    gradient : str
        What the backward calls the gradient of the result.
    """

    def draw(rng: Rng) -> Sequence[Point]:
        drawn_points = []
        for point in points(rng):
            result, cache = forward(**point)
            params = {name: point[name] for name in ("params",) if name in point}
            drawn_points.append({**params, gradient: rng.normal(size=result.shape), "cache": cache})
        return drawn_points

    return draw


def row_mean(x: Array) -> Array:
    """Take the mean over the last axis, which stays with the length 1."""
    mean: Array = x.mean(axis=-1, keepdims=True)
    return mean
