"""The domain of the property tests: models, parameters and batches; and the two ways."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

import marref
from marref import trees


class Way(NamedTuple):
    """What the definition and the fast way both offer."""

    loss_and_grads: Callable[..., Any]
    adam_step: Callable[..., Any]
    iterative_decode: Callable[..., Any]


DEFINITION = Way(marref.model.loss_and_grads, marref.optim.step, marref.decoding.iterative_decode)
FAST = Way(marref.loss_and_grads, marref.adam_step, marref.iterative_decode)
both_ways = pytest.mark.parametrize("way", [DEFINITION, FAST], ids=["definition", "fast"])


class Case(NamedTuple):
    """A model with parameters and a masked batch, all that a training step needs."""

    model: marref.MAR
    params: dict
    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    seed: int


def random_params(model, rng, dtype=np.float64, std=0.4):
    """Parameters without a 0 bias or a 1 scale behind which a mistake could hide."""
    return trees.map_leaves(
        lambda leaf: rng.normal(0.0, std, leaf.shape).astype(dtype), model.init(rng)
    )


@st.composite
def models(draw, dropout=0.0, classes=False):
    num_heads = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4]))
    return marref.build(
        vocab_size=draw(st.integers(2, 7)),
        embed_dim=num_heads * head_dim,
        num_layers=draw(st.integers(1, 2)),
        num_heads=num_heads,
        seq_len=draw(st.integers(1, 6)),
        dropout=dropout,
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
        gelu=draw(st.sampled_from(["erf", "tanh"])),
        positions=draw(st.sampled_from(["concatenated", "interleaved"])),
        num_classes=draw(st.integers(1, 3)) if classes else None,
    )


@st.composite
def cases(draw, dropout=0.0, dtype=np.float64, max_batch=3, classes=False):
    model = draw(models(dropout, classes))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shape = (draw(st.integers(1, max_batch)), draw(st.integers(1, model.seq_len)))
    targets = rng.integers(model.vocab_size, size=shape)
    tokens, mask = marref.mask_tokens(targets, rng.random(shape[0]), rng)
    return Case(model, random_params(model, rng, dtype), tokens, targets, mask, seed)


@st.composite
def labelled_cases(draw, dropout=0.0, dtype=np.float64, max_batch=3):
    """A case of a model with classes, and labels, "no class" among them; or None for all."""
    case = draw(cases(dropout, dtype, max_batch, classes=True))
    count = len(case.tokens)
    label = st.integers(0, case.model.num_classes)
    labels = draw(st.none() | st.lists(label, min_size=count, max_size=count).map(np.array))
    return case, labels


@st.composite
def masks(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))


def steepness(cache):
    """How much larger the rounding of a model's gradients may be than the gradients.

    The backward of a layer norm, s (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂)) with s = 1/√(σ² + ε), rounds
    terms of the size of s dx̂.  With two features, x̂ is ±1 but for ε, and they all but cancel.
    """
    norms = [cache["final_norm"]]
    for block in cache["blocks"]:
        norms += [block["attention_norm"], block["feed_forward_norm"]]
    return max(1.0, *(float(norm["inverse_std"].max()) for norm in norms))
