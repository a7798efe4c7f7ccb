"""marref: the NumPy reference implementation of MAR, masked autoregressive generation.

    model = marref.build(vocab_size=18, embed_dim=64, num_layers=2, num_heads=4, seq_len=64)
    params = model.init(numpy.random.default_rng(0))
    loss, grads = marref.loss_and_grads(model, params, tokens, targets, mask)
    params, state = marref.adam_step(params, grads, marref.optim.init(params), 1e-3)
    tokens = marref.iterative_decode(model, params, num_steps=8)

The definition, to be read: `marref.layers` (each layer, forward and backward), `marref.model`,
`marref.loss`, `marref.masking`, `marref.schedules`, `marref.decoding`, `marref.optim`.  The same
results sooner: `marref.fast`; `loss_and_grads`, `adam_step` and `iterative_decode` above are its
functions, and `marref.model.loss_and_grads`, `marref.optim.step` and
`marref.decoding.iterative_decode` their definitions.  To use them: `marref.training`,
`marref.data`, `marref.chance`, `marref.files`, `marref.trees`.  To check others: `marref.verify`.
"""

from marref import (
    chance,
    data,
    decoding,
    fast,
    files,
    layers,
    loss,
    masking,
    model,
    optim,
    schedules,
    training,
    trees,
    verify,
)
from marref.fast import adam_step, iterative_decode, loss_and_grads, memory, parallel
from marref.loss import mar_loss
from marref.masking import mask_tokens, sample_mask_ratio
from marref.model import MAR, build
from marref.positions import sinusoidal_table
from marref.training import load_model, save_model, train
from marref.verify import check_gradients

__version__ = "0.1.0"

__all__ = [
    "MAR",
    "adam_step",
    "build",
    "chance",
    "check_gradients",
    "data",
    "decoding",
    "fast",
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
    "sinusoidal_table",
    "train",
    "training",
    "trees",
    "verify",
]
