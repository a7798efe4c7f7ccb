"""The diffusion network over packed parameters, forward alone: what sampling runs a chain of.

Two identities, both exact, move work from the rows to the parameters, once for a call:

1. Shift, scale and gate of all blocks, and those of the last norm, are linear maps of the same
   SiLU(y): they become one product.

2. A block's norm has parameters of its own, γ and β, in front of the modulation.  With the
   normalised h as ĥ = √n n (`marref.fast.kernels.normalise`),

       (γ ⊙ ĥ + β) ⊙ (1 + scale) + shift = n ⊙ √n γ ⊙ (1 + scale) + (β ⊙ (1 + scale) + shift)

   and what n is multiplied by, and what is added, are linear maps of SiLU(y) too.

Only norms read h, so it is kept without its mean.
"""

import math
from typing import NamedTuple

import numpy as np

from marref.continuous.layers.network import EPSILON
from marref.fast.kernels import linear, normalise, remove_mean
from marref.trees import Array, Tree

_Linear = tuple[Array, Array]


class Packed(NamedTuple):
    """Kernels and biases; ``steer`` computes [features] of each: added, factor and gate."""

    input: _Linear
    steer: _Linear
    blocks: list[tuple[_Linear, _Linear]]
    output: _Linear


def pack(params: Tree) -> Packed:
    """Pack the parameters of the network."""
    steers = [_steer(block["modulation"], block["norm"]) for block in params["blocks"]]
    bias = params["input"]["bias"]
    no_norm = {"scale": np.ones_like(bias), "bias": np.zeros_like(bias)}
    steers.append(_steer(params["final_modulation"], no_norm))
    kernels, biases = zip(*steers, strict=True)
    return Packed(
        _linear(params["input"]),
        (np.concatenate(kernels, axis=1), np.concatenate(biases)),
        [(_linear(block["up"]), _linear(block["down"])) for block in params["blocks"]],
        _linear(params["output"]),
    )


def forward(packed: Packed, noisy: Array, y: Array) -> Array:
    """Compute [e, v] of rows; ``y`` is written over.

    Parameters
    ----------
    packed : Packed
    noisy : array [rows, token_dim]
    y : array [rows, features]
        time(t) + condition(z).

    Returns
    -------
    array [rows, 2·token_dim]
    """
    h = remove_mean(linear(noisy, *packed.input))
    steer = linear(_silu(y), *packed.steer).reshape(len(h), -1, h.shape[1])
    for index, (up, down) in enumerate(packed.blocks):
        added, factor, gate = (steer[:, 3 * index + part] for part in range(3))
        branch = linear(_silu(linear(_modulated(h, added, factor), *up)), *down)
        branch *= gate
        h += branch
        remove_mean(h)
    return linear(_modulated(h, steer[:, -2], steer[:, -1]), *packed.output)


def _steer(modulation: Tree, norm: Tree) -> _Linear:
    """Compute the map from SiLU(y) to what is added, the factor, and the gate if there is one."""
    width = len(norm["scale"])
    kernel_and_bias = np.vstack([modulation["kernel"], modulation["bias"]])
    shift, scale, gate = np.split(kernel_and_bias, [width, 2 * width], axis=1)
    scale[-1] += 1.0
    factor = scale * (math.sqrt(width) * norm["scale"])
    packed = np.concatenate([shift + scale * norm["bias"], factor, gate], axis=1)
    return packed[:-1], packed[-1]


def _linear(params: Tree) -> _Linear:
    return params["kernel"], params["bias"]


def _modulated(h: Array, added: Array, factor: Array) -> Array:
    y, _ = normalise(h, EPSILON)
    y *= factor
    y += added
    return y


def _silu(x: Array) -> Array:
    """Compute x σ(x), over ``x``."""
    odds = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(odds, out=odds)
    odds += 1.0
    x /= odds
    return x
