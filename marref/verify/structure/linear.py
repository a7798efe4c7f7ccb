"""What a linear layer makes of another kernel, bias or input."""

from collections.abc import Iterator

import numpy as np

from marref.layers import attention
from marref.trees import Array
from marref.verify.structure.evidence import Candidates, Case
from marref.verify.structure.sources import streams


def candidates(case: Case, block: str, part: str) -> Candidates:
    """List what a linear layer makes of another kernel, bias or input."""
    layer, source = {
        "logits": ("head", "final_norm"),
        "attention.output": (f"{block}.attention.output", f"{block}.attention.context"),
        "feed_forward.up": (f"{block}.feed_forward.up", f"{block}.feed_forward_norm"),
        "feed_forward.down": (f"{block}.feed_forward.down", f"{block}.feed_forward.activation"),
    }.get(part, (f"{block}.{part}", f"{block}.attention_norm"))
    leaves, x = case.parameters, case.activations[source]
    kernel, bias = leaves[f"{layer}.kernel"], leaves[f"{layer}.bias"]
    count = case.vectors.model.num_heads
    heads = part in ("attention.query", "attention.key", "attention.value")

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
