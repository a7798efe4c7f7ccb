"""``marref check --continuous``: every gradient of the continuous model, as `self_check` does.

The diffusion network starts with layers that are 0, behind which almost all gradients are exactly 0
for two steps: all parameters are drawn here, so that nothing hides.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from marref.continuous import diffusion, loss
from marref.continuous.layers import block, modulation, network, positions, silu
from marref.continuous.model import ContinuousMAR
from marref.continuous.variants import CausalMAR, CrossEntropy, Head, SquaredError, Variant
from marref.trees import Array, Tree
from marref.verify.gradients import METHODS, check_gradients, check_layer
from marref.verify.self_check import Layer, Row, layer_of, random_like, rows_of

_ROWS, _FEATURES, _TOKEN, _HEADS, _RATE = 5, 6, 4, 2, 0.2

MODEL = ContinuousMAR(
    image_size=4,
    encoder_dim=4,
    encoder_layers=1,
    decoder_dim=6,
    decoder_layers=1,
    num_heads=_HEADS,
    mlp_ratio=2,
    buffer_size=2,
    num_classes=3,
    diffusion_dim=4,
    diffusion_layers=1,
    diffusion_batch_mul=2,
    dropout=_RATE,
)
"""Small, its encoder and decoder of different widths."""


def run(seed: int = 0) -> Iterator[Row]:
    """Check the layers, both parts of the loss, the transformer, a small model, and its variants.

    Parameters
    ----------
    seed : int
        Of inputs and parameters.

    Yields
    ------
    Row
    """
    rng = np.random.default_rng(seed)
    for part, layer in _layers(rng).items():
        errors = {method: check_layer(*layer, rng, method=method) for method in METHODS}
        yield from rows_of(part, layer.point, errors)
    yield from _check_transformer(rng)
    yield from _check_diffusion(rng)
    yield from _check_model(rng)
    yield from _check_variants(rng)


def _layers(rng: np.random.Generator) -> dict[str, Layer]:
    x = rng.normal(size=(2, _ROWS, _FEATURES))
    rows = rng.normal(size=(_ROWS, _FEATURES))
    keep = block.draw_keep(rng, x.shape, _HEADS, 2 * _FEATURES, _RATE)
    of_block = functools.partial(
        block.forward, num_heads=_HEADS, epsilon=1e-6, keep=keep, dropout_rate=_RATE
    )
    time = np.array([0, 1, 250, 500, 999])
    of_network = random_like(network.init(rng, _TOKEN, _FEATURES, _FEATURES, 2), rng)
    return {
        "silu": Layer(
            lambda point: silu.forward(point["x"]),
            lambda point, dy, cache: {"x": silu.backward(dy, cache)},
            {"x": x},
        ),
        "positions": layer_of(
            x,
            rng,
            {"table": np.zeros((_ROWS, _FEATURES))},
            lambda params, x: (positions.forward(params, x), None),
            lambda params, dy, cache: positions.backward(dy),
        ),
        "modulation": Layer(
            lambda point: modulation.forward(**point),
            lambda point, dy, cache: dict(zip(point, modulation.backward(dy, cache), strict=True)),
            {name: rng.normal(size=rows.shape) for name in ("normalised", "shift", "scale")},
        ),
        "block": layer_of(
            x, rng, block.init(rng, _FEATURES, 2 * _FEATURES), of_block, block.backward
        ),
        "network": Layer(
            lambda point: network.forward(point["params"], point["x"], time, point["z"]),
            _network_backward,
            {"x": rng.normal(size=(_ROWS, _TOKEN)), "z": rows, "params": of_network},
        ),
    }


def _network_backward(point: Tree, dy: Array, cache: Tree) -> Tree:
    dx, dz, grads = network.backward(point["params"], dy, cache)
    return {"x": dx, "z": dz, "params": grads}


def _check_transformer(rng: np.random.Generator) -> Iterator[Row]:
    """Check encoder and decoder by z, beside which their gradients by the loss are minute."""
    tokens = rng.normal(size=(2, MODEL.length, MODEL.token_dim))
    masked = loss.masked_by(np.array([[2, 0, 3, 1], [1, 3, 0, 2]]), 2)
    keep = MODEL.draw_keep(rng, len(tokens), 2)
    labels = np.array([2, 3])
    params = random_like(MODEL.init(rng), rng)
    del params["diffusion"]
    errors = {
        method: check_layer(
            lambda point: MODEL.forward(point, tokens, labels, masked, keep),
            lambda point, dz, cache: MODEL.backward(point, dz, cache),
            params,
            rng,
            method=method,
        )
        for method in METHODS
    }
    yield from rows_of("transformer", params, errors)


def _check_diffusion(rng: np.random.Generator) -> Iterator[Row]:
    """Check the loss of a row by [e, v], at times of both kinds."""
    steps = diffusion.process("cosine")
    time = np.array([0, 0, 0, 1, 10, 500, 999])
    clean = np.clip(rng.normal(size=(len(time), _TOKEN)), -1.0, 1.0)
    noise = rng.normal(size=clean.shape)
    e, v = noise + 0.5 * rng.normal(size=clean.shape), rng.normal(size=clean.shape)
    output = np.concatenate([e, v], axis=1)
    arguments = clean, time, noise
    point = {"output": output}
    _, _, cache = diffusion.loss_forward(steps, output, *arguments)
    grads = {"output": diffusion.loss_backward(cache, np.ones(len(time)))}

    def function(moved: Tree) -> Any:
        return _detached(steps, moved["output"], e, *arguments).sum()

    errors = {method: check_gradients(function, point, grads, method=method) for method in METHODS}
    yield from rows_of("diffusion", point, errors)


def _detached(steps: diffusion.Process, output: Array, e: Array, *arguments: Array) -> Array:
    """Compute each row's loss, with this e in the bound, where it counts as a constant."""
    squared_error, _, _ = diffusion.loss_forward(steps, output, *arguments)
    v = output[:, e.shape[1] :]
    _, bound, _ = diffusion.loss_forward(steps, np.concatenate([e, v], axis=1), *arguments)
    rows: Array = squared_error + bound
    return rows


def _check_model(rng: np.random.Generator) -> Iterator[Row]:
    params = random_like(MODEL.init(rng), rng, 0.3)
    images = np.cos(0.37 * np.arange(32)).reshape(2, 1, 4, 4)
    labels = np.array([2, 0])
    draws = MODEL.draw(rng, len(images)) | {"num_masked": 3}
    draws["keep"] = MODEL.draw_keep(rng, len(images), draws["num_masked"])
    steps = diffusion.process(MODEL.noise_schedule)
    _, grads = loss.loss_and_grads(MODEL, params, images, labels, draws)
    output, rows, _ = loss.forward(MODEL, params, images, labels, draws)
    e = output[:, :_TOKEN]

    def function(moved: Tree) -> Any:
        output, _, _ = loss.forward(MODEL, moved, images, labels, draws)
        return _detached(steps, output, e, rows.clean, rows.time, rows.noise).mean()

    errors = {
        method: check_gradients(function, params, grads, method=method, max_entries=8, rng=rng)
        for method in METHODS
    }
    yield from rows_of("model", params, errors)


def _check_variants(rng: np.random.Generator) -> Iterator[Row]:
    """Check the causal backbone, and the two heads that are not the diffusion loss."""
    sizes = {**MODEL.as_dict(), "decoder_dim": MODEL.encoder_dim, "dropout": 0.0}
    heads: dict[str, Head] = {
        "causal, squares": SquaredError(_TOKEN),
        "causal, codes": CrossEntropy(rng.normal(size=(5, _TOKEN))),
    }
    images = rng.normal(size=(2, 1, 4, 4))
    for name, head in heads.items():
        variant = Variant(CausalMAR(**sizes), head)
        params = random_like(variant.init(rng), rng, 0.3)
        compute = functools.partial(
            variant.loss_and_grads, images=images, labels=[2, 0], draws=variant.draw(rng, 2)
        )
        _, grads = compute(params)
        value = functools.partial(_first_of, compute)
        errors = {
            method: check_gradients(value, params, grads, method=method, max_entries=8, rng=rng)
            for method in METHODS
        }
        yield from rows_of(name, params, errors)


def _first_of(compute: Callable[[Tree], Any], point: Tree) -> Any:
    return compute(point)[0]
