"""Faults of the diffusion network."""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref.continuous.layers import modulation, network, silu, timestep
from marref.layers import gelu, linear
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage
from marref.verify.faults.feed_forward import with_params

fault = Stage()


def _features(fault: Fault, features: Callable[[Array, int], Array]) -> None:
    """Compute features(t, half) of times [rows, 1]; half is 128."""

    @fault.replaces(timestep.features)
    def _(timesteps: Array, dtype: Any) -> Array:
        times = timesteps[:, np.newaxis].astype(np.float64)
        return features(times, timestep.FEATURES // 2).astype(dtype)


def _waves(times: Array, denominator: int, half: int) -> list[Array]:
    angles = times * 10000.0 ** (-np.arange(half) / denominator)
    return [np.cos(angles), np.sin(angles)]


fault("time-sines-first").sets("time features").says(
    "The sines of the time come before the cosines, as in Vaswani et al. 2017. A model trained so "
    "works; loaded parameters do not."
).of(_features)(lambda times, half: np.concatenate(_waves(times, half, half)[::-1], axis=1))
fault("time-frequencies-over-half-minus-one").sets("time features").says(
    "The frequencies are 10000^(-k/127) instead of 10000^(-k/128), as in Ho et al. 2020. The "
    "first is right, and the others are off by more and more."
).of(_features)(lambda times, half: np.concatenate(_waves(times, half - 1, half), axis=1))
fault("time-between-0-and-1").sets("time features").says(
    "The network is given t/1000 instead of the index t. All its features are near those of t = 0."
).of(_features)(lambda times, half: np.concatenate(_waves(times / 1000.0, half, half), axis=1))


@fault("silu-missing-before-modulation").wraps(network.steering_forward)
def _(old: Any, params: Tree, timesteps: Array, z: Array) -> Any:
    """Shift, scale and gate are a linear map of y instead of SiLU(y): adaLN_modulation without its
    first layer. The sum of time and condition is right."""
    _, cache = old(params, timesteps, z)
    time, _ = linear.forward(params["time_down"], cache["time_down"])
    y = time + linear.forward(params["condition"], cache["condition"])[0]
    return y, {**cache, "silu": np.ones_like(y)}


fault("network-gelu-for-silu").says(
    "GELU stands where SiLU belongs, everywhere in the network. Both look alike; they differ by "
    "up to 0.2."
).replaces(silu.forward)(lambda x: (gelu.forward(x, "erf")[0], gelu.forward(x, "erf")[1]["slope"]))

swapped = fault("shift-and-scale-swapped").says(
    "Scale comes before shift where the modulation is split. A model trained so works; loaded "
    "parameters do not."
)
swapped.wraps(modulation.forward)(
    lambda old, normalised, shift, scale: old(normalised, scale, shift)
)


@swapped.wraps(modulation.backward)
def _(old: Any, dy: Array, cache: Any) -> Any:
    dnormalised, dshift, dscale = old(dy, cache)
    return dnormalised, dscale, dshift


fault("scale-without-one").says(
    "The norm is multiplied by scale instead of 1 + scale. At the start, where scale is 0, "
    "nothing comes through."
).wraps(modulation.forward)(
    lambda old, normalised, shift, scale: old(normalised, shift, scale - 1.0)
)

ungated = fault("gate-missing")


@ungated.wraps(network.block_forward)
def _(old: Any, params: Tree, h: Array, steering: Array) -> Any:
    """A block adds its branch without the gate. At the start, where gates are 0, blocks should do
    nothing, and do."""
    _, cache = old(params, h, steering)
    return h + cache["branch"], cache


@ungated.wraps(network.block_backward)
def _(old: Any, params: Tree, dy: Array, cache: Tree) -> Any:
    gate, branch = np.ones_like(cache["gate"]), np.zeros_like(cache["branch"])
    return old(params, dy, {**cache, "gate": gate, "branch": branch})


def _rolled(params: Tree, parts: int) -> Tree:
    layer = {
        name: np.roll(leaf, parts * leaf.shape[-1] // 3, axis=-1)
        for name, leaf in params["modulation"].items()
    }
    return {**params, "modulation": layer}


fault("gate-first").says(
    "The modulation is split into gate, shift, scale instead of shift, scale, gate. A model "
    "trained so works; loaded parameters do not."
).of(with_params, network, prefix="block_", back=lambda grads: _rolled(grads, 1))(
    lambda params: _rolled(params, -1)
)
fault("last-modulation-missing").says(
    "The last norm is not modulated: shift and scale of final_layer are left out. At the start, "
    "where they are 0, nothing shows."
).of(with_params, network)(
    lambda params: {
        **params,
        "final_modulation": {
            name: np.zeros_like(leaf) for name, leaf in params["final_modulation"].items()
        },
    }
)


def _permuted(fault: Fault, order: Callable[[int], Array]) -> None:
    """Return the outputs in another order."""

    @fault.wraps(network.forward)
    def _(old: Any, *args: Any) -> Any:
        output, cache = old(*args)
        return output[:, order(output.shape[1])], cache

    @fault.wraps(network.backward)
    def _(old: Any, params: Tree, doutput: Array, cache: Tree) -> Any:
        return old(params, doutput[:, np.argsort(order(doutput.shape[1]))], cache)


fault("e-and-v-swapped").says(
    "The first half of the network's output is taken for the variance and the second for the "
    "noise. A model trained so works; loaded parameters do not."
).of(_permuted)(lambda count: np.roll(np.arange(count), count // 2))
fault("e-and-v-interleaved").says(
    "Noise and variance alternate in the network's output, [token_dim, 2] instead of [2, "
    "token_dim]."
).of(_permuted)(lambda count: np.arange(count).reshape(-1, 2).T.ravel())
