"""Exercises on the embedding."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref import positions
from marref.layers import embedding
from marref.teach.exercise import Exercise, Part, Point, Rng
from marref.trees import Array, Tree


def _embedding_points(rng: Rng) -> Sequence[Point]:
    tokens = np.array([[2, 5, 2, 0], [5, 5, 1, 3]])
    params = {"table": rng.normal(size=(7, 3))}
    return [{"params": params, "dx": rng.normal(size=(2, 4, 3)), "cache": {"tokens": tokens}}]


def _occurrences(cache: Tree) -> Array:
    counts: Array = np.maximum(np.bincount(cache["tokens"].ravel(), minlength=7), 1)
    return counts[:, np.newaxis]


def _first_place_only(params: Tree, dx: Array, cache: Tree) -> Tree:
    dtable = np.zeros_like(params["table"])
    ids, places = np.unique(cache["tokens"], return_index=True)
    dtable[ids] = dx.reshape(-1, dx.shape[-1])[places]
    return {"table": dtable}


def _first_sequence_only(params: Tree, dx: Array, cache: Tree) -> Tree:
    return embedding.backward(params, dx[:1], {"tokens": cache["tokens"][:1]})


def _changed(change: Any) -> Any:
    def backward(params: Tree, dx: Array, cache: Tree) -> Tree:
        dtable = embedding.backward(params, dx, cache)["table"]
        return {"table": change(dtable, params["table"], cache)}

    return backward


EMBEDDING = Exercise(
    "embedding",
    "the embedding's gradient: scatter dx to the rows of the table",
    "embedding.md",
    (
        Part(
            "backward",
            embedding.backward,
            ("grads",),
            _embedding_points,
            {"grads.table": "dtable[v] is the sum of dx over all places whose token is v"},
            {
                "row v has the mean over the places of token v; their gradients add up": _changed(
                    lambda dtable, table, cache: dtable / _occurrences(cache)
                ),
                "divided by the size of the batch; the sequences' gradients add up": _changed(
                    lambda dtable, table, cache: dtable / len(cache["tokens"])
                ),
                "the table itself is added: the sums start at 0": _changed(
                    lambda dtable, table, cache: table + dtable
                ),
                "how often each token occurs: dx is not used": lambda params, dx, cache: (
                    embedding.backward(params, np.ones_like(dx), cache)
                ),
                "only the first place of each token counts": _first_place_only,
                "only the first sequence of the batch counts": _first_sequence_only,
            },
        ),
    ),
    (
        "In how many places of the batch does row v of the table stand?",
        "dtable[v] is a sum over all places with token v; rows of tokens that do not occur are 0.",
        "dtable[tokens] += dx keeps only the last of equal indices; np.add.at adds every time.",
    ),
)


def _positions_points(rng: Rng) -> Sequence[Point]:
    return [
        {"length": length, "embed_dim": embed_dim, "positions": kind}
        for length, embed_dim, kind in (
            (7, 8, "concatenated"),
            (6, 10, "interleaved"),
            (5, 2, "concatenated"),
        )
    ]


def _waves(exponent: Any) -> Any:
    """Tabulate with w_i = 10000 to another exponent, a function of i, h and the layout."""

    def table(length: int, embed_dim: int, positions: str) -> Array:
        half = embed_dim // 2
        exponents = exponent(np.arange(half), half, positions)
        angle = np.arange(length)[:, np.newaxis] * 10000.0**exponents
        axis = 1 if positions == "concatenated" else 2
        return np.stack([np.sin(angle), np.cos(angle)], axis=axis).reshape(length, embed_dim)

    return table


def _wave_of_each_feature(factor: int) -> Any:
    """Tabulate with -factor f/embed_dim for the exponent of feature f, where they alternate."""

    def table(length: int, embed_dim: int, positions: str) -> Array:
        if positions == "concatenated":
            return _table(length, embed_dim, positions)
        feature = np.arange(embed_dim)
        angle = np.arange(length)[:, np.newaxis] * 10000.0 ** (-factor * feature / embed_dim)
        return np.where(feature % 2 == 0, np.sin(angle), np.cos(angle))

    return table


def _layouts_swapped(length: int, embed_dim: int, positions: str) -> Array:
    other = "interleaved" if positions == "concatenated" else "concatenated"
    return _table(length, embed_dim, other)


def _sines_only(length: int, embed_dim: int, positions: str) -> Array:
    table = _table(length, embed_dim, positions)
    if positions == "interleaved":
        return np.repeat(table[:, ::2], 2, axis=1)
    return np.tile(table[:, : embed_dim // 2], 2)


_table = positions.sinusoidal_table

POSITIONS = Exercise(
    "positions",
    "the sinusoidal table of positions, in both layouts",
    "embedding.md",
    (
        Part(
            "sinusoidal_table",
            positions.sinusoidal_table,
            ("table",),
            _positions_points,
            {"table": "feature i of position p is sin(p w_i) or cos(p w_i)"},
            {
                "concatenated has h for the denominator of its exponent, where h - 1 belongs": (
                    _waves(lambda i, half, kind: -i / half)
                ),
                "interleaved has h - 1 for the denominator of its exponent, where h belongs: "
                "2i/embed_dim is i/h": _waves(lambda i, half, kind: -i / max(half - 1, 1)),
                "0/0 where embed_dim is 2: h - 1 is 0 there, and max(h - 1, 1) is 1": _waves(
                    lambda i, half, kind: -i / (half - 1 if kind == "concatenated" else half)
                ),
                "the minus of the exponent is missing: w_i falls with i": _waves(
                    lambda i, half, kind: i / (max(half - 1, 1) if kind == "concatenated" else half)
                ),
                "interleaved, every feature has a wave of its own, as if i counted features: sine "
                "and cosine of one i share w_i": _wave_of_each_feature(2),
                "interleaved, the exponent is that of the feature, (2i + 1)/embed_dim of a cosine: "
                "sine and cosine of one i share w_i": _wave_of_each_feature(1),
                "the two layouts are taken for each other": _layouts_swapped,
                "every feature is a sine: the cosines are missing": _sines_only,
            },
        ),
    ),
    (
        "w_i falls from 1 to about 1/10000 as i goes from the first wave to the last.",
        "concatenated: w_i = 10000^(-i/max(h - 1, 1)) with h = embed_dim/2, all sines before all "
        "cosines; interleaved: w_i = 10000^(-2i/embed_dim), sines at even features.",
        "angle = p[:, None] * w gives [length, h]; concatenate sin and cos along the features, or "
        "stack them along a new last axis and reshape.",
    ),
)
