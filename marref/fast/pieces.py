"""Trees cut into pieces that fit into a cache, for threads to work off one by one."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from marref.trees import Array, flatten

_PIECE = 2**18


def pieces(tree: Any, *others: Any) -> Iterator[tuple[Array, ...]]:
    """Cut the leaves of trees of the same structure.

    Parameters
    ----------
    tree, *others : trees

    Yields
    ------
    tuple of array
        Views of the same part of a leaf of each tree, along its first axis.
    """
    leaves_of_others = [flatten(other) for other in others]
    for name, first in flatten(tree).items():
        leaves = [np.atleast_1d(leaf) for leaf in (first, *(o[name] for o in leaves_of_others))]
        rows = max(1, _PIECE * len(leaves[0]) // max(1, first.size))
        for start in range(0, len(leaves[0]), rows):
            yield tuple(leaf[start : start + rows] for leaf in leaves)
