"""The diffusion network in few passes, and its loss: some rows at a time, forward and backward.

The condition's part of y belongs to a token and the time's to a time, so each is computed once,
however many rows have them.  Rows do not see each other: a chunk of them goes through the network,
its loss and back before the next comes, and what the passes work on stays in the cache.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from marref import trees
from marref.continuous import diffusion
from marref.continuous.layers import timestep
from marref.continuous.layers.network import EPSILON
from marref.fast.kernels import linear, normalise, normalise_backward, remove_mean
from marref.trees import Array, Tree

_ROWS_AT_ONCE = 512


class Batch(NamedTuple):
    """The rows of a part: tokens, and the copies of each with times and noise of their own.

    Parameters
    ----------
    clean : array [tokens, token_dim]
    time : integer array [copies, tokens]
    noise : array [copies, tokens, token_dim]
    """

    clean: Array
    time: Array
    noise: Array


class Loss(NamedTuple):
    """Sums over the rows of a part: both parts of the loss, and gradients of what is given."""

    squared_error: float
    bound: float
    dz: Array
    grads: Tree


def loss_and_grads(
    steps: diffusion.Process, params: Tree, z: Array, rows: Batch, num_rows: int
) -> Loss:
    """Compute the loss of all rows, and push it back.

    Parameters
    ----------
    steps : Process
    params : dict
        Of the network.
    z : array [tokens, condition_dim]
    rows : Batch
    num_rows : int
        Of the whole batch: what gradients are divided by.

    Returns
    -------
    Loss
    """
    times, place = np.unique(rows.time, return_inverse=True)
    time, of_time = time_forward(params, times, z.dtype)
    condition = linear(z, **params["condition"])
    dy = np.empty((rows.time.size, condition.shape[1]), z.dtype)
    token = np.tile(np.arange(len(z)), len(rows.time))
    place, noise = place.ravel(), rows.noise.reshape(len(token), -1)
    squared_error = bound = 0.0
    grads = _zeros(params)
    for start in range(0, len(token), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        y = time[place[part]]
        y += condition[token[part]]
        clean, index = rows.clean[token[part]], times[place[part]]
        noisy = diffusion.add_noise(steps, clean, index, noise[part])
        output, cache = forward(params, noisy, y)
        errors, bounds, of_loss = diffusion.loss_forward(steps, output, clean, index, noise[part])
        squared_error += float(errors.sum())
        bound += float(bounds.sum())
        doutput = diffusion.loss_backward(
            of_loss, np.full(len(output), 1.0 / num_rows, output.dtype)
        )
        dy[part] = backward(params, doutput, cache, grads)
    dcondition = dy.reshape(len(rows.time), len(z), -1).sum(axis=0)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(times)))
    time_backward(params, np.add.reduceat(dy[order], starts, axis=0), of_time, grads)
    grads["condition"] = {"kernel": z.T @ dcondition, "bias": dcondition.sum(axis=0)}
    dz = dcondition @ params["condition"]["kernel"].T
    return Loss(squared_error, bound, dz, grads)


def time_forward(params: Tree, times: Array, dtype: npt.DTypeLike) -> tuple[Array, Tree]:
    """Compute the time's part of y: [times, features]."""
    features = timestep.features(times, dtype)
    hidden, slope = silu(linear(features, **params["time_up"]))
    cache = {"features": features, "hidden": hidden, "slope": slope}
    return linear(hidden, **params["time_down"]), cache


def time_backward(params: Tree, dtime: Array, cache: Tree, grads: Tree) -> None:
    """Push ``dtime`` back to the time's two layers."""
    grads["time_down"] = {"kernel": cache["hidden"].T @ dtime, "bias": dtime.sum(axis=0)}
    dhidden = dtime @ params["time_down"]["kernel"].T
    dhidden *= cache["slope"]
    grads["time_up"] = {"kernel": cache["features"].T @ dhidden, "bias": dhidden.sum(axis=0)}


class _Block(NamedTuple):
    steer: Array
    normal: Array
    root: Array
    normalised: Array
    modulated: Array
    activation: Array
    slope: Array
    branch: Array


class Cache(NamedTuple):
    """What `backward` needs of `forward`."""

    noisy: Array
    steering: Array
    slope: Array
    blocks: list[_Block]
    final: tuple[Array, Array, Array, Array]


def forward(params: Tree, noisy: Array, y: Array) -> tuple[Array, Cache]:
    """Compute [e, v] of rows; ``y`` is written over.

    Parameters
    ----------
    params : dict
    noisy : array [rows, token_dim]
    y : array [rows, features]
        time(t) + condition(z).

    Returns
    -------
    output : array [rows, 2·token_dim]
    cache : Cache
    """
    steering, slope = silu(y)
    h = linear(noisy, **params["input"])
    root_n = math.sqrt(h.shape[1])
    blocks = []
    for block in params["blocks"]:
        steer = linear(steering, **block["modulation"])
        shift, scale, gate = np.split(steer, 3, axis=1)
        normal, root = _normalised(h)
        normalised = normal * (root_n * block["norm"]["scale"])
        normalised += block["norm"]["bias"]
        scale += 1.0
        modulated = normalised * scale
        modulated += shift
        activation, of_silu = silu(linear(modulated, **block["up"]))
        branch = linear(activation, **block["down"])
        h += gate * branch
        blocks.append(
            _Block(steer, normal, root, normalised, modulated, activation, of_silu, branch)
        )
    steer = linear(steering, **params["final_modulation"])
    shift, scale = np.split(steer, 2, axis=1)
    normal, root = _normalised(h)
    scale += 1.0
    scale *= root_n
    modulated = normal * scale
    modulated += shift
    output = linear(modulated, **params["output"])
    return output, Cache(noisy, steering, slope, blocks, (steer, normal, root, modulated))


def backward(params: Tree, doutput: Array, cache: Cache, grads: Tree) -> Array:
    """Push ``doutput`` back to y: [rows, features]; add to the gradients of the parameters."""
    steer, normal, root, modulated = cache.final
    width = normal.shape[1]
    root_n = math.sqrt(width)
    _add(grads["output"], modulated, doutput)
    dmodulated = doutput @ params["output"]["kernel"].T
    dsteer = np.empty_like(steer)
    dsteer[:, :width] = dmodulated
    np.multiply(dmodulated, normal, out=dsteer[:, width:])
    dsteer[:, width:] *= root_n
    dmodulated *= steer[:, width:]
    dh = remove_mean(normalise_backward(dmodulated, normal, root))
    _add(grads["final_modulation"], cache.steering, dsteer)
    dsteering = dsteer @ params["final_modulation"]["kernel"].T
    for block, of_block, of_grads in zip(
        reversed(params["blocks"]), reversed(cache.blocks), reversed(grads["blocks"]), strict=True
    ):
        dh, dsteer = _block_backward(block, dh, of_block, of_grads)
        _add(of_grads["modulation"], cache.steering, dsteer)
        dsteering += dsteer @ block["modulation"]["kernel"].T
    _add(grads["input"], cache.noisy, dh)
    dy: Array = dsteering * cache.slope
    return dy


def _block_backward(params: Tree, dh: Array, cache: _Block, grads: Tree) -> tuple[Array, Array]:
    """Push ``dh`` back through a block, over it; return it and the gradient of what steers."""
    width = dh.shape[1]
    root_n = math.sqrt(width)
    _, scale, gate = np.split(cache.steer, 3, axis=1)
    dsteer = np.empty_like(cache.steer)
    np.multiply(dh, cache.branch, out=dsteer[:, 2 * width :])
    dbranch = dh * gate
    _add(grads["down"], cache.activation, dbranch)
    dhidden = dbranch @ params["down"]["kernel"].T
    dhidden *= cache.slope
    _add(grads["up"], cache.modulated, dhidden)
    dmodulated = dhidden @ params["up"]["kernel"].T
    dsteer[:, :width] = dmodulated
    np.multiply(dmodulated, cache.normalised, out=dsteer[:, width : 2 * width])
    dmodulated *= scale
    grads["norm"]["bias"] += dmodulated.sum(axis=0)
    grads["norm"]["scale"] += root_n * (dmodulated * cache.normal).sum(axis=0)
    dmodulated *= root_n * params["norm"]["scale"]
    dh += remove_mean(normalise_backward(dmodulated, cache.normal, cache.root))
    return dh, dsteer


def silu(x: Array) -> tuple[Array, Array]:
    """Compute x σ(x) over ``x`` and its derivative, σ + x σ (1 - σ)."""
    slope = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(slope, out=slope)
    slope += 1.0
    np.divide(1.0, slope, out=slope)
    x *= slope
    # σ + y (1 - σ) = σ (1 - y) + y
    slope *= 1.0 - x
    slope += x
    return x, slope


def _normalised(h: Array) -> tuple[Array, Array]:
    """Take the mean off, and normalise; ``h`` stays."""
    return normalise(remove_mean(h.copy()), EPSILON)


def _add(grads: Tree, x: Array, dy: Array) -> None:
    """Add the gradients of a linear map."""
    grads["kernel"] += x.T @ dy
    grads["bias"] += dy.sum(axis=0)


def _zeros(params: Tree) -> Tree:
    """Make zeros for what chunks add to."""
    names = ("input", "blocks", "final_modulation", "output")
    zeros: Tree = trees.map_leaves(np.zeros_like, {name: params[name] for name in names})
    return zeros
