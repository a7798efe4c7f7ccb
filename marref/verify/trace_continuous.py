"""The named arrays of a training step of continuous MAR, in the order in which they are computed.

They are what functions of the definition were given and returned: the step is run while these are
recorded, so that a fault that is applied shows in them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from marref import trees
from marref.continuous import diffusion, loss, tokens
from marref.continuous.layers import block, modulation, network
from marref.continuous.model import ContinuousMAR
from marref.layers import gelu, linear
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault


class Call(NamedTuple):
    """What a function was given and returned."""

    args: tuple[Any, ...]
    result: Any


@contextlib.contextmanager
def recorded(*functions: Callable[..., Any]) -> Iterator[dict[Callable[..., Any], list[Call]]]:
    """Record the calls of functions of the definition, in order, until the context ends."""
    calls: dict[Callable[..., Any], list[Call]] = {function: [] for function in functions}
    recorder = Fault("recorder")
    for function, of_function in calls.items():
        recorder.wraps(function)(_recording(of_function))
    with recorder.applied():
        yield calls


def _recording(calls: list[Call]) -> Callable[..., Any]:
    def record(old: Callable[..., Any], *args: Any, **options: Any) -> Any:
        calls.append(Call(args, old(*args, **options)))
        return calls[-1].result

    return record


class Passes(NamedTuple):
    """What the forward and the backward pass compute of a batch."""

    activations: dict[str, Array]
    losses: dict[str, Array]
    grads: Tree
    activation_gradients: dict[str, Array]


def passes(model: ContinuousMAR, params: Tree, batch: dict[str, Array]) -> Passes:
    """Run a training step and name what it computes.

    Parameters
    ----------
    model : ContinuousMAR
        Without dropout.
    params : dict
    batch : dict
        ``images``, with classes ``labels``, and what `ContinuousMAR.draw` returns.

    Returns
    -------
    activations : dict of str to array
        In the order of computation; ``<part>`` is ``encoder`` or ``decoder``, ``<i>`` counts blocks
        from 0, ``places`` are buffer_size + length in the decoder and buffer_size + visible in the
        encoder, ``rows`` the masked tokens of all copies of the batch:

        ``tokens``                                     [batch, length, token_dim]
        ``encoder_input``                              [batch, places, encoder_dim]
        ``<part>_blocks.<i>.input``                    [batch, places, width]
        ``<part>_blocks.<i>.attention_norm``           [batch, places, width]
        ``<part>_blocks.<i>.attention.query``          [batch, num_heads, places, head_dim]
        ``<part>_blocks.<i>.attention.key``            [batch, num_heads, places, head_dim]
        ``<part>_blocks.<i>.attention.value``          [batch, num_heads, places, head_dim]
        ``<part>_blocks.<i>.attention.weights``        [batch, num_heads, places, places]
        ``<part>_blocks.<i>.attention.context``        [batch, places, width]
        ``<part>_blocks.<i>.attention.output``         [batch, places, width]
        ``<part>_blocks.<i>.feed_forward_norm``        [batch, places, width]
        ``<part>_blocks.<i>.feed_forward.up``          [batch, places, hidden]
        ``<part>_blocks.<i>.feed_forward.activation``  [batch, places, hidden]
        ``<part>_blocks.<i>.feed_forward.down``        [batch, places, width]
        ``<part>_blocks.<i>.output``                   [batch, places, width]
        ``encoder_norm``                               [batch, places, encoder_dim]
        ``z``                                          [batch, length, decoder_dim]
        ``noisy``                                      [rows, token_dim]
        ``network.time_features``                      [rows, 256]
        ``network.time``                               [rows, diffusion_dim]
        ``network.condition``                          [rows, diffusion_dim]
        ``network.steering``                           [rows, diffusion_dim]
        ``network.blocks.<i>.input``                   [rows, diffusion_dim]
        ``network.blocks.<i>.norm``                    [rows, diffusion_dim]
        ``network.blocks.<i>.shift``                   [rows, diffusion_dim]
        ``network.blocks.<i>.scale``                   [rows, diffusion_dim]
        ``network.blocks.<i>.gate``                    [rows, diffusion_dim]
        ``network.blocks.<i>.modulated``               [rows, diffusion_dim]
        ``network.blocks.<i>.activation``              [rows, diffusion_dim]
        ``network.blocks.<i>.branch``                  [rows, diffusion_dim]
        ``network.blocks.<i>.output``                  [rows, diffusion_dim]
        ``network.norm``                               [rows, diffusion_dim]
        ``network.shift``                              [rows, diffusion_dim]
        ``network.scale``                              [rows, diffusion_dim]
        ``network.modulated``                          [rows, diffusion_dim]
        ``e``                                          [rows, token_dim]
        ``v``                                          [rows, token_dim]
    losses : dict of str to array
        ``loss/rows/squared_error`` and ``loss/rows/bound`` [rows], their means
        ``loss/squared_error`` and ``loss/bound``, and ``loss``.
    grads : dict
    activation_gradients : dict of str to array
        ``output``, of e and v side by side, ``z``, and ``<part>_blocks.<i>.output``.
    """
    draws = {**batch, "num_masked": int(batch["num_masked"])}
    with recorded(*_FUNCTIONS) as calls:
        value, grads, parts = loss.loss_and_grads(
            model, params, batch["images"], batch.get("labels"), draws, return_parts=True
        )
    rows = parts["rows"]
    losses = {
        "loss/rows/squared_error": rows["squared_error"],
        "loss/rows/bound": rows["bound"],
        "loss/squared_error": np.asarray(parts["squared_error"]),
        "loss/bound": np.asarray(parts["bound"]),
        "loss": np.asarray(value),
    }
    activations = _transformer(model, params, calls) | _network(params["diffusion"], calls)
    return Passes(activations, losses, grads, _gradients(model, calls))


_FUNCTIONS = (
    tokens.from_images,
    ContinuousMAR.embed,
    ContinuousMAR.encode,
    ContinuousMAR.forward,
    ContinuousMAR.backward,
    block.forward,
    block.backward,
    gelu.forward,
    diffusion.add_noise,
    network.forward,
    network.backward,
    network.steering_forward,
    network.block_forward,
    modulation.forward,
)


def blocks_of(model: ContinuousMAR) -> list[str]:
    """Name the blocks of the encoder and the decoder, in the order of computation."""
    layers = {"encoder": model.encoder_layers, "decoder": model.decoder_layers}
    return [f"{part}_blocks.{index}" for part, num in layers.items() for index in range(num)]


def _transformer(model: ContinuousMAR, params: Tree, calls: Any) -> dict[str, Array]:
    named = {
        "tokens": calls[tokens.from_images][0].result,
        "encoder_input": calls[ContinuousMAR.embed][0].result[0],
    }
    # Of the calls of GELU those of the blocks are the first: a fault may call it in the network.
    of_blocks = zip(blocks_of(model), calls[block.forward], calls[gelu.forward], strict=False)
    for name, of_block, of_gelu in of_blocks:
        if name == "decoder_blocks.0":
            named["encoder_norm"] = calls[ContinuousMAR.encode][0].result[0]
        arrays = _block(of_block, of_gelu)
        named |= {f"{name}.{part}": array for part, array in arrays.items()}
    return {**named, "z": calls[ContinuousMAR.forward][0].result[0]}


def _block(call: Call, of_gelu: Call) -> dict[str, Array]:
    (params, x), (y, cache) = call.args, call.result
    return {
        "input": x,
        "attention_norm": cache["normal"],
        **{f"attention.{name}": cache[name] for name in ("query", "key", "value", "weights")},
        "attention.context": cache["context"],
        "attention.output": linear.forward(params["attention"]["output"], cache["context"])[0],
        "feed_forward_norm": cache["normal_h"],
        "feed_forward.up": of_gelu.args[0],
        "feed_forward.activation": of_gelu.result[0],
        "feed_forward.down": linear.forward(params["feed_forward"]["down"], cache["hidden"])[0],
        "output": y,
    }


def _network(params: Tree, calls: Any) -> dict[str, Array]:
    output, cache = calls[network.forward][0].result
    named = {
        "noisy": calls[diffusion.add_noise][0].result,
        "network.time_features": cache["time_up"],
        "network.time": linear.forward(params["time_down"], cache["time_down"])[0],
        "network.condition": linear.forward(params["condition"], cache["condition"])[0],
        "network.steering": calls[network.steering_forward][0].result[0],
    }
    *modulations, last = calls[modulation.forward]
    of_blocks = zip(calls[network.block_forward], modulations, strict=True)
    for index, (of_block, modulated) in enumerate(of_blocks):
        (_, h, _), (y, of) = of_block.args, of_block.result
        arrays = {
            "input": h,
            **dict(zip(("norm", "shift", "scale"), modulated.args, strict=True)),
            "gate": of["gate"],
            "modulated": modulated.result[0],
            "activation": of["down"],
            "branch": of["branch"],
            "output": y,
        }
        named |= {f"network.blocks.{index}.{part}": array for part, array in arrays.items()}
    of_last = dict(zip(("norm", "shift", "scale"), last.args, strict=True))
    named |= {f"network.{part}": array for part, array in of_last.items()}
    e, v = np.split(output, 2, axis=1)
    return {**named, "network.modulated": last.result[0], "e": e, "v": v}


def _gradients(model: ContinuousMAR, calls: Any) -> dict[str, Array]:
    blocks = zip(reversed(blocks_of(model)), calls[block.backward], strict=True)
    return {
        "output": calls[network.backward][0].args[1],
        "z": calls[ContinuousMAR.backward][0].args[2],
        **{f"{name}.output": call.args[1] for name, call in blocks},
    }


def last_layer_first(grads: Tree, activation_gradients: dict[str, Array]) -> dict[str, Array]:
    """Order gradients as the backward pass has them, those of activations between them.

    Returns
    -------
    dict of str to array
        By names with ``gradients/`` and ``activation_gradients/``.
    """
    left = dict(reversed(trees.flatten(grads).items()))
    arrays: dict[str, Array] = {}
    for activation, array in activation_gradients.items():
        arrays[f"activation_gradients/{activation}"] = array
        before = _BEFORE.get(activation, (activation.removesuffix("output"),))
        for name in [name for name in left if name.startswith(before)]:
            arrays[f"gradients/{name}"] = left.pop(name)
    return arrays | {f"gradients/{name}": leaf for name, leaf in left.items()}


_BEFORE = {"output": ("diffusion.",), "z": ("diffusion_positions.", "decoder_norm.")}
"""The parameters that come between an activation and the one before it; of blocks, their own."""
