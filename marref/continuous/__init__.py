"""The model of the MAR paper itself: tokens are vectors, and a diffusion loss learns them.

Li et al. 2024, "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838).

    model = continuous.build(**continuous.CONFIGURATIONS["digits"])
    params = model.init(rng)
    loss, grads = continuous.loss_and_grads(model, params, images, labels, model.draw(rng, batch))

    config = continuous.Config(num_steps=1000)
    state, history = continuous.train(model, images, labels, config=config)
    images = continuous.sample(model, state.averaged, labels, rng)

Page: docs/continuous.md.
"""

from marref.continuous.checkpoint import Checkpoint, load, save
from marref.continuous.fast.sampling import sample
from marref.continuous.hyperparameters import CONFIGURATIONS
from marref.continuous.loss import loss_and_grads
from marref.continuous.model import ContinuousMAR
from marref.continuous.sampling import draw
from marref.continuous.training import Config, StepRecord, train

build = ContinuousMAR

__all__ = [
    "CONFIGURATIONS",
    "Checkpoint",
    "Config",
    "ContinuousMAR",
    "StepRecord",
    "build",
    "draw",
    "load",
    "loss_and_grads",
    "sample",
    "save",
    "train",
]
