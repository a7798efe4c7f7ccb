"""Learned positions: y[b, p] = x[b, p] + table[p].  Page: docs/continuous.md."""

from marref.trees import Array, Tree


def forward(params: Tree, x: Array) -> Array:
    """Add ``table`` [length, features] to x [batch, length, features]; nothing need be kept."""
    y: Array = x + params["table"]
    return y


def backward(dy: Array) -> tuple[Array, Tree]:
    """Push ``dy`` back: dx = dy, and every sequence uses the table, so dtable = Σ_b dy[b].

    Returns
    -------
    dx : array [batch, length, features]
    grads : dict
        ``table`` [length, features].
    """
    return dy, {"table": dy.sum(axis=0)}
