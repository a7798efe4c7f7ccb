"""MAR: embedding, bidirectional pre-norm transformer, head.

    x = dropout(embedding(tokens))
    x = block(x)                          num_layers times
    logits = linear(layer_norm(x))        the head

`MAR` holds the hyper-parameters and owns no arrays; parameters are a tree (`marref.trees`):

    embedding.table                                            [vocab_size, embed_dim]
    blocks.<i>.attention_norm.{scale, bias}                    [embed_dim]
    blocks.<i>.attention.{query, key, value, output}.{kernel, bias}
    blocks.<i>.feed_forward_norm.{scale, bias}                 [embed_dim]
    blocks.<i>.feed_forward.{up, down}.{kernel, bias}
    final_norm.{scale, bias}                                   [embed_dim]
    head.{kernel, bias}                                        [embed_dim, vocab_size], [vocab_size]
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, trees
from marref.layers import attention, block, dropout, embedding, gelu, layer_norm, linear
from marref.layers.dropout import Uniforms
from marref.trees import Array, Index, Tree


@dataclasses.dataclass(frozen=True)
class MAR:
    """The hyper-parameters of a model, and its three functions.

    Parameters
    ----------
    vocab_size : int
        Number of token ids, [MASK] included; at least 2.
    embed_dim : int
        Features per position; even, and divisible by ``num_heads``.
    num_layers, num_heads : int
    seq_len : int
        The longest sequence; shorter ones work too.
    dropout : float
        Probability of dropping a feature in training, in [0, 1).
    layer_norm_epsilon : float
        Added to the variance, inside the root.  1e-5 is the default of PyTorch and Axon (Flax's
        is 1e-6).
    gelu : {"erf", "tanh"}
        Exact, or the approximation; see `marref.layers.gelu`.
    positions : {"concatenated", "interleaved"}
        The layout of the sinusoidal table; see `marref.layers.embedding`.

    Raises
    ------
    TypeError, ValueError
        A hyper-parameter is of another type or outside its range.

    Notes
    -----
    Sizes and dropout have the defaults of the MAR specification.
    """

    vocab_size: int
    embed_dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    seq_len: int = 256
    dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    gelu: str = "erf"
    positions: str = "concatenated"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"vocab_size": checks.integer("vocab_size", self.vocab_size, 2)}
        for name in ("embed_dim", "num_layers", "num_heads", "seq_len"):
            checked[name] = checks.integer(name, getattr(self, name), 1)
        checked["dropout"] = checks.real("dropout", self.dropout, "[0, 1)")
        checked["layer_norm_epsilon"] = checks.real(
            "layer_norm_epsilon", self.layer_norm_epsilon, "(0, inf)"
        )
        checks.choice("gelu", self.gelu, gelu.KINDS)
        checks.choice("positions", self.positions, embedding.LAYOUTS)
        checks.even("embed_dim", self.embed_dim)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: received {self.embed_dim}, "
                f"expected a multiple of num_heads = {self.num_heads}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(
        self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float64, *, std: float = 0.02
    ) -> Tree:
        """Draw parameters.

        Kernels and the embedding table come from N(0, std²), the kernels that write to the
        residual stream from N(0, std²/(2·num_layers)) (see `marref.layers.block.init`); biases
        are 0, norm scales 1.

        Parameters
        ----------
        rng : numpy.random.Generator
            The same seed gives the same numbers in every dtype, up to their rounding.
        dtype : float32, float64 or complex128
        std : float
            Positive.  The default is that of GPT-2 (published code), which is at least 768 wide.
            In a narrow model it makes queries and keys so small that attention is uniform at
            first; the demo draws with 1/sqrt(embed_dim).

        Returns
        -------
        dict
            The tree shown at the head of this module.
        """
        checks.generator("rng", rng)
        dtype = trees.check_dtype("dtype", dtype)
        std = checks.real("std", std, "(0, inf)")
        return {
            "embedding": embedding.init(rng, self.vocab_size, self.embed_dim, std, dtype),
            "blocks": [
                block.init(rng, self.embed_dim, self.num_layers, std, dtype)
                for _ in range(self.num_layers)
            ],
            "final_norm": layer_norm.init(self.embed_dim, dtype),
            "head": linear.init(rng, self.embed_dim, self.vocab_size, std, dtype),
        }

    def forward(
        self, params: Tree, tokens: npt.ArrayLike, rng: np.random.Generator | None = None
    ) -> tuple[Array, Tree]:
        """Compute the logits, and keep what the backward needs.

        Parameters
        ----------
        params : dict
            From `init`.  Everything is computed in their dtype.
        tokens : integer array [batch, length]
            length <= seq_len; ids in [0, vocab_size).
        rng : numpy.random.Generator, optional
            Given: dropout is on (training).

        Returns
        -------
        logits : array [batch, length, vocab_size]
        cache : dict
            The activations, a tree; ``trees.flatten(cache)`` is a trace of the forward pass.

        Raises
        ------
        TypeError, ValueError
            Parameters, tokens or rng do not fit the model; the message says which and how.
        """
        tokens = self.check_inputs(params, tokens)
        if rng is not None:
            checks.generator("rng", rng)
        x, cache = body_forward(self, params, tokens, rng)
        logits, head_cache = head_forward(self, params, x)
        return logits, {**cache, **head_cache}

    def backward(self, params: Tree, dlogits: npt.ArrayLike, cache: Tree) -> Tree:
        """Push the gradient of the logits back to every parameter.

        Parameters
        ----------
        params : dict
            Those that `forward` was called with.
        dlogits : array [batch, length, vocab_size]
            Gradient of the loss with respect to the logits.
        cache : dict
            From `forward`.

        Returns
        -------
        dict
            The gradients, a tree like ``params``.

        Raises
        ------
        TypeError, ValueError
            ``params`` or ``dlogits`` do not fit, or the dtypes differ.
        """
        dtype = trees.check_like("params", params, self.parameter_shapes)
        if not isinstance(cache, dict) or len(cache.get("blocks", ())) != self.num_layers:
            raise ValueError("cache: expected what this model's forward returned")
        dlogits = checks.array("dlogits", dlogits)
        checks.shape("dlogits", dlogits, (*cache["embedding"].shape, self.vocab_size))
        if dlogits.dtype != dtype:
            raise TypeError(f"dlogits: dtype {dlogits.dtype}, expected {dtype} as in params")
        dx, head_grads = head_backward(params, dlogits, cache)
        cache = {**cache, "blocks": [*cache["blocks"]]}
        return {**body_backward(self, params, dx, cache), **head_grads}

    def __call__(self, params: Tree, tokens: npt.ArrayLike) -> Array:
        """Return the logits [batch, length, vocab_size] alone; see `forward`."""
        tokens = self.check_inputs(params, tokens)
        return head_forward(self, params, encode(self, params, tokens))[0]

    @functools.cached_property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter, by dotted name."""
        features, hidden = self.embed_dim, 4 * self.embed_dim

        def norm(name: str) -> dict[str, tuple[int, ...]]:
            return {f"{name}.scale": (features,), f"{name}.bias": (features,)}

        def projection(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
            return {f"{name}.kernel": (inputs, outputs), f"{name}.bias": (outputs,)}

        shapes: dict[str, tuple[int, ...]] = {"embedding.table": (self.vocab_size, features)}
        for index in range(self.num_layers):
            prefix = f"blocks.{index}"
            shapes |= norm(f"{prefix}.attention_norm")
            for name in ("query", "key", "value", "output"):
                shapes |= projection(f"{prefix}.attention.{name}", features, features)
            shapes |= norm(f"{prefix}.feed_forward_norm")
            shapes |= projection(f"{prefix}.feed_forward.up", features, hidden)
            shapes |= projection(f"{prefix}.feed_forward.down", hidden, features)
        shapes |= norm("final_norm") | projection("head", features, self.vocab_size)
        return types.MappingProxyType(shapes)

    def check_inputs(self, params: Tree, tokens: npt.ArrayLike) -> Array:
        """Raise unless parameters and tokens fit the model; return the tokens as an array."""
        trees.check_like("params", params, self.parameter_shapes)
        tokens = checks.token_ids("tokens", tokens, self.vocab_size)
        if 0 in tokens.shape or tokens.shape[1] > self.seq_len:
            raise ValueError(
                f"tokens: shape {list(tokens.shape)}, expected [batch, length] "
                f"with batch >= 1 and length in [1, seq_len = {self.seq_len}]"
            )
        return tokens


build = MAR


def check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a MAR."""
    if not isinstance(model, MAR):
        raise TypeError(f"model: received {type(model).__name__}, expected a marref.MAR")


# The pieces of the model, for callers that have checked their arguments and want to run the
# last block and the head at some positions only.


def body_forward(
    model: MAR,
    params: Tree,
    tokens: Array,
    rng: Uniforms | None,
    rows: Index = ...,
    keep_weights: bool = True,
) -> tuple[Array, Tree]:
    """Run everything below the head: tokens [batch, length] -> x [batch, rows, embed_dim].

    The last block computes its output at the positions of `rows` only.  Without its attention
    weights a cache is smaller; `body_backward` computes them again.
    """
    cache: Tree = {}
    x, cache["embedding"] = embedding.forward(params["embedding"], tokens, model.positions)
    x, cache["embedding_dropout"] = dropout.forward(x, model.dropout, rng)
    cache["blocks"] = []
    for block_params, block_rows in blocks_with_rows(params, rows):
        x, block_cache = block_forward(model, block_params, x, rng, block_rows)
        if not keep_weights:
            del block_cache["attention"]["weights"]
        cache["blocks"].append(block_cache)
    return x, cache


def encode(model: MAR, params: Tree, tokens: Array, rows: Index = ...) -> Array:
    """Do as `body_forward` without dropout, keeping one block's activations at a time."""
    x, _ = embedding.forward(params["embedding"], tokens, model.positions)
    for block_params, block_rows in blocks_with_rows(params, rows):
        x = block_forward(model, block_params, x, None, block_rows)[0]
    return x


def blocks_with_rows(params: Tree, rows: Index) -> list[tuple[Tree, Index]]:
    """Pair the blocks' parameters with the positions to compute: all, but in the last block."""
    *blocks, last = params["blocks"]
    return [*((block, ...) for block in blocks), (last, rows)]


def block_forward(
    model: MAR,
    block_params: Tree,
    x: Array,
    rng: Uniforms | None,
    rows: Index = ...,
) -> tuple[Array, Tree]:
    """Run one block with the model's hyper-parameters."""
    return block.forward(
        block_params,
        x,
        num_heads=model.num_heads,
        gelu=model.gelu,
        epsilon=model.layer_norm_epsilon,
        dropout_rate=model.dropout,
        rng=rng and _Rows(rng, x.shape, rows),
        rows=rows,
    )


def body_backward(model: MAR, params: Tree, dx: Array, cache: Tree, rows: Index = ...) -> Tree:
    """Push dx [batch, rows, embed_dim] back through everything below the head.

    The list of the blocks' caches is used up, so that each is let go when it has been read.
    """
    blocks = []
    for block_params, block_rows in reversed(blocks_with_rows(params, rows)):
        block_cache = cache["blocks"].pop()
        if "weights" not in block_cache["attention"]:
            query, key = (block_cache["attention"][name] for name in ("query", "key"))
            block_cache["attention"]["weights"] = attention.weigh(query, key)
        dx, block_grads = block.backward(
            block_params, dx, block_cache, gelu=model.gelu, rows=block_rows
        )
        blocks.append(block_grads)
    dx = dropout.backward(dx, cache["embedding_dropout"])
    return {
        "embedding": embedding.backward(params["embedding"], dx, cache["embedding"]),
        "blocks": blocks[::-1],
    }


def head_forward(model: MAR, params: Tree, x: Array) -> tuple[Array, Tree]:
    """Run the final norm and the head: x [..., embed_dim] -> logits [..., vocab_size]."""
    cache: Tree = {}
    x, cache["final_norm"] = layer_norm.forward(params["final_norm"], x, model.layer_norm_epsilon)
    logits, cache["head"] = linear.forward(params["head"], x)
    return logits, cache


def head_backward(params: Tree, dlogits: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push dlogits back to the head's input and parameters."""
    dx, dhead = linear.backward(params["head"], dlogits, cache["head"])
    dx, dnorm = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    return dx, {"final_norm": dnorm, "head": dhead}


class _Rows:
    """The random numbers at some positions, as if those at all of them were drawn."""

    def __init__(self, rng: Uniforms, shape: tuple[int, ...], rows: Index) -> None:
        self._rng, self._shape, self._rows = rng, shape, rows

    def random(self, size: tuple[int, ...], dtype: type[np.float32]) -> Array:
        numbers: Array = self._rng.random(self._shape, dtype)[self._rows]
        return numbers
