"""What attention weights are the softmax of, and what context gathers."""

import math

import numpy as np
from scipy.special import expit

from marref.layers import attention
from marref.trees import Array
from marref.verify import measure
from marref.verify.structure.evidence import Candidates, Case, Finding, named, number
from marref.verify.structure.sources import streams


def weights(case: Case, block: str, _: str) -> Candidates:
    """List what attention weights are the softmax of, or are in place of it."""
    query, key = (case.activations[f"{block}.attention.{name}"] for name in ("query", "key"))
    model, tokens = case.vectors.model, case.vectors.batch["tokens"]
    head_dim, length = query.shape[-1], query.shape[-2]
    products = query @ key.mT
    scores = products / math.sqrt(head_dim)
    for words, divisor in {
        "not divided by sqrt(head_dim)": 1.0,
        "divided by head_dim, without the root": float(head_dim),
        "multiplied by sqrt(head_dim)": 1.0 / math.sqrt(head_dim),
        "divided by sqrt(embed_dim)": math.sqrt(model.embed_dim),
        "divided by sqrt(length)": math.sqrt(length),
        "divided by sqrt(number of heads)": math.sqrt(model.num_heads),
        "divided by sqrt(2 head_dim)": math.sqrt(2.0 * head_dim),
        "divided by the fourth root of head_dim": head_dim**0.25,
        "divided by sqrt(head_dim) with the sign turned": -math.sqrt(head_dim),
    }.items():
        yield f"is the softmax of scores {words}", attention.softmax(products / divisor)
    yield "is the softmax over the queries in place of the keys", attention.softmax(scores.mT).mT
    yield (
        "is the softmax over the heads",
        np.moveaxis(attention.softmax(np.moveaxis(scores, 1, -1)), -1, 1),
    )
    yield (
        "is the softmax over the batch",
        np.moveaxis(attention.softmax(np.moveaxis(scores, 0, -1)), -1, 0),
    )
    yield "is the softmax with query and key in each other's place", attention.softmax(scores.mT)
    yield "is the scores, without a softmax", scores
    yield "is the products of query and key, neither divided nor softmax", products
    yield "is the sigmoid of the scores", expit(scores)
    exponentials = np.exp(scores)
    yield "is the exponentials of the scores, not divided by their sum", exponentials
    plus_one = exponentials / (1.0 + exponentials.sum(axis=-1, keepdims=True))
    yield "is the softmax with 1 added to the sum", plus_one
    yield "is the softmax of the softmax", attention.softmax(attention.softmax(scores))
    yield "is the softmax to base 2", attention.softmax(scores * math.log(2.0))
    yield from _masked_weights(scores, tokens, case.vectors.batch["mask"])
    others = {
        name: array
        for name, array in streams(case).items()
        if array.shape == query.shape and not name.endswith((f"{block}.attention.query",))
    }
    for name, other in others.items():
        root = math.sqrt(head_dim)
        yield f"is the softmax with {name} as key", attention.softmax(query @ other.mT / root)
        yield f"is the softmax with {name} as query", attention.softmax(other @ key.mT / root)
        yield f"is the softmax of {name} with itself", attention.softmax(other @ other.mT / root)


def _masked_weights(scores: Array, tokens: Array, mask: Array) -> Candidates:
    length = scores.shape[-1]
    upper = np.triu(np.ones((length, length), bool), 1)
    same = tokens[:, None, :, None] == tokens[:, None, None, :]
    keys = {
        "keys after the query": upper,
        "keys before the query": upper.T,
        "the query's own key": np.eye(length, dtype=bool),
        "keys after the query, and its own": upper | np.eye(length, dtype=bool),
        "keys that are [MASK]": (tokens == 0)[:, None, None, :],
        "keys that are not [MASK]": (tokens != 0)[:, None, None, :],
        "keys that are masked": (mask == 1)[:, None, None, :],
        "the first key": np.arange(length) == 0,
        "the last key": np.arange(length) == length - 1,
        "keys of the same token": same,
    }
    for words, left_out in keys.items():
        hidden = np.broadcast_to(left_out, scores.shape)
        for value, how in ((-math.inf, ""), (-1e9, " with -1e9"), (0.0, " with a score of 0")):
            masked = np.where(hidden, value, scores)
            if np.isfinite(masked.max(axis=-1)).all():
                yield f"is the softmax with {words} left out{how}", attention.softmax(masked)
        after = attention.softmax(scores) * ~hidden
        yield f"is the softmax, and then 0 for {words}", after


def temperature(case: Case, block: str, _: str) -> Finding | None:
    """Solve for the factor of the scores that yours implies."""
    query, key = (case.activations[f"{block}.attention.{name}"] for name in ("query", "key"))
    products = query @ key.mT
    if not (case.yours > 0.0).all():
        return None
    logs = np.log(case.yours)
    logs = logs - logs.mean(axis=-1, keepdims=True)
    centred = products - products.mean(axis=-1, keepdims=True)
    value = float((logs * centred).sum() / (centred**2).sum())
    residual = case.residual(attention.softmax(value * products), fitted=1)
    if residual is None:
        return None
    spread = case.budget / max(measure.largest(case.golden) * float(np.abs(centred).max()), 1e-300)
    of_right = number(value * math.sqrt(query.shape[-1]))
    return Finding(
        f"is the softmax of query times key times {named(case, value, spread)}, {of_right} "
        "times 1/sqrt(head_dim)",
        residual,
    )


def rows(case: Case) -> Finding | None:
    """Say what the rows or columns of yours add up to, if that is no 1 or wrong."""
    tolerance = case.tolerance(case.golden) * case.golden.shape[-1]
    for axis, word in ((-2, "columns (over the queries)"), (1, "sums over the heads")):
        sums = case.yours.sum(axis=axis)
        usual = np.abs(case.golden.sum(axis=axis) - 1.0) <= tolerance
        if (np.abs(sums - 1.0) <= tolerance).all() and not usual.all():
            return Finding(f"has {word} that sum to 1")
    sums = case.yours.sum(axis=-1)
    if (np.abs(sums - 1.0) > tolerance).any():
        low, high = float(sums.min()), float(sums.max())
        if high - low <= tolerance:
            return Finding(f"has rows that sum to {high:.4g}, not 1")
        return Finding(f"has rows that sum to between {low:.4g} and {high:.4g}, not 1")
    return None


def context(case: Case, block: str, _: str) -> Candidates:
    """List what gathers which values, and how heads are merged."""
    weights = case.activations[f"{block}.attention.weights"]
    value = case.activations[f"{block}.attention.value"]
    batch, heads, length, head_dim = value.shape
    merge = attention.merge_heads
    gathered = weights @ value
    yield (
        "is weights times value with heads merged by a reshape only",
        gathered.reshape(batch, length, heads * head_dim),
    )
    inner = gathered.transpose(0, 2, 3, 1).reshape(batch, length, heads * head_dim)
    yield "is weights times value with the head innermost", inner
    order = gathered[:, ::-1]
    yield "is weights times value with the heads merged in reverse", merge(order)
    yield "is the weights transposed times value", merge(weights.mT @ value)
    yield "is value, not weighted", merge(value)
    mean = np.broadcast_to(value.mean(axis=2, keepdims=True), value.shape)
    yield "is the mean of value over the positions", merge(mean)
    for name, other in streams(case).items():
        if other.shape == value.shape and name != f"{block}.attention.value":
            yield f"is the weights times {name} in place of value", merge(weights @ other)
        if other.shape == weights.shape and name != f"{block}.attention.weights":
            yield f"is {name} times value", merge(other @ value)
