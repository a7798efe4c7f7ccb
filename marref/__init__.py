"""marref: the NumPy reference implementation of MAR, masked autoregressive generation.

    model = marref.build(vocab_size=18, embed_dim=64, num_layers=2, num_heads=4, seq_len=64)
    params = model.init(numpy.random.default_rng(0))
    loss, grads = marref.loss_and_grads(model, params, tokens, targets, mask)
    tokens = marref.iterative_decode(model, params, num_steps=8)

Submodules: `marref.layers` (each layer, forward and backward), `marref.model`, `marref.loss`,
`marref.masking`, `marref.schedules`, `marref.decoding`, `marref.optim`, `marref.training`,
`marref.shares`, `marref.parallel`, `marref.memory`, `marref.data`, `marref.files`,
`marref.trees`, `marref.verify`.
"""

from marref import (
    data,
    decoding,
    files,
    layers,
    loss,
    masking,
    memory,
    model,
    optim,
    parallel,
    schedules,
    shares,
    training,
    trees,
    verify,
)
from marref.decoding import iterative_decode
from marref.layers.embedding import sinusoidal_table
from marref.loss import mar_loss
from marref.masking import mask_tokens, sample_mask_ratio
from marref.model import MAR, build
from marref.shares import loss_and_grads
from marref.training import load_model, save_model
from marref.verify import check_gradients

__version__ = "0.1.0"

__all__ = [
    "MAR",
    "build",
    "check_gradients",
    "data",
    "decoding",
    "files",
    "iterative_decode",
    "layers",
    "load_model",
    "loss",
    "loss_and_grads",
    "mar_loss",
    "mask_tokens",
    "masking",
    "memory",
    "model",
    "optim",
    "parallel",
    "sample_mask_ratio",
    "save_model",
    "schedules",
    "shares",
    "sinusoidal_table",
    "training",
    "trees",
    "verify",
]
