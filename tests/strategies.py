"""The domain of the property tests: models, parameters and batches."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

import marref
from marref import trees


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
def models(draw, dropout=0.0):
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
    )


@st.composite
def cases(draw, dropout=0.0, dtype=np.float64, max_batch=3):
    model = draw(models(dropout))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shape = (draw(st.integers(1, max_batch)), draw(st.integers(1, model.seq_len)))
    targets = rng.integers(model.vocab_size, size=shape)
    tokens, mask = marref.mask_tokens(targets, rng.random(shape[0]), rng)
    return Case(model, random_params(model, rng, dtype), tokens, targets, mask, seed)
