"""The network of the diffusion loss: what noise is in a token, given its condition z.

    y = time(t) + condition(z)            time(t) = linear(SiLU(linear(features(t))))
    h = input(x)
    h = h + gate ⊙ linear(SiLU(linear(modulated norm of h)))        a block, num_blocks times
    output = linear(modulated norm of h)                            [e, v], each as wide as x

shift, scale and gate of a block are a linear map of SiLU(y), as are shift and scale of the last
norm, which has no parameters of its own.  Rows do not see each other.  Li et al. 2024 (arXiv
2406.11838, section 4.3 and published code).  Page: docs/continuous.md.
"""

import numpy as np
import numpy.typing as npt

from marref.continuous.layers import modulation, silu, timestep, xavier
from marref.layers import layer_norm, linear
from marref.trees import Array, Tree

EPSILON = 1e-6
"""Of every norm, whatever that of the transformer."""

_PLAIN: Tree = {"scale": 1.0, "bias": 0.0}


def init(
    rng: np.random.Generator,
    token_dim: int,
    condition_dim: int,
    features: int,
    num_blocks: int,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw the network so that it returns 0 at first.

    The time's layers come from N(0, 0.02²), the modulations and the output are 0, and all else is
    drawn as Glorot and Bengio (published code).  Exactly 0 are then also the gradients of all but
    the output in the first step, and of all but the output, the input and the modulations in the
    second.

    Returns
    -------
    dict
        ``time_up`` [256, features], ``time_down``, ``condition`` [condition_dim, features],
        ``input`` [token_dim, features], ``blocks`` (each ``norm``, ``up``, ``down``, ``modulation``
        [features, 3·features]), ``final_modulation`` [features, 2·features], ``output``
        [features, 2·token_dim].
    """

    def zeros(outputs: int) -> Tree:
        return {
            "kernel": np.zeros((features, outputs), dtype),
            "bias": np.zeros(outputs, dtype),
        }

    return {
        "time_up": linear.init(rng, timestep.FEATURES, features, 0.02, dtype),
        "time_down": linear.init(rng, features, features, 0.02, dtype),
        "condition": xavier.init(rng, condition_dim, features, dtype),
        "input": xavier.init(rng, token_dim, features, dtype),
        "blocks": [
            {
                "norm": layer_norm.init(features, dtype),
                "up": xavier.init(rng, features, features, dtype),
                "down": xavier.init(rng, features, features, dtype),
                "modulation": zeros(3 * features),
            }
            for _ in range(num_blocks)
        ],
        "final_modulation": zeros(2 * features),
        "output": zeros(2 * token_dim),
    }


def forward(params: Tree, x: Array, timesteps: Array, z: Array) -> tuple[Array, Tree]:
    """Predict the noise and the variance of every row.

    Parameters
    ----------
    params : dict
    x : array [rows, token_dim]
        Noisy tokens.
    timesteps : integer array [rows]
    z : array [rows, condition_dim]

    Returns
    -------
    output : array [rows, 2·token_dim]
        e, then v.
    cache : dict
    """
    steering, cache = steering_forward(params, timesteps, z)
    cache["blocks"] = []
    h, cache["input"] = linear.forward(params["input"], x)
    for block in params["blocks"]:
        h, block_cache = block_forward(block, h, steering)
        cache["blocks"].append(block_cache)
    steer, cache["final_modulation"] = linear.forward(params["final_modulation"], steering)
    normalised, cache["final_norm"] = layer_norm.forward(_PLAIN, h, EPSILON)
    modulated, cache["modulated"] = modulation.forward(normalised, *np.split(steer, 2, axis=1))
    output, cache["output"] = linear.forward(params["output"], modulated)
    return output, cache


def backward(params: Tree, doutput: Array, cache: Tree) -> tuple[Array, Array, Tree]:
    """Push ``doutput`` back: `forward` read from bottom to top.

    SiLU(y) steers every block and the last norm, so their gradients add up in it.

    Returns
    -------
    dx : array [rows, token_dim]
    dz : array [rows, condition_dim]
    grads : dict
        Like ``params``.
    """
    grads: Tree = {}
    dmodulated, grads["output"] = linear.backward(params["output"], doutput, cache["output"])
    dnormalised, *dsteer = modulation.backward(dmodulated, cache["modulated"])
    dh, _ = layer_norm.backward(_PLAIN, dnormalised, cache["final_norm"])
    dsteering, grads["final_modulation"] = linear.backward(
        params["final_modulation"], np.concatenate(dsteer, axis=1), cache["final_modulation"]
    )
    last_first = []
    for block, block_cache in zip(
        reversed(params["blocks"]), reversed(cache["blocks"]), strict=True
    ):
        dh, dsteer_of_block, of_block = block_backward(block, dh, block_cache)
        dsteering = dsteering + dsteer_of_block
        last_first.append(of_block)
    dx, grads["input"] = linear.backward(params["input"], dh, cache["input"])
    dz, of_steering = steering_backward(params, dsteering, cache)
    grads |= {**of_steering, "blocks": last_first[::-1]}
    return dx, dz, {name: grads[name] for name in params}


def steering_forward(params: Tree, timesteps: Array, z: Array) -> tuple[Array, Tree]:
    """Compute SiLU(time(t) + condition(z)): [rows, features]."""
    cache: Tree = {}
    hidden, cache["time_up"] = linear.forward(
        params["time_up"], timestep.features(timesteps, z.dtype)
    )
    activation, cache["time_silu"] = silu.forward(hidden)
    time, cache["time_down"] = linear.forward(params["time_down"], activation)
    condition, cache["condition"] = linear.forward(params["condition"], z)
    steering, cache["silu"] = silu.forward(time + condition)
    return steering, cache


def steering_backward(params: Tree, dsteering: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dsteering`` back.

    Returns
    -------
    dz : array [rows, condition_dim]
    grads : dict
        Of ``time_up``, ``time_down`` and ``condition``.
    """
    grads: Tree = {}
    dy = silu.backward(dsteering, cache["silu"])
    dz, grads["condition"] = linear.backward(params["condition"], dy, cache["condition"])
    dactivation, grads["time_down"] = linear.backward(params["time_down"], dy, cache["time_down"])
    dhidden = silu.backward(dactivation, cache["time_silu"])
    _, grads["time_up"] = linear.backward(params["time_up"], dhidden, cache["time_up"])
    return dz, grads


def block_forward(params: Tree, h: Array, steering: Array) -> tuple[Array, Tree]:
    """Compute h + gate ⊙ linear(SiLU(linear(norm(h) (1 + scale) + shift))).

    Parameters
    ----------
    params : dict
    h : array [rows, features]
    steering : array [rows, features]
        SiLU(y).
    """
    cache: Tree = {}
    steer, cache["modulation"] = linear.forward(params["modulation"], steering)
    shift, scale, gate = np.split(steer, 3, axis=1)
    normalised, cache["norm"] = layer_norm.forward(params["norm"], h, EPSILON)
    modulated, cache["modulated"] = modulation.forward(normalised, shift, scale)
    hidden, cache["up"] = linear.forward(params["up"], modulated)
    activation, cache["silu"] = silu.forward(hidden)
    branch, cache["down"] = linear.forward(params["down"], activation)
    return h + gate * branch, {**cache, "gate": gate, "branch": branch}


def block_backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Array, Tree]:
    """Push ``dy`` back through h + gate ⊙ branch.

    ∂/∂branch = gate and ∂/∂gate = branch, entry by entry; h itself goes straight through.

    Returns
    -------
    dh, dsteering : arrays [rows, features]
    grads : dict
        Like ``params``.
    """
    grads = {}
    dactivation, grads["down"] = linear.backward(params["down"], dy * cache["gate"], cache["down"])
    dhidden = silu.backward(dactivation, cache["silu"])
    dmodulated, grads["up"] = linear.backward(params["up"], dhidden, cache["up"])
    dnormalised, dshift, dscale = modulation.backward(dmodulated, cache["modulated"])
    dbranch, grads["norm"] = layer_norm.backward(params["norm"], dnormalised, cache["norm"])
    dsteer = np.concatenate([dshift, dscale, dy * cache["branch"]], axis=1)
    dsteering, grads["modulation"] = linear.backward(
        params["modulation"], dsteer, cache["modulation"]
    )
    return dy + dbranch, dsteering, {name: grads[name] for name in params}
