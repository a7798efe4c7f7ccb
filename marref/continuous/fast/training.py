"""The loss and all gradients of the continuous model, as `marref.continuous.loss` defines them."""

import functools
import operator
from typing import Any, NamedTuple

import numpy as np

from marref import trees
from marref.continuous import diffusion, loss, tokens
from marref.continuous.fast import network, transformer
from marref.continuous.fast.transformer import PackedModel
from marref.continuous.hyperparameters import of_told_scale
from marref.continuous.model import ContinuousMAR
from marref.fast import parallel
from marref.fast.pieces import pieces
from marref.trees import Array, Tree


class Result(NamedTuple):
    """Gradients, a tree like the parameters, and the two parts of the loss."""

    grads: Tree
    squared_error: float
    bound: float


def loss_and_grads(
    model: ContinuousMAR,
    params: Tree,
    images: Array,
    labels: Array,
    draws: Tree,
    num_parts: int,
) -> Result:
    """Compute what `marref.continuous.loss.loss_and_grads` does, a part of the batch at a time.

    Arguments are as there, and are not checked.  With dropout it is the definition that is run.

    Parameters
    ----------
    num_parts : int
        Each is a thread's, as far as there are cores; the last digits depend on it, and not on how
        many cores there are.
    """
    rows = parallel.split(len(images), num_parts)
    with parallel.threads(min(len(rows), parallel.num_cores())) as run:
        if model.dropout:
            of_part = functools.partial(by_definition, model, params, images, labels, draws)
            with of_told_scale():
                total: Result = functools.reduce(_added, run(of_part, rows))
            return total
        packed = transformer.pack_model(model, params)
        of_part = functools.partial(_of_part, model, params, packed, images, labels, draws)
        first, *others = run(of_part, rows)
        for other in others:
            run(operator.iadd, *zip(*pieces(first.grads, other.grads), strict=True))
        diffuses = first.grads.pop("diffusion")
        grads = {**transformer.unpack(model, params, first.grads), "diffusion": diffuses}
        squared_error = sum(part.squared_error for part in (first, *others))
        bound = sum(part.bound for part in (first, *others))
    return Result({name: grads[name] for name in params}, squared_error, bound)


def _of_part(
    model: ContinuousMAR,
    params: Tree,
    packed: PackedModel,
    images: Array,
    labels: Array,
    draws: Tree,
    where: slice,
) -> Result:
    """Compute what some sequences add; gradients of packed parameters."""
    dtype = params["mask_vector"].dtype
    clean = tokens.from_images(images[where], model.patch_size).astype(dtype)
    classes = np.where(draws["label_dropped"][where], model.num_classes or 0, labels[where])
    masked = loss.masked_by(draws["orders"][where], draws["num_masked"])
    z, cache = transformer.forward(model, params, packed, clean, classes, masked, masked, keep=True)
    copies = model.diffusion_batch_mul, len(images), model.length
    time, noise = (
        draws[name].reshape(*copies, *draws[name].shape[1:])[:, where][:, masked]
        for name in ("timesteps", "noise")
    )
    count = copies[0] * len(images) * draws["num_masked"]
    found = network.loss_and_grads(
        diffusion.process(model.noise_schedule),
        params["diffusion"],
        z,
        network.Batch(clean[masked], time, noise.astype(dtype)),
        count,
    )
    grads = transformer.backward(model, params, packed, found.dz, cache)
    grads["diffusion"] = {name: found.grads[name] for name in params["diffusion"]}
    return Result(grads, found.squared_error / count, found.bound / count)


def by_definition(
    model: ContinuousMAR, params: Tree, images: Array, labels: Array, draws: Tree, where: slice
) -> Result:
    """Compute what some sequences add by the definition."""
    classes = None if model.num_classes is None else labels[where]
    _, grads, parts = loss.loss_and_grads(
        model, params, images[where], classes, part_of(model, draws, where), return_parts=True
    )
    share = len(images[where]) / len(images)
    grads = trees.map_leaves(lambda leaf: leaf * share, grads)
    return Result(grads, share * float(parts["squared_error"]), share * float(parts["bound"]))


def _added(one: Result, other: Result) -> Result:
    grads = trees.map_leaves(operator.add, one.grads, other.grads)
    return Result(grads, one.squared_error + other.squared_error, one.bound + other.bound)


def part_of(model: ContinuousMAR, draws: Tree, where: slice) -> dict[str, Any]:
    """Choose the draws of some sequences; the rows of the loss are copies of the whole batch."""
    part = {**draws, **{name: draws[name][where] for name in ("orders", "label_dropped")}}
    for name in ("timesteps", "noise"):
        width = draws[name].shape[1:]
        copies = draws[name].reshape(model.diffusion_batch_mul, -1, model.length, *width)
        part[name] = copies[:, where].reshape(-1, *width)
    if "keep" in draws:
        part["keep"] = trees.map_leaves(lambda leaf: leaf[where], draws["keep"])
    return part
