"""The golden arrays that a candidate is computed from."""

from collections.abc import Callable, Container

import numpy as np

from marref.trees import Array
from marref.verify.structure.evidence import Case


def streams(case: Case) -> dict[str, Array]:
    """Return what else a layer may have read: golden activations, the stream within blocks too."""
    within = {
        f"the stream after attention in blocks.{index}": after_attention(case, f"blocks.{index}")
        for index in range(case.vectors.model.num_layers)
    }
    return {**case.activations, **within}


def stream(at: Callable[[str], Array], known: Container[str], index: int) -> Array:
    """Add up what a block reads: the output of the one before, or the embeddings."""
    if index:
        return at(f"blocks.{index - 1}.output")
    x = at("embedding")
    return x + at("class_embedding")[:, np.newaxis] if "class_embedding" in known else x


def input_of(case: Case, block: str) -> Array:
    """Return what a block reads."""
    index = int(block.split(".")[1])
    return stream(case.activations.__getitem__, case.activations, index)


def after_attention(case: Case, block: str) -> Array:
    """Return the residual stream between the branches of a block."""
    return input_of(case, block) + case.activations[f"{block}.attention.output"]


def normalise(x: Array, epsilon: float, *, axis: int | tuple[int, ...] = -1) -> Array:
    """Normalise over an axis, without scale and bias."""
    centred = x - x.mean(axis=axis, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (centred**2).mean(axis=axis, keepdims=True)
        return np.asarray(centred / np.sqrt(variance + epsilon))
