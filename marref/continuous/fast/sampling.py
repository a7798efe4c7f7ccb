"""Sampling over packed parameters, each thread with some of the images."""

import functools
from typing import Any

import numpy as np

from marref.continuous import diffusion, sampling
from marref.continuous.fast import network, packed, transformer
from marref.continuous.model import ContinuousMAR
from marref.continuous.sampling import Plan
from marref.fast import memory, parallel
from marref.fast.kernels import linear
from marref.trees import Array, Tree


@functools.wraps(sampling.sample, assigned=["__doc__"])
def sample(*arguments: Any, **options: Any) -> Array:
    """Do as the definition, whose docstring this one gives way to, up to rounding."""
    return sampling.sample(*arguments, **{"sampler": Sampler, **options})


class Sampler(sampling.Sampler):
    """What `marref.continuous.sampling.Sampler` defines."""

    def __init__(self, model: ContinuousMAR, params: Tree, steps: diffusion.Process) -> None:
        super().__init__(model, params, steps)
        self.transformer = transformer.pack_model(model, params)
        self.network = packed.pack(params["diffusion"])
        self.times, _ = network.time_forward(params["diffusion"], steps.timestep, self.dtype)

    def run(self, plan: Plan) -> Array:
        """Generate in as many threads as pay: images do not see each other."""
        batch, model = len(plan.draws["orders"]), self.model
        memory.keep_by_default()
        work = batch * (model.buffer_size + model.length) * model.decoder_dim
        num_threads = parallel.choose(None, work, parallel.FEATURES_WORTH_A_THREAD)
        slices = parallel.split(batch, num_threads)
        with parallel.threads(len(slices), blas_threads=num_threads // len(slices)) as run:
            parts = run(super().run, [_part(plan, rows) for rows in slices])
        return np.concatenate(parts)

    def conditions(self, found: Array, classes: list[Array], masked: Array, now: Array) -> Any:
        """Compute the condition's part of the network, of all classes in one pass."""
        count = len(classes)
        found, masked, now = (np.concatenate([x] * count) for x in (found, masked, now))
        labels = np.concatenate(classes)
        z, _ = transformer.forward(
            self.model, self.params, self.transformer, found, labels, masked, now, keep=False
        )
        return count, linear(z, **self.params["diffusion"]["condition"])

    def outputs(self, x: Array, index: int, conditions: Any) -> list[Array]:
        """Run the network on noisy tokens, for all classes in one pass."""
        count, condition = conditions
        y = condition + self.times[index]
        output = packed.forward(self.network, np.concatenate([x] * count), y)
        return np.split(output, count)


def _part(plan: Plan, rows: slice) -> Plan:
    """Choose some images of a plan."""
    draws = {
        "orders": plan.draws["orders"][rows],
        "start_noise": plan.draws["start_noise"][rows],
        "step_noise": plan.draws["step_noise"][:, rows],
    }
    return plan._replace(draws=draws, classes=[labels[rows] for labels in plan.classes])
