"""What a layer's output is: what the layer would make of another kernel, input, epsilon, ….

Every candidate is computed from golden arrays, with one thing changed; its clause says which.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import erf, expit

from marref import trees
from marref.layers import attention
from marref.positions import KINDS, sinusoidal_table
from marref.trees import Array
from marref.verify import measure
from marref.verify.structure import relations
from marref.verify.structure.evidence import Candidates, Case, Finding, either, named, number

_EPSILONS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)
_BLOCK = re.compile(r"activations/(blocks\.\d+)\.(.*)")


def activation(case: Case, name: str) -> Array:
    """Return a golden activation, float64."""
    return np.asarray(case.vectors.arrays[f"activations/{name}"], np.float64)


def parameters(case: Case) -> dict[str, Array]:
    """Return the golden parameters by name."""
    return trees.flatten(case.vectors.params)


def streams(case: Case) -> dict[str, Array]:
    """Return what else a layer may have read: golden activations, the stream within blocks too."""
    found = {}
    for name, array in case.vectors.arrays.items():
        if name.startswith("activations/"):
            short = name.removeprefix("activations/")
            found[short] = np.asarray(array, np.float64)
            if short.endswith("attention.output"):
                block = short.removesuffix(".attention.output")
                found[f"the stream after attention in {block}"] = _after_attention(case, block)
    return found


def _input_of(case: Case, block: str) -> Array:
    index = int(block.split(".")[1])
    return activation(case, f"blocks.{index - 1}.output" if index else "embedding")


def _after_attention(case: Case, block: str) -> Array:
    return _input_of(case, block) + activation(case, f"{block}.attention.output")


def of_layer(case: Case) -> Finding | None:
    """Say what the layer that computed an activation did."""
    name = case.name.removeprefix("activations/")
    if name == "embedding":
        return embedding(case)
    if name in ("final_norm", "logits"):
        block, part = "", name
    else:
        matched = _BLOCK.fullmatch(case.name)
        if matched is None:
            return None
        block, part = matched[1], matched[2]
    for pattern, hint in _LAYERS.items():
        if re.fullmatch(pattern, part):
            return hint(case, block, part)
    return None


# Linear layers.


def _linear(case: Case, block: str, part: str) -> Finding | None:
    """Say which kernel, bias or input makes yours."""
    layer, source = {
        "logits": ("head", "final_norm"),
        "attention.output": (f"{block}.attention.output", f"{block}.attention.context"),
        "feed_forward.up": (f"{block}.feed_forward.up", f"{block}.feed_forward_norm"),
        "feed_forward.down": (f"{block}.feed_forward.down", f"{block}.feed_forward.activation"),
    }.get(part, (f"{block}.{part}", f"{block}.attention_norm"))
    heads = case.golden.ndim == 4
    return case.fitting(_linear_candidates(case, layer, source, heads))


def _linear_candidates(case: Case, layer: str, source: str, heads: bool) -> Candidates:
    leaves, x = parameters(case), activation(case, source)
    kernel, bias = leaves[f"{layer}.kernel"], leaves[f"{layer}.bias"]
    count = case.vectors.model.num_heads

    def split(y: Array) -> Array:
        return attention.split_heads(y, count) if heads else y

    right = x @ kernel
    yield f"is what {layer} makes without its bias", split(right)
    yield f"is what {layer} makes with its bias twice", split(right + 2 * bias)
    yield f"is what {layer} makes with its bias subtracted", split(right - bias)
    for other, of in _other_kernels(leaves, layer, count):
        made = x @ of
        yield f"is what {layer} makes with {other}", split(made + bias)
        yield f"is what {layer} makes with {other} and no bias", split(made)
        theirs = leaves.get(other.removesuffix(".kernel") + ".bias")
        if theirs is not None and theirs.shape == bias.shape:
            yield (
                f"is what {layer} makes with kernel and bias of {other[:-7]}",
                split(made + theirs),
            )
    for other, theirs in leaves.items():
        if theirs.shape == bias.shape and other != f"{layer}.bias":
            yield f"is what {layer} makes with {other} as its bias", split(right + theirs)
    for other, input_ in streams(case).items():
        if input_.shape == x.shape and other != source:
            clause = f"is what {layer} makes of {other} in place of {source}"
            yield clause, split(input_ @ kernel + bias)
    if heads:
        yield from _head_layouts(right + bias, count)


def _other_kernels(leaves: dict[str, Array], layer: str, heads: int) -> Iterator[tuple[str, Array]]:
    kernel = leaves[f"{layer}.kernel"]
    inputs, outputs = kernel.shape
    if inputs == outputs:
        yield "its kernel transposed", kernel.T
    else:
        yield "its kernel read in the order [out, in]", kernel.T.reshape(kernel.shape)
        yield "its kernel reshaped from [out, in]", kernel.reshape(outputs, inputs).T
    for words, axis, size in (("inputs", 0, inputs), ("outputs", 1, outputs)):
        yield f"its kernel's {words} reversed", np.flip(kernel, axis)
        order = np.arange(size)
        for groups in {heads, 2} - {1}:
            if size % groups == 0:
                inner = order.reshape(groups, -1).T.ravel()
                outer = order.reshape(-1, groups).T.ravel()
                yield (
                    f"its kernel's {words} interleaved in {groups} groups",
                    np.take(kernel, inner, axis),
                )
                yield (
                    f"its kernel's {words} taken apart into {groups} groups",
                    np.take(kernel, outer, axis),
                )
        for shift in (1, -1):
            yield f"its kernel's {words} rolled by {shift}", np.roll(kernel, shift, axis)
    for other, theirs in leaves.items():
        if other == f"{layer}.kernel" or not other.endswith((".kernel", ".table")):
            continue
        if theirs.shape == kernel.shape:
            yield other, theirs
        if theirs.T.shape == kernel.shape:
            yield f"{other} transposed", theirs.T


def _head_layouts(y: Array, count: int) -> Candidates:
    batch, length, features = y.shape
    inner = y.reshape(batch, length, features // count, count).transpose(0, 3, 1, 2)
    yield "is cut into heads with the head innermost: head h reads features h, h + heads, …", inner
    raw = y.reshape(batch, count, length, features // count)
    yield "is cut into heads by a reshape without moving axes", raw


# Layer norms.


def _norm(case: Case, block: str, part: str) -> Finding | None:
    """Say what yours was normalised with, or what was normalised."""
    name = f"{block}.{part}" if block else part
    if part == "final_norm":
        source = f"blocks.{case.vectors.model.num_layers - 1}.output"
        x = activation(case, source)
    elif part == "attention_norm":
        x, source = _input_of(case, block), "the input of the block"
    else:
        x, source = _after_attention(case, block), "the stream after attention"
    found = case.fitting(_norm_candidates(case, name, x, source, block))
    return found or _epsilon(case, name, x)


def normalise(x: Array, epsilon: float, *, axis: int | tuple[int, ...] = -1) -> Array:
    """Normalise over an axis, without scale and bias."""
    centred = x - x.mean(axis=axis, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (centred**2).mean(axis=axis, keepdims=True)
        return np.asarray(centred / np.sqrt(variance + epsilon))


def _norm_candidates(case: Case, name: str, x: Array, source: str, block: str) -> Candidates:
    leaves, epsilon = parameters(case), case.vectors.model.layer_norm_epsilon
    scale, bias = leaves[f"{name}.scale"], leaves[f"{name}.bias"]
    n = x.shape[-1]
    right = normalise(x, epsilon)
    yield f"is {source} itself: {name} is missing", x
    yield f"is {source} normalised, without scale and bias", right
    yield "is normalised right, but without the scale", right + bias
    yield "is normalised right, but without the bias", right * scale
    yield "is normalised right, but scaled by 1 + scale", right * (1 + scale) + bias
    yield "is normalised right, but bias added before the scale", (right + bias) * scale
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    squares = (x**2).mean(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = {
            "by the root mean square, the mean not taken off": x / np.sqrt(squares + epsilon),
            "by the deviation, the mean not taken off": x / np.sqrt(variance + epsilon),
            "by n - 1 in place of n": centred / np.sqrt(variance * n / (n - 1) + epsilon),
            "with epsilon outside the root": centred / (np.sqrt(variance) + epsilon),
            "by n - 1 in place of n, epsilon outside the root": centred
            / (np.sqrt(variance * n / (n - 1)) + epsilon),
            "by the variance, without the root": centred / (variance + epsilon),
            "over the positions in place of the features": normalise(x, epsilon, axis=1),
            "over positions and features together": normalise(x, epsilon, axis=(1, 2)),
            "over the batch in place of the features": normalise(x, epsilon, axis=0),
            "over batch and positions in place of the features": normalise(x, epsilon, axis=(0, 1)),
            "by taking off the mean, without a division": centred,
        }
        for other in _EPSILONS:
            plain[f"with epsilon {other:g}"] = normalise(x, other)
        for other in _EPSILONS:
            if other != epsilon:
                text = f"with epsilon {other:g} outside the root"
                plain[text] = centred / (np.sqrt(variance) + other)
    for words, normalised in plain.items():
        if np.isfinite(normalised).all():
            yield f"is normalised {words}", normalised * scale + bias
    yield from _other_norms(case, name, right, block, epsilon)


def _other_norms(case: Case, name: str, right: Array, block: str, epsilon: float) -> Candidates:
    leaves = parameters(case)
    scale, bias = leaves[f"{name}.scale"], leaves[f"{name}.bias"]
    norms = [other.removesuffix(".scale") for other in leaves if other.endswith(".scale")]
    for other in norms:
        theirs = leaves[f"{other}.scale"], leaves[f"{other}.bias"]
        if other != name:
            yield f"is normalised with scale and bias of {other}", right * theirs[0] + theirs[1]
            yield f"is normalised with the scale of {other}", right * theirs[0] + bias
            yield f"is normalised with the bias of {other}", right * scale + theirs[1]
    yield "is normalised with scale and bias in each other's place", right * bias + scale
    inputs = {of: x for of, x in streams(case).items() if x.shape == right.shape}
    if block and name.endswith("feed_forward_norm"):
        x, branch = _input_of(case, block), activation(case, f"{block}.attention.output")
        normed = activation(case, f"{block}.attention_norm")
        inputs |= {
            "the input of the block and twice attention.output": x + 2 * branch,
            "twice the input of the block and attention.output": 2 * x + branch,
            "the input of the block less attention.output": x - branch,
            "attention.output added to the normalised input": normed + branch,
            "the input of the block and half of attention.output": x + branch / 2,
            "the mean of the input of the block and attention.output / sqrt(2)": (x + branch)
            / math.sqrt(2.0),
            "the input of the block and attention.context, not projected": x
            + activation(case, f"{block}.attention.context"),
        }
    for words, x in inputs.items():
        yield f"is the norm of {words}", normalise(x, epsilon) * scale + bias


def _epsilon(case: Case, name: str, x: Array) -> Finding | None:
    """Solve for the epsilon that yours implies."""
    leaves = parameters(case)
    scale, bias = leaves[f"{name}.scale"], leaves[f"{name}.bias"]
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        normalised = (case.yours - bias) / scale
        slope = (normalised * centred).sum(axis=-1) / (centred**2).sum(axis=-1)
        implied = 1.0 / slope**2 - variance
        # The row of the smallest variance says most of it.
        value = float(implied.ravel()[variance.argmin()])
    if not (math.isfinite(value) and value > 0.0):
        return None
    candidate = normalise(x, value) * scale + bias
    residual = case.residual(candidate, fitted=1)
    if residual is None:
        return None
    return Finding(f"is normalised with epsilon {value:.3g}, which every row implies", residual)


# Attention.


def _weights(case: Case, block: str, _: str) -> Finding | None:
    """Say what scores yours are the softmax of; if not, what their rows are."""
    query, key = (activation(case, f"{block}.attention.{name}") for name in ("query", "key"))
    found = case.fitting(_weight_candidates(case, block, query, key))
    return found or _temperature(case, query @ key.mT) or _rows(case)


def _weight_candidates(case: Case, block: str, query: Array, key: Array) -> Candidates:
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


def _temperature(case: Case, products: Array) -> Finding | None:
    """Solve for the factor of the scores that yours implies."""
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
    return Finding(
        f"is the softmax of query times key times {named(case, value, spread)}", residual
    )


def _rows(case: Case) -> Finding | None:
    """Say what the rows or columns of yours add up to, if that is no 1 or wrong."""
    tolerance = case.tolerance(case.golden) * case.golden.shape[-1]
    for axis, word in ((-2, "columns (over the queries)"), (1, "sums over the heads")):
        sums = case.yours.sum(axis=axis)
        usual = np.abs(case.golden.sum(axis=axis) - 1.0) <= tolerance
        if (np.abs(sums - 1.0) <= tolerance).all() and not usual.all():
            return Finding(f"has {word} that sum to 1")
    rows = case.yours.sum(axis=-1)
    if (np.abs(rows - 1.0) > tolerance).any():
        low, high = float(rows.min()), float(rows.max())
        if high - low <= tolerance:
            return Finding(f"has rows that sum to {high:.4g}, not 1")
        return Finding(f"has rows that sum to between {low:.4g} and {high:.4g}, not 1")
    return None


def _context(case: Case, block: str, _: str) -> Finding | None:
    """Say which weights and values yours gathers, and how heads were merged."""
    return case.fitting(_context_candidates(case, block))


def _context_candidates(case: Case, block: str) -> Candidates:
    weights = activation(case, f"{block}.attention.weights")
    value = activation(case, f"{block}.attention.value")
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


# Feed-forward.


def _activation(case: Case, block: str, _: str) -> Finding | None:
    """Say which function of its input yours is."""
    x = activation(case, f"{block}.feed_forward.up")
    found = case.fitting(_functions(x))
    return found or _function_alone(case, x)


def _functions(x: Array) -> Candidates:
    gelu = 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))
    tanh = 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    softplus = np.logaddexp(0.0, x)
    yield "is GELU by tanh of feed_forward.up", tanh
    yield "is the exact GELU of feed_forward.up", gelu
    yield "is ReLU of feed_forward.up", np.maximum(x, 0.0)
    yield "is SiLU of feed_forward.up", x * expit(x)
    yield "is x sigmoid(1.702 x) of feed_forward.up, the quick GELU", x * expit(1.702 * x)
    yield "is feed_forward.up itself: the activation is missing", x
    yield "is tanh of feed_forward.up", np.tanh(x)
    yield "is the sigmoid of feed_forward.up", expit(x)
    yield "is softplus of feed_forward.up", softplus
    yield "is mish of feed_forward.up", x * np.tanh(softplus)
    yield "is ReLU squared of feed_forward.up", np.maximum(x, 0.0) ** 2
    yield "is ReLU6 of feed_forward.up", np.clip(x, 0.0, 6.0)
    for slope in (0.01, 0.1, 0.2):
        yield f"is leaky ReLU with slope {slope} of feed_forward.up", np.where(x > 0, x, slope * x)
    yield "is ELU of feed_forward.up", np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))
    selu = 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))
    yield "is SELU of feed_forward.up", selu
    yield "is the hard swish of feed_forward.up", x * np.clip(x + 3.0, 0.0, 6.0) / 6.0
    yield "is the absolute value of feed_forward.up", np.abs(x)
    yield "is GELU applied twice", 0.5 * gelu * (1.0 + erf(gelu / math.sqrt(2.0)))
    without_root = 0.5 * x * (1.0 + erf(x))
    yield "is x (1 + erf(x)) / 2 of feed_forward.up, without the root of 2", without_root
    yield "is x (1 + erf(x / sqrt(2))) of feed_forward.up, without the 1/2", 2.0 * gelu
    yield "is the gate of GELU, not multiplied by x", 0.5 * (1.0 + erf(x / math.sqrt(2.0)))
    yield (
        "is x (1 + tanh(sqrt(2/pi) x)) / 2 of feed_forward.up, without the cubic term",
        (0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * x))),
    )


def _function_alone(case: Case, x: Array) -> Finding | None:
    """Say that yours is a function of its input: neighbouring inputs, neighbouring outputs."""
    order = np.argsort(x, axis=None)
    inputs, outputs = x.ravel()[order], case.yours.ravel()[order]
    steps, changes = np.diff(inputs), np.abs(np.diff(outputs))
    close = steps < 0.01 * (inputs[-1] - inputs[0])
    if close.sum() < 30 or (changes[close] > 3.0 * steps[close] + 2.0 * case.budget).any():
        return None
    if (np.abs(np.diff(case.yours.ravel())) <= 3.0 * np.abs(np.diff(x.ravel()))).all():
        return None
    return Finding("is a function of feed_forward.up alone, entry by entry, but none that is known")


def _residual(case: Case, block: str, _: str) -> Finding | None:
    """Say how much of each part of the residual stream is in yours."""
    parts = {
        "the input of the block": _input_of(case, block),
        "attention.output": activation(case, f"{block}.attention.output"),
        "feed_forward.down": activation(case, f"{block}.feed_forward.down"),
    }
    normed = {
        "attention_norm": activation(case, f"{block}.attention_norm"),
        "feed_forward_norm": activation(case, f"{block}.feed_forward_norm"),
    }
    found = combination(case, parts) or combination(case, {**parts, **normed})
    if found is not None:
        return found
    leaves = parameters(case)
    candidates = []
    for norm in ("attention_norm", "feed_forward_norm"):
        scale, bias = leaves[f"{block}.{norm}.scale"], leaves[f"{block}.{norm}.bias"]
        normalised = normalise(case.golden, case.vectors.model.layer_norm_epsilon)
        candidates.append((f"is the sum normalised by {norm}", normalised * scale + bias))
    return case.fitting(candidates) or _dropped_branch(case, parts)


def _dropped_branch(case: Case, parts: dict[str, Array]) -> Finding | None:
    """Say that entries of the last branch are dropped and the others scaled up."""
    branch = parts["feed_forward.down"]
    yours = case.yours - (case.golden - branch)
    rest = dataclasses.replace(case, yours=yours, golden=branch, others={}, addends={})
    found = relations.dropped(rest)
    if found is None:
        return None
    clause = found.clause.replace("is 0", "has a feed_forward.down that is 0", 1)
    return Finding(clause.replace("the golden array", "golden"), found.residual)


def combination(case: Case, parts: dict[str, Array], tried: int = 1) -> Finding | None:
    """Fit yours by a sum of parts, each with a coefficient, and say them."""
    columns = np.stack([part.ravel() for part in parts.values()], axis=1)
    solved, _, rank, _ = np.linalg.lstsq(columns, case.yours.ravel(), rcond=None)
    if rank < len(parts):
        return None
    spread = case.budget / np.abs(columns).max(axis=0)
    # What is a clean number within the error is that number.
    clean = [
        _cleaned(float(value), float(near)) for value, near in zip(solved, spread, strict=True)
    ]
    candidate = (columns @ np.array(clean)).reshape(case.golden.shape)
    fitted = sum(value not in (0.0, 1.0) for value in clean)
    residual = case.residual(candidate, fitted=fitted, tried=tried * 3 ** len(parts))
    if residual is None:
        return None
    terms = [
        (name if value == 1.0 else f"{_coefficient(case, value, float(near))} times {name}")
        for name, value, near in zip(parts, clean, spread, strict=True)
        if value != 0.0
    ]
    missing = [name for name, value in zip(parts, clean, strict=True) if value == 0.0]
    without = f", without {' and '.join(missing)}" if missing and len(parts) <= 3 else ""
    return Finding(f"is {' plus '.join(terms) or '0'}{without}", residual)


def _coefficient(case: Case, value: float, near: float) -> str:
    return number(value) if value in (2.0, 0.5, -1.0) else named(case, value, near)


def _cleaned(value: float, spread: float) -> float:
    for known in (0.0, 1.0, 2.0, 0.5, -1.0, math.sqrt(0.5), math.sqrt(2.0), 1 / 0.9):
        if abs(value - known) <= 4.0 * spread:
            return known
    return value


# Embedding.


def embedding(case: Case) -> Finding | None:
    """Say how much of which token row and which position is in yours."""
    tokens, model = case.vectors.batch["tokens"], case.vectors.model
    table = parameters(case)["embedding.table"]
    lookups = {
        "table[tokens]": table[tokens],
        "table[tokens + 1]": table[(tokens + 1) % model.vocab_size],
        "table[tokens - 1]": table[(tokens - 1) % model.vocab_size],
        "table[targets]": table[case.vectors.batch["targets"]],
        "table read as [embed_dim, vocab_size]": table.T.reshape(table.shape)[tokens],
        "table as if reshaped from [embed_dim, vocab_size]": table.reshape(table.T.shape).T[tokens],
        "the head's kernel[tokens]": parameters(case)["head.kernel"].T[tokens],
    }
    positions: dict[str, Array] = {}
    for words, waves in _position_tables(tokens.shape[1], model.embed_dim, model.positions):
        if not any(np.allclose(waves, other, rtol=0, atol=1e-9) for other in positions.values()):
            positions[words] = waves
    tried = len(lookups) * len(positions)
    found = []
    for row, rows in lookups.items():
        for words, waves in positions.items():
            spread_out = np.broadcast_to(waves, rows.shape)
            result = combination(case, {row: rows, words: spread_out}, tried)
            if result is not None and f"without {words}" in result.clause:
                return result
            if result is not None:
                found.append(result)
    if not found:
        return None
    clauses = list(dict.fromkeys(result.clause for result in found))
    return Finding(either(clauses), min(result.residual or 0.0 for result in found))


def parts_of_embedding(case: Case) -> dict[str, Array]:
    """Return what is added up in the golden embedding."""
    tokens, model = case.vectors.batch["tokens"], case.vectors.model
    waves = sinusoidal_table(tokens.shape[1], model.embed_dim, model.positions)
    rows = parameters(case)["embedding.table"][tokens]
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


_LAYERS: dict[str, Callable[[Case, str, str], Finding | None]] = {
    r"logits|attention\.(query|key|value|output)|feed_forward\.(up|down)": _linear,
    r"(attention|feed_forward|final)_norm": _norm,
    r"attention\.weights": _weights,
    r"attention\.context": _context,
    r"feed_forward\.activation": _activation,
    r"output": _residual,
}
