"""A fault: one known way to get MAR wrong, put into marref from outside.

A fault is a list of patches.  Each names an attribute of a module (or of a class) and says what
stands there while the fault is applied: a `wrap` computes with the old function, a `replace`
does without it.  Wraps of one attribute nest, so most faults can be applied together.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from marref import loss, model, shares
from marref.trees import Array, Tree


class Patch(NamedTuple):
    """What stands at one attribute of a module or class while a fault is applied."""

    owner: ModuleType | type
    attribute: str
    make: Callable[[Any], Any]
    replaces: bool


def wrap(owner: ModuleType | type, attribute: str, make: Callable[[Any], Any]) -> Patch:
    """Put ``make(old)`` in the place of ``old``."""
    return Patch(owner, attribute, make, replaces=False)


def replace(owner: ModuleType | type, attribute: str, new: Any) -> Patch:
    """Put ``new`` in the place of whatever is there."""
    return Patch(owner, attribute, lambda _: new, replaces=True)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A known way to get MAR wrong, or another convention.

    Parameters
    ----------
    name : str
        In kebab-case; begins with the part that it is about.
    summary : str
        One paragraph: what it is, who does it, how it shows.
    patches : tuple of Patch
        What makes marref compute it so.  The gradients of a fault in the forward pass are the
        derivatives of that faulty forward pass, as a framework with autodiff would find them.
    """

    name: str
    summary: str
    patches: tuple[Patch, ...]

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Make marref compute with this fault until the context ends; see `applied`."""
        return applied(self)


def _loss_and_grads(
    mar: model.MAR,
    params: Tree,
    tokens: Array,
    targets: Array,
    mask: Array,
    rng: np.random.Generator | None = None,
    **_: Any,
) -> tuple[Any, Tree]:
    logits, cache = mar.forward(params, tokens, rng)
    value, loss_cache = loss.forward(logits, targets, mask)
    return value, mar.backward(params, loss.backward(loss_cache), cache)


def _encode_masked(mar: model.MAR, params: Tree, tokens: Array, mask: Array, *_: Any) -> Array:
    return model.encode(mar, params, tokens)[mask]


_DEFINITION = [
    replace(shares, "loss_and_grads", _loss_and_grads),
    replace(shares, "encode_masked", _encode_masked),
]


def compatible(*faults: Fault) -> bool:
    """Whether faults can be applied together: no attribute is replaced by two of them."""
    replaced = [
        (patch.owner, patch.attribute)
        for fault in faults
        for patch in fault.patches
        if patch.replaces
    ]
    return len(set(replaced)) == len(replaced)


@contextlib.contextmanager
def applied(*faults: Fault) -> Iterator[None]:
    """Make marref compute with all the given faults until the context ends.

    Faults are put into the definition.  So `marref.loss_and_grads` goes through all the logits
    meanwhile, and nothing is left out that the loss or the decoder does not need.

    The patches act on the whole process, other threads included, and are undone whatever
    happens.  Every module of the package that holds a patched function gets the patch, provided
    that it was imported before.

    Parameters
    ----------
    *faults : Fault

    Raises
    ------
    ValueError
        Two of the faults replace the same function; see `compatible`.
    """
    if not compatible(*faults):
        names = ", ".join(fault.name for fault in faults)
        raise ValueError(f"faults: {names} replace the same function and exclude each other")
    patches = [patch for fault in faults for patch in fault.patches]
    with contextlib.ExitStack() as restore:
        # Replacements first, so that wraps go around them.
        for patch in _DEFINITION + sorted(patches, key=lambda patch: not patch.replaces):
            old = getattr(patch.owner, patch.attribute)
            new = patch.make(old)
            for holder in _holders(patch.owner, patch.attribute, old):
                restore.callback(setattr, holder, patch.attribute, old)
                setattr(holder, patch.attribute, new)
        yield


def _holders(owner: ModuleType | type, attribute: str, value: Any) -> list[ModuleType | type]:
    """Find the owner and every module of the package that imported the value by its name."""
    package = __name__.partition(".")[0]
    importers = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == package
        and module is not owner
        and vars(module).get(attribute) is value
    ]
    return [owner, *importers]
