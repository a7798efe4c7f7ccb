"""Class embedding: a learned vector for the class of a sequence, added at every position.

    y[b, p] = x[b, p] + table[labels[b]]

The last row of the table is "no class".  In training some labels are replaced by it
(`marref.masking.drop_labels`), so that one model learns to generate with a class and without, and
the decoder can move away from the latter: classifier-free guidance (Ho & Salimans 2022, arXiv
2207.12598).  Page: docs/class-conditional.md.
"""

import numpy as np
import numpy.typing as npt

from marref.trees import Array, Tree


def init(
    rng: np.random.Generator,
    num_classes: int,
    embed_dim: int,
    std: float,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw the table from N(0, std²).

    Returns
    -------
    dict
        ``table`` [num_classes + 1, embed_dim]; row num_classes is "no class".
    """
    return {"table": rng.normal(0.0, std, (num_classes + 1, embed_dim)).astype(dtype)}


def forward(params: Tree, x: Array, labels: Array) -> tuple[Array, Tree]:
    """Add the vector of its class to every position of a sequence.

    Parameters
    ----------
    params : dict
    x : array [batch, length, embed_dim]
    labels : integer array [batch]
        In [0, num_classes]; num_classes is "no class".

    Returns
    -------
    y : array [batch, length, embed_dim]
    cache : dict
        ``labels`` themselves; ``output`` what is added, [batch, embed_dim].
    """
    added = params["table"][labels]
    return x + added[:, np.newaxis], {"labels": labels, "output": added}


def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dy`` back to x and to the table.

    ∂y/∂x is the identity.  Row c takes part at every position of every sequence of class c:

        dx = dy        dtable[c] = Σ_{b: labels[b] = c} Σ_p dy[b, p]

    As in `marref.layers.embedding`, ``np.add.at`` adds once for every sequence.

    Returns
    -------
    dx : array [batch, length, embed_dim]
    grads : dict
        Like ``params``.
    """
    dtable = np.zeros_like(params["table"])
    np.add.at(dtable, cache["labels"], dy.sum(axis=1))
    return dy, {"table": dtable}
