"""Parameters packed for one call: fewer products, fewer passes over activations.

Three identities, all exact, take work from the activations, of which there are many, to the
parameters:

1. A norm and the linear map behind it are one map of the normalised input x̂:

       (γ ⊙ x̂ + β) W + b = x̂ (diag(γ) W) + (β W + b)

   Query, key and value read the same x̂ and become one product; the query takes 1/√head_dim along.

2. Every reader of the residual stream is a norm, which takes the mean off.  So the stream is kept
   without its mean: whatever writes to it has its own taken off, z - mean(z) = z P with
   P = I - 11ᵀ/n, which for a linear map is W P and b P.  (Dropout comes between the map and the
   stream; then the mean is taken off after it.)  Norms are left with x̂ = x/√(mean(x²) + ε).

3. The root of the number of features n goes into the kernels too, √n diag(γ) W, since
   x/√(mean(x²) + ε) = √n x/√(Σx² + nε).

Gradients of packed parameters come back through the same linear maps (`unpack_gradients`).
"""

import math
from typing import NamedTuple

import numpy as np

from marref.trees import Array, Tree


class Packed(NamedTuple):
    """The parameters of a block, or their gradients.

    Kernels [in, out] and biases [out] of ``qkv`` (query, key and value side by side), ``output``,
    ``up`` and ``down``.
    """

    qkv_kernel: Array
    qkv_bias: Array
    output_kernel: Array
    output_bias: Array
    up_kernel: Array
    up_bias: Array
    down_kernel: Array
    down_bias: Array


def pack(params: Tree, num_heads: int, *, centre: bool) -> Packed:
    """Pack the parameters of a block.

    Parameters
    ----------
    params : dict
    num_heads : int
    centre : bool
        Take the mean off what is written to the stream: without dropout.
    """
    attention, feed_forward = params["attention"], params["feed_forward"]
    features = len(params["attention_norm"]["scale"])
    factors = (math.sqrt(num_heads / features), 1.0, 1.0)
    qkv = [
        after_norm(params["attention_norm"], attention[name], factor)
        for name, factor in zip(("query", "key", "value"), factors, strict=True)
    ]
    writers = [attention["output"][part] for part in ("kernel", "bias")]
    writers += [feed_forward["down"][part] for part in ("kernel", "bias")]
    output_kernel, output_bias, down_kernel, down_bias = (
        _without_mean(writer) if centre else writer for writer in writers
    )
    return Packed(
        np.concatenate([kernel for kernel, _ in qkv], axis=1),
        np.concatenate([bias for _, bias in qkv]),
        output_kernel,
        output_bias,
        *after_norm(params["feed_forward_norm"], feed_forward["up"], 1.0),
        down_kernel,
        down_bias,
    )


def unpack_gradients(params: Tree, packed: Packed, num_heads: int, *, centre: bool) -> Tree:
    """Turn gradients of packed parameters into those of the parameters: the chain rule for `pack`.

    P is symmetric, so dW = d(W P) P.

    Parameters
    ----------
    params : dict
    packed : Packed
        The gradients.
    num_heads : int
    centre : bool
        As in `pack`.

    Returns
    -------
    dict
        Like ``params``.
    """
    writers = packed.output_kernel, packed.output_bias, packed.down_kernel, packed.down_bias
    output_kernel, output_bias, down_kernel, down_bias = (
        _without_mean(writer) if centre else writer for writer in writers
    )
    attention, feed_forward = params["attention"], params["feed_forward"]
    features = len(params["attention_norm"]["scale"])
    factors = (math.sqrt(num_heads / features), 1.0, 1.0)
    attention_grads: Tree = {}
    attention_norm = {"scale": 0.0, "bias": 0.0}
    for index, (name, factor) in enumerate(zip(("query", "key", "value"), factors, strict=True)):
        columns = slice(index * features, (index + 1) * features)
        norm, attention_grads[name] = after_norm_gradients(
            params["attention_norm"],
            attention[name],
            factor,
            packed.qkv_kernel[:, columns],
            packed.qkv_bias[columns],
        )
        attention_norm = {part: attention_norm[part] + norm[part] for part in attention_norm}
    feed_forward_norm, up = after_norm_gradients(
        params["feed_forward_norm"], feed_forward["up"], 1.0, packed.up_kernel, packed.up_bias
    )
    output = {"kernel": output_kernel, "bias": output_bias}
    return {
        "attention_norm": attention_norm,
        "attention": {**attention_grads, "output": output},
        "feed_forward_norm": feed_forward_norm,
        "feed_forward": {"up": up, "down": {"kernel": down_kernel, "bias": down_bias}},
    }


def after_norm(norm: Tree, linear: Tree, factor: float) -> tuple[Array, Array]:
    """Compute W′ = f √n diag(γ) W and b′ = f (β W + b)."""
    features = len(norm["scale"])
    scale = norm["scale"] * (factor * math.sqrt(features))
    kernel = scale[:, np.newaxis] * linear["kernel"]
    return kernel, factor * (norm["bias"] @ linear["kernel"] + linear["bias"])


def after_norm_gradients(
    norm: Tree, linear: Tree, factor: float, dkernel: Array, dbias: Array
) -> tuple[Tree, Tree]:
    """Push dW′ and db′ back through `after_norm`.

    dW_ij = f (√n γ_i dW′_ij + β_i db′_j)      dγ_i = f √n Σ_j W_ij dW′_ij
    db_j  = f db′_j                            dβ_i = f Σ_j W_ij db′_j
    """
    kernel, root = linear["kernel"], factor * math.sqrt(len(norm["scale"]))
    scaled_dbias = factor * dbias
    dlinear_kernel = (root * norm["scale"])[:, np.newaxis] * dkernel
    dlinear_kernel += norm["bias"][:, np.newaxis] * scaled_dbias
    dnorm = {"scale": root * np.vecdot(kernel, dkernel), "bias": kernel @ scaled_dbias}
    return dnorm, {"kernel": dlinear_kernel, "bias": scaled_dbias}


def _without_mean(x: Array) -> Array:
    """Compute W P of a kernel, or b P of a bias."""
    centred: Array = x - x.mean(axis=-1, keepdims=True)
    return centred
