"""How much of which token's row and of which position is in an embedding."""

import math
from collections.abc import Iterator

import numpy as np

from marref.positions import KINDS, sinusoidal_table
from marref.trees import Array
from marref.verify.structure.evidence import Candidates, Case, Finding, either
from marref.verify.structure.sums import combination


def candidates(case: Case, _block: str, _part: str) -> Candidates:
    """List sums of a token's row and a position, in the proportions in use."""
    root = math.sqrt(case.vectors.model.embed_dim)
    lookups, positions = _lookups(case), _positions(case)
    (row, rows), (right, waves) = next(iter(lookups.items())), next(iter(positions.items()))
    yield f"is {row}, without positions", rows
    yield f"is {right}, without tokens", np.broadcast_to(waves, rows.shape)
    yield f"is sqrt(embed_dim) times {row}, without positions", root * rows
    yield f"is {row} plus twice {right}", rows + 2 * waves
    for other, table in positions.items():
        yield f"is {row} plus {other}", rows + table
        yield f"is sqrt(embed_dim) times {row} plus {other}", root * rows + table
        yield f"is sqrt(embed_dim) times the sum of {row} and {other}", root * (rows + table)
        yield f"is {row} plus {other} over sqrt(embed_dim)", rows + table / root
    for other, looked_up in lookups.items():
        yield f"is {other} plus {right}", looked_up + waves


def fitted(case: Case, _block: str, _part: str) -> Finding | None:
    """Solve for how much of a token's row and of a position is in yours."""
    lookups, positions = _lookups(case), _positions(case)
    tried = len(lookups) * len(positions)
    found = []
    for row, rows in lookups.items():
        for words, waves in positions.items():
            parts = {row: rows, words: np.broadcast_to(waves, rows.shape)}
            result = combination(case, parts, tried)
            if result is not None and f"without {words}" in result.clause:
                return result
            if result is not None:
                found.append(result)
    if not found:
        return None
    clauses = list(dict.fromkeys(result.clause for result in found))
    return Finding(either(clauses), min(result.residual or 0.0 for result in found))


def _lookups(case: Case) -> dict[str, Array]:
    """Look up the tokens in other ways, the right one first."""
    tokens, count = case.vectors.batch["tokens"], case.vectors.model.vocab_size
    table = case.parameters["embedding.table"]
    return {
        "table[tokens]": table[tokens],
        "table[tokens + 1]": table[(tokens + 1) % count],
        "table[tokens - 1]": table[(tokens - 1) % count],
        "table[targets]": table[case.vectors.batch["targets"]],
        "table[reversed tokens]": table[tokens[:, ::-1]],
        "the table read as [embed_dim, vocab_size], of tokens": table.T.reshape(table.shape)[
            tokens
        ],
        "the table reshaped from [embed_dim, vocab_size], of tokens": table.reshape(
            table.T.shape
        ).T[tokens],
        "the head's kernel, transposed, of tokens": case.parameters["head.kernel"].T[tokens],
    }


def _positions(case: Case) -> dict[str, Array]:
    """Tabulate positions in other ways, the right one first; what is the same, once."""
    model, length = case.vectors.model, case.vectors.batch["tokens"].shape[1]
    found: dict[str, Array] = {}
    for words, waves in _position_tables(length, model.embed_dim, model.positions):
        if not any(np.allclose(waves, other, rtol=0, atol=1e-9) for other in found.values()):
            found[words] = waves
    return found


def parts(case: Case) -> dict[str, Array]:
    """Return what is added up in the golden embedding."""
    tokens, model = case.vectors.batch["tokens"], case.vectors.model
    waves = sinusoidal_table(tokens.shape[1], model.embed_dim, model.positions)
    rows = case.parameters["embedding.table"][tokens]
    return {
        "the token's row of the table": rows,
        "the positions": np.broadcast_to(waves, rows.shape),
    }


def _position_tables(length: int, dim: int, kind: str) -> Iterator[tuple[str, Array]]:
    yield "positions", sinusoidal_table(length, dim, kind)
    for other in KINDS:
        yield f"{other} positions", sinusoidal_table(length, dim, other)
    longer = sinusoidal_table(length + 2, dim, kind)
    yield "positions counted from 1", longer[1:-1]
    yield "positions counted from 2", longer[2:]
    yield "positions counted backwards", longer[:length][::-1]
    half = dim // 2
    table = longer[:length]
    yield "positions with cosine before sine", np.roll(table, half, axis=1)
    if kind == "interleaved":
        swapped = table.reshape(length, half, 2)[..., ::-1].reshape(length, dim)
        yield "positions with cosine at even features", swapped
    for words, exponent, base in _frequencies(half, dim):
        angle = np.arange(length)[:, np.newaxis] * base**-exponent
        waves = [np.sin(angle), np.cos(angle)]
        yield f"positions with {words}, concatenated", np.concatenate(waves, axis=1)
        flipped = np.concatenate(waves[::-1], axis=1)
        yield f"positions with {words}, concatenated, cosine first", flipped
        yield f"positions with {words}, interleaved", np.stack(waves, 2).reshape(length, dim)


def _frequencies(half: int, dim: int) -> Iterator[tuple[str, Array, float]]:
    index = np.arange(half)
    yield "exponent i/h", index / half, 10000.0
    yield "exponent i/(h - 1)", index / max(half - 1, 1), 10000.0
    yield "exponent i/embed_dim", index / dim, 10000.0
    yield "exponent 2i/(h - 1)", 2 * index / max(half - 1, 1), 10000.0
    yield "exponent 4i/embed_dim", 4 * index / dim, 10000.0
    yield "base 1000", index / max(half - 1, 1), 1000.0
    yield "base 100", index / max(half - 1, 1), 100.0
    yield "base 100000", index / max(half - 1, 1), 100000.0
