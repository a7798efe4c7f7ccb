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

import copy
import dataclasses
import functools
import math
import operator
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, loss, parallel, trees
from marref.layers import (
    attention,
    block,
    dropout,
    embedding,
    feed_forward,
    gelu,
    layer_norm,
    linear,
)
from marref.layers.dropout import Uniforms
from marref.trees import Array, Index, Tree

# The most logits that a thread has in training.
_LOGITS_AT_ONCE = 2**21

# The most features, batch·length·embed_dim, that a thread trains on at a time.
_SHARE = 2**18


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


def loss_and_grads(
    model: MAR,
    params: Tree,
    tokens: npt.ArrayLike,
    targets: npt.ArrayLike,
    mask: npt.ArrayLike,
    rng: np.random.Generator | None = None,
    *,
    num_threads: int = 1,
) -> tuple[np.inexact, Tree]:
    """Run the model, the loss, and both backward passes.

    Equal to `MAR.forward`, `marref.loss` and `MAR.backward` one after the other, up to rounding.
    No other positions than the masked ones reach the loss, so the head runs at these only, and
    so does the last block, but for its keys and values.

    Parameters
    ----------
    model : MAR
    params : dict
    tokens : integer array [batch, length]
        The inputs: [MASK] where masked.
    targets : integer array [batch, length]
        The true ids.
    mask : array [batch, length]
        True (or 1) where a position was masked.
    rng : numpy.random.Generator, optional
        Given: dropout is on.
    num_threads : int
        More than 1: that many threads share the batch, see `marref.parallel.threads`.  The same
        number gives the same bits, another one the same result up to rounding.

    Returns
    -------
    loss : scalar
        Nats per masked token, in the dtype of the parameters.
    grads : dict
        A tree like ``params``.

    Raises
    ------
    TypeError, ValueError
        See `MAR.forward` and `marref.loss.mar_loss`.
    """
    check_model(model)
    tokens = model.check_inputs(params, tokens)
    targets = checks.token_ids("targets", targets, model.vocab_size)
    checks.shape("targets", targets, tokens.shape)
    mask = checks.binary_mask("mask", mask, tokens.shape)
    if rng is not None:
        checks.generator("rng", rng)
    checks.integer("num_threads", num_threads, 1)

    num_masked = max(int(mask.sum()), 1)

    def share(where: slice, rng: Uniforms | None) -> tuple[np.inexact, Tree]:
        return _loss_and_grads(
            model, params, tokens[where], targets[where], mask[where], rng, num_masked
        )

    num_rounds = math.ceil(tokens.size * model.embed_dim / (_SHARE * num_threads))
    wheres = parallel.split(len(tokens), num_rounds * num_threads)
    rngs = [rng, *(copy.deepcopy(rng) for _ in wheres[1:])]
    draws = [
        rng and _Sequences(rng, where, len(tokens)) for rng, where in zip(rngs, wheres, strict=True)
    ]
    value: Any = 0.0
    sums: list[Tree] = []
    with parallel.threads(min(num_threads, len(wheres))) as run:
        # One share a thread at a time: what the others need takes no memory yet.
        for first in range(0, len(wheres), num_threads):
            group = slice(first, first + num_threads)
            values, grads = zip(*run(share, wheres[group], draws[group]), strict=True)
            value += sum(values)
            sums = [_add_up(run, *sums, *grads)]
    return value, sums[0]


def _add_up(run: parallel.Run, total: Tree, *terms: Tree) -> Tree:
    """Add trees to the first of them, in place."""
    for term in terms:
        run(operator.iadd, *zip(*trees.pieces(total, term), strict=True))
    return total


class _Sequences:
    """The random numbers of some sequences of a batch, as if those of all of it were drawn."""

    def __init__(self, rng: np.random.Generator, where: slice, batch_size: int) -> None:
        self._rng, self._before, self._after = rng, where.start, batch_size - where.stop

    def random(self, size: tuple[int, ...], dtype: type[np.float32]) -> Array:
        each = math.prod(size[1:])
        _skip(self._rng, self._before * each)
        numbers = self._rng.random(size, dtype)
        _skip(self._rng, self._after * each)
        return numbers


class _Rows:
    """The random numbers at some positions, as if those at all of them were drawn."""

    def __init__(self, rng: Uniforms, shape: tuple[int, ...], rows: Index) -> None:
        self._rng, self._shape, self._rows = rng, shape, rows

    def random(self, size: tuple[int, ...], dtype: type[np.float32]) -> Array:
        numbers: Array = self._rng.random(self._shape, dtype)[self._rows]
        return numbers


def _skip(rng: np.random.Generator, count: int) -> None:
    """Leave out as many numbers as ``rng.random(count, numpy.float32)`` draws."""
    bits = rng.bit_generator
    if isinstance(bits, np.random.PCG64 | np.random.PCG64DXSM):
        # It draws two of them at a time, and may have the second of a pair in store.
        if bits.state["has_uint32"]:
            rng.random(dtype=np.float32)
            count -= 1
        bits.advance(count // 2)
        count %= 2
    rng.random(count, np.float32)


def _loss_and_grads(
    model: MAR,
    params: Tree,
    tokens: Array,
    targets: Array,
    mask: Array,
    rng: Uniforms | None,
    num_masked: int,
) -> tuple[np.inexact, Tree]:
    """Compute what some sequences add to the loss and to the gradients, |M| being num_masked."""
    rows, mask_of_rows = masked_rows(mask)
    # Weights that would take as much memory as all else that a block keeps are let go.
    keep_weights = model.num_heads * tokens.shape[1] < 16 * model.embed_dim
    x, cache = body_forward(model, params, tokens, rng, rows, keep_weights)
    value, drows, head_grads = _head_loss_and_grads(
        model, params, x[mask_of_rows], targets[mask], num_masked
    )
    dx = np.zeros_like(x)
    dx[mask_of_rows] = drows
    return value, {**body_backward(model, params, dx, cache, rows), **head_grads}


def _head_loss_and_grads(
    model: MAR, params: Tree, x: Array, targets: Array, num_masked: int
) -> tuple[np.inexact, Array, Tree]:
    """Do the head's part, at a few positions at a time: logits are large."""
    value: Any = 0.0
    dx = np.empty_like(x)
    sums: list[Tree] = []
    num_parts = math.ceil(len(x) * model.vocab_size / _LOGITS_AT_ONCE)
    for part in parallel.split(len(x), num_parts):
        logits, cache = head_forward(model, params, x[part])
        checks.finite("logits", logits)
        part_value, loss_cache = loss.rows_forward(logits, targets[part], num_masked)
        del logits
        dx[part], grads = head_backward(params, loss.rows_backward(loss_cache), cache)
        value += part_value
        sums = [_add_up(parallel.one_by_one, *sums, grads)]
    return value, dx, sums[0]


# The pieces of the model, for callers that have checked their arguments and want to run the
# head at some positions only.


def masked_rows(mask: Array) -> tuple[tuple[Array, Array], Array]:
    """Choose the positions that the last block has to compute.

    Parameters
    ----------
    mask : bool array [batch, length]

    Returns
    -------
    rows : index
        x[rows] is [batch, rows, ...], with as many rows as any sequence has masked positions:
        its own masked positions in order, and others after them where it has fewer.
    mask_of_rows : bool array [batch, rows]
        ``mask[rows]``: x[rows][mask_of_rows] is x[mask].
    """
    order = np.argsort(~mask, axis=1, kind="stable")[:, : mask.sum(axis=1).max()]
    rows = np.arange(len(mask))[:, np.newaxis], order
    return rows, mask[rows]


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
    for block_params, block_rows in zip(
        params["blocks"], _rows_of_blocks(model, rows), strict=True
    ):
        x, block_cache = block_forward(model, block_params, x, rng, block_rows)
        if not keep_weights:
            del block_cache["attention"]["weights"]
        cache["blocks"].append(block_cache)
    return x, cache


def encode(model: MAR, params: Tree, tokens: Array, rows: Index = ...) -> Array:
    """Do as `body_forward` without dropout, keeping one block's activations at a time."""
    x, _ = embedding.forward(params["embedding"], tokens, model.positions)
    for block_params, block_rows in zip(
        params["blocks"], _rows_of_blocks(model, rows), strict=True
    ):
        x = block_forward(model, block_params, x, None, block_rows)[0]
    return x


def encode_masked(
    model: MAR, params: Tree, tokens: Array, mask: Array, run: parallel.Run, num_threads: int
) -> Array:
    """Do as `encode`, for the masked positions: -> x [masked, embed_dim], in threads.

    The threads share the sequences or, if there are more threads than sequences, each block.
    """

    def share(part: slice) -> Array:
        rows, mask_of_rows = masked_rows(mask[part])
        return encode(model, params, tokens[part], rows)[mask_of_rows]

    if num_threads <= len(tokens):
        return np.concatenate(run(share, parallel.split(len(tokens), num_threads)))

    rows, mask_of_rows = masked_rows(mask)
    x, _ = embedding.forward(params["embedding"], tokens, model.positions)
    for block_params, block_rows in zip(
        params["blocks"], _rows_of_blocks(model, rows), strict=True
    ):
        x = _shared_block(model, block_params, x, block_rows, run, num_threads)
    return x[mask_of_rows]


def _shared_block(
    model: MAR, block_params: Tree, x: Array, rows: Index, run: parallel.Run, num_threads: int
) -> Array:
    """Do as `block_forward` without dropout.  Threads share the heads, and then the positions."""
    source, _ = layer_norm.forward(block_params["attention_norm"], x, model.layer_norm_epsilon)

    def attend(heads: slice) -> Array:
        params = _of_heads(block_params["attention"], heads, model.embed_dim // model.num_heads)
        return attention.forward(params, source, heads.stop - heads.start, rows)[0]

    def feed_forward_branch(part: slice) -> Array:
        norm, kernels = block_params["feed_forward_norm"], block_params["feed_forward"]
        source, _ = layer_norm.forward(norm, x[:, part], model.layer_norm_epsilon)
        return feed_forward.forward(kernels, source, model.gelu)[0]

    x = x[rows] + sum(run(attend, parallel.split(model.num_heads, num_threads)))
    x += np.concatenate(run(feed_forward_branch, parallel.split(x.shape[1], num_threads)), axis=1)
    return x


def _of_heads(params: Tree, heads: slice, head_dim: int) -> Tree:
    """Make views of what an attention layer has for some heads; the outputs of all heads add up."""
    features = slice(heads.start * head_dim, heads.stop * head_dim)
    projections = {
        name: {"kernel": kernel["kernel"][:, features], "bias": kernel["bias"][features]}
        for name, kernel in params.items()
    }
    output = params["output"]
    bias = output["bias"] if heads.start == 0 else np.zeros_like(output["bias"])
    return {**projections, "output": {"kernel": output["kernel"][features], "bias": bias}}


def _rows_of_blocks(model: MAR, rows: Index) -> list[Index]:
    """All positions in every block but the last."""
    return [...] * (model.num_layers - 1) + [rows]


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
    for block_params, block_rows in zip(
        reversed(params["blocks"]), reversed(_rows_of_blocks(model, rows)), strict=True
    ):
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
