"""The diffusion loss of the masked tokens, and its gradient by every parameter.

    L = Σ_rows mask (squared error + bound) / Σ_rows mask

Rows are the tokens of the batch, diffusion_batch_mul times over, each with its own time and noise;
`marref.continuous.diffusion.loss_forward` has both parts.  A row that is not masked counts
nothing, and nothing is computed for it.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from marref import checks, trees
from marref.continuous import diffusion, tokens
from marref.continuous.layers import network
from marref.continuous.model import ContinuousMAR, check_model
from marref.trees import Array, Tree


def loss_and_grads(
    model: ContinuousMAR,
    params: Tree,
    images: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    draws: Tree,
    *,
    return_parts: bool = False,
) -> Any:
    """Run the model and the loss forward, and both backward.

    Parameters
    ----------
    model : ContinuousMAR
    params : dict
    images : float array [batch, channels, image_size, image_size]
        Scaled to a standard deviation of about 1.
    labels : integer array [batch], optional
        In [0, num_classes]; num_classes is "no class", as all are without labels.
    draws : dict
        All that is random: from ``model.draw(rng, batch)``.
    return_parts : bool

    Returns
    -------
    loss : scalar
    grads : dict
        A tree like ``params``.
    parts : dict
        With ``return_parts``: ``squared_error`` and ``bound`` (bits), whose sum is the loss, and
        ``rows``: both row by row, for masked rows only, and ``index``, the place in `Rows`.

    Raises
    ------
    TypeError, ValueError
        Something does not fit the model.
    """
    output, rows, cache = forward(model, params, images, labels, draws)
    error, bound, of_loss = diffusion.loss_forward(
        diffusion.process(model.noise_schedule), output, rows.clean, rows.time, rows.noise
    )
    grads = backward(model, params, of_loss, rows, cache)
    loss = error.mean() + bound.mean()
    if not return_parts:
        return loss, grads
    of_rows = {"squared_error": error, "bound": bound, "index": rows.place}
    return loss, grads, {"squared_error": error.mean(), "bound": bound.mean(), "rows": of_rows}


class Rows(NamedTuple):
    """The masked tokens that the network is trained with."""

    place: Array
    """[rows]; the place of each among diffusion_batch_mul copies of the batch."""
    clean: Array
    """[rows, token_dim]."""
    time: Array
    """[rows]."""
    noise: Array
    """[rows, token_dim]."""


def forward(
    model: ContinuousMAR,
    params: Tree,
    images: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    draws: Tree,
) -> tuple[Array, Rows, Tree]:
    """Compute what the network returns for the masked tokens; arguments as of `loss_and_grads`.

    Returns
    -------
    output : array [rows, 2·token_dim]
    rows : Rows
    cache : dict
    """
    check_model(model)
    dtype = trees.check_like("params", params, model.parameter_shapes)
    images = model.check_images(images)
    labels = model.check_labels(labels, len(images))
    check_draws(model, draws, len(images))
    labels = np.where(draws["label_dropped"], model.num_classes or 0, labels)
    masked = masked_by(draws["orders"], draws["num_masked"])
    clean = tokens.from_images(images, model.patch_size).astype(dtype)
    z, of_model = model.forward(params, clean, labels, masked, draws.get("keep"))

    index = np.flatnonzero(np.tile(masked.ravel(), model.diffusion_batch_mul))
    of_token = index % masked.size
    time, noise = draws["timesteps"][index], draws["noise"][index].astype(dtype)
    rows = Rows(index, clean.reshape(-1, model.token_dim)[of_token], time, noise)
    noisy = diffusion.add_noise(diffusion.process(model.noise_schedule), rows.clean, time, noise)
    conditions = z.reshape(-1, model.decoder_dim)[of_token]
    output, of_network = network.forward(params["diffusion"], noisy, time, conditions)
    return output, rows, {"model": of_model, "network": of_network, "shape": z.shape}


def backward(model: ContinuousMAR, params: Tree, of_loss: Tree, rows: Rows, cache: Tree) -> Tree:
    """Push the mean over all rows back to every parameter.

    A token that stands in several rows has the sum of their gradients.
    """
    count = len(rows.place)
    doutput = diffusion.loss_backward(of_loss, np.full(count, 1.0 / count, rows.clean.real.dtype))
    _, dconditions, dnetwork = network.backward(params["diffusion"], doutput, cache["network"])
    dz = np.zeros((cache["shape"][0] * cache["shape"][1], model.decoder_dim), dconditions.dtype)
    np.add.at(dz, rows.place % len(dz), dconditions)
    grads = model.backward(params, dz.reshape(cache["shape"]), cache["model"])
    return {**grads, "diffusion": dnetwork}


def masked_by(orders: Array, num_masked: int) -> Array:
    """Mask the first of each order: bool [batch, length]."""
    masked = np.zeros(orders.shape, np.bool_)
    np.put_along_axis(masked, orders[:, :num_masked], True, axis=1)
    return masked


def check_draws(model: ContinuousMAR, draws: Tree, batch_size: int) -> None:
    """Raise unless the draws fit the model and the batch."""
    missing = {"orders", "num_masked", "label_dropped", "timesteps", "noise"} - draws.keys()
    if missing:
        raise ValueError(f"draws: {', '.join(sorted(missing))} missing, see ContinuousMAR.draw")
    num_rows = model.diffusion_batch_mul * batch_size * model.length
    shapes = {
        "orders": (batch_size, model.length),
        "label_dropped": (batch_size,),
        "timesteps": (num_rows,),
        "noise": (num_rows, model.token_dim),
    }
    for name, shape in shapes.items():
        checks.shape(f"draws: {name}", np.asarray(draws[name]), shape)
    if (np.sort(draws["orders"], axis=1) != np.arange(model.length)).any():
        raise ValueError(f"draws: orders, expected permutations of 0 to {model.length - 1}")
    checks.integer("draws: num_masked", draws["num_masked"], 1, model.length)
    times = np.asarray(draws["timesteps"])
    if times.dtype.kind not in "iu" or ((times < 0) | (times >= diffusion.NUM_TIMESTEPS)).any():
        raise ValueError(
            f"draws: timesteps, expected integers in [0, {diffusion.NUM_TIMESTEPS - 1}]"
        )
    checks.finite("draws: noise", np.asarray(draws["noise"]))
