"""MAR in Flax's linen, right or with mistakes, in every precision.

linen has MAR's layers; a mistake is an argument, a line left out, or another one, as it would be
in a user's file.  Where a precision rounds in matrix products only, `dot_general` does, forward and
backward.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from marref import interop, trees
from marref.verify.comparison import Golden

jax.config.update("jax_enable_x64", True)

DTYPES = {"tf32": "float32", "bf16-mixed": "float32", "fp16-mixed": "float32"}
HALF = {"bf16-mixed": jnp.bfloat16, "fp16-mixed": jnp.float16}

FAULTS = (
    "embedding-times-root-embed-dim",
    "positions-interleaved",
    "positions-from-one",
    "positions-missing",
    "positions-added-twice",
    "positions-cosine-first",
    "layer-norm-epsilon-1e-6",
    "layer-norm-without-scale",
    "layer-norm-without-bias",
    "final-norm-missing",
    "head-tied",
    "head-without-bias",
    "linear-without-biases",
    "attention-unscaled",
    "attention-causal",
    "attention-softmax-over-queries",
    "attention-softmax-plus-one",
    "attention-gradient-through-values-only",
    "feed-forward-without-biases",
    "gelu-tanh",
    "gelu-erf",
    "gelu-sigmoid",
    "gelu-relu",
    "gelu-silu",
    "gelu-missing",
    "block-post-norm-hooked",
    "block-parallel",
    "residual-from-normalised",
    "residual-around-attention-missing",
    "residual-around-feed-forward-missing",
    "residual-gradient-dropped",
    "loss-over-all-positions",
    "loss-over-unmasked-positions",
    "loss-summed",
    "loss-over-batch-times-length",
    "loss-averaged-by-sequence",
    "loss-base-2",
    "loss-label-smoothing",
    "loss-targets-shifted",
    "loss-softmax-twice",
)
"""What can be got wrong, by the names that diagnosis should find."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu-tanh": nn.gelu,
    "gelu-erf": functools.partial(nn.gelu, approximate=False),
    "gelu-sigmoid": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu-relu": nn.relu,
    "gelu-silu": nn.silu,
    "gelu-missing": lambda x: x,
}


class Part(nn.Module):
    """What every module is told; ``config`` is the golden model's."""

    config: Any
    mistakes: frozenset[str]
    dtype: Any
    dot_general: Any

    def has(self, mistake: str) -> bool:
        return mistake in self.mistakes

    def norm(self) -> nn.Module:
        epsilon = 1e-6 if self.has("layer-norm-epsilon-1e-6") else self.config["layer_norm_epsilon"]
        return nn.LayerNorm(
            epsilon=epsilon,
            dtype=self.dtype,
            use_scale=not self.has("layer-norm-without-scale"),
            use_bias=not self.has("layer-norm-without-bias"),
        )

    def dense(self, features: int, without_bias: str) -> nn.Module:
        use_bias = not (self.has("linear-without-biases") or self.has(without_bias))
        return nn.Dense(features, use_bias=use_bias, dtype=self.dtype, dot_general=self.dot_general)

    def attend(self, query: Any, key: Any, value: Any, mask: Any, module: Any) -> Any:
        """Attention on [batch, length, heads, head_dim]."""
        scale = 1.0 if self.has("attention-unscaled") else query.shape[-1] ** -0.5
        product = functools.partial(jnp.einsum, _dot_general=self.dot_general)
        scores = product("bqhd,bkhd->bhqk", query, key) * scale
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        if self.has("attention-softmax-plus-one"):
            weights = jnp.exp(scores) / (1 + jnp.exp(scores).sum(-1, keepdims=True))
        else:
            axis = -2 if self.has("attention-softmax-over-queries") else -1
            weights = nn.softmax(scores, axis=axis)
        module.sow("intermediates", "attention_weights", weights)
        if self.has("attention-gradient-through-values-only"):
            weights = jax.lax.stop_gradient(weights)
        return product("bhqk,bkhd->bqhd", weights, value)


class Block(Part):
    def setup(self) -> None:
        dim = self.config["embed_dim"]
        self.attention_norm, self.feed_forward_norm = self.norm(), self.norm()
        self.attention = nn.MultiHeadDotProductAttention(
            self.config["num_heads"],
            dtype=self.dtype,
            use_bias=not self.has("linear-without-biases"),
            attention_fn=lambda *parts, mask, module, **_: self.attend(*parts, mask, module),
            qkv_dot_general=self.dot_general,
            out_dot_general=self.dot_general,
        )
        self.up = self.dense(4 * dim, "feed-forward-without-biases")
        self.down = self.dense(dim, "feed-forward-without-biases")

    def feed_forward(self, x: Any) -> Any:
        right = "gelu-tanh" if self.config["gelu"] == "tanh" else "gelu-erf"
        chosen = next((name for name in self.mistakes if name in ACTIVATIONS), right)
        hidden = ACTIVATIONS[chosen](self.up(x))
        self.sow("intermediates", "activation", hidden)
        return self.down(hidden)

    def __call__(self, x: Any) -> Any:
        mask = nn.make_causal_mask(x[..., 0]) if self.has("attention-causal") else None
        attention = functools.partial(self.attention, mask=mask, sow_weights=True)
        if self.has("block-post-norm-hooked"):
            x = self.attention_norm(x + attention(x))
            return self.feed_forward_norm(x + self.feed_forward(x))
        original = x
        normed = self.attention_norm(x)
        x = self.added("attention", normed if self.overwrites else x, attention(normed))
        read = original if self.has("block-parallel") else x
        normed = self.feed_forward_norm(read)
        return self.added(
            "feed-forward", normed if self.overwrites else x, self.feed_forward(normed)
        )

    @property
    def overwrites(self) -> bool:
        return self.has("residual-from-normalised")

    def added(self, branch: str, x: Any, y: Any) -> Any:
        if self.has(f"residual-around-{branch}-missing"):
            return y
        return (jax.lax.stop_gradient(x) if self.has("residual-gradient-dropped") else x) + y


class Model(Part):
    def setup(self) -> None:
        config = self.config
        self.embedding = nn.Embed(config["vocab_size"], config["embed_dim"], dtype=self.dtype)
        shared = (config, self.mistakes, self.dtype, self.dot_general)
        self.blocks = [Block(*shared) for _ in range(config["num_layers"])]
        self.final_norm = self.norm()
        self.head = self.dense(config["vocab_size"], "head-without-bias")

    def __call__(self, tokens: Any) -> Any:
        x = self.embedding(tokens)
        if self.has("embedding-times-root-embed-dim"):
            x = x * math.sqrt(self.config["embed_dim"])
        times = 2 if self.has("positions-added-twice") else 1
        for _ in range(0 if self.has("positions-missing") else times):
            x = x + self.positions(tokens.shape[1]).astype(self.dtype)
        self.sow("intermediates", "embedded", x)
        for block in self.blocks:
            x = block(x)
        x = x if self.has("final-norm-missing") else self.final_norm(x)
        if self.has("head-tied"):
            tied = self.embedding.attend(x)
            return tied if self.has("head-without-bias") else tied + self.head_bias()
        return self.head(x)

    def head_bias(self) -> Any:
        return self.get_variable("params", "head")["bias"].astype(self.dtype)

    def positions(self, length: int) -> Any:
        dim = self.config["embed_dim"]
        position = np.arange(length) + self.has("positions-from-one")
        interleaved = self.config["positions"] == "interleaved"
        if interleaved or self.has("positions-interleaved"):
            exponent, axis = np.arange(0, dim, 2) / dim, -1
        else:
            exponent, axis = np.arange(dim // 2) / max(dim // 2 - 1, 1), -2
        angle = position[:, None] * 10000.0**-exponent
        waves = [np.sin(angle), np.cos(angle)]
        if self.has("positions-cosine-first"):
            waves.reverse()
        return jnp.asarray(np.stack(waves, axis).reshape(length, dim))


class FlaxPort:
    """A program in Flax, with any mistakes.

    Parameters
    ----------
    vectors : Golden
        Only its parameters, batch and metadata are read.
    precision : str
    mistakes : iterable of str
        Of `FAULTS`.
    """

    def __init__(self, vectors: Golden, precision: str, mistakes: Iterable[str] = ()) -> None:
        config = vectors.metadata["config"]
        self.metadata, self.batch = vectors.metadata, vectors.batch
        self.mistakes = frozenset(mistakes)
        self.dtype = jnp.dtype(DTYPES.get(precision, precision))
        params = trees.map_leaves(lambda leaf: jnp.asarray(leaf, self.dtype), vectors.params)
        # bfloat16 is none of NumPy's dtypes, and all golden parameters are float32 numbers.
        wide = trees.map_leaves(lambda leaf: np.asarray(leaf, np.float64), params)
        variables = interop.flax.to_variables(wide, config["num_heads"])
        self.variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), variables)
        self.model = Model(config, self.mistakes, self.dtype, product_in(precision))

    def loss(self, logits: Any) -> Any:
        has, mask = self.mistakes.__contains__, self.batch["mask"] == 1
        targets = self.batch["targets"]
        if has("loss-targets-shifted"):
            targets = np.roll(targets, -1, axis=1)
        logits = logits if self.dtype == jnp.float64 else logits.astype(jnp.float32)
        if has("loss-softmax-twice"):
            logits = nn.softmax(logits)
        labels = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
        if has("loss-label-smoothing"):
            labels = optax.smooth_labels(labels, 0.1)
        errors = optax.softmax_cross_entropy(logits, labels)
        if has("loss-base-2"):
            errors = errors / math.log(2)
        if has("loss-summed"):
            return errors.sum(where=mask)
        if has("loss-over-batch-times-length"):
            return (errors * mask).mean()
        if has("loss-averaged-by-sequence"):
            return ((errors * mask).sum(1) / np.maximum(mask.sum(1), 1)).mean()
        if has("loss-over-all-positions"):
            return errors.mean()
        return errors.mean(where=~mask if has("loss-over-unmasked-positions") else mask)

    def gradients(self, variables: Any) -> Any:
        """Loss, what linen captured, and gradients."""

        def objective(variables: Any) -> Any:
            logits, state = self.model.apply(
                variables,
                self.batch["tokens"],
                capture_intermediates=True,
                mutable="intermediates",
            )
            # A tied head is called by another name than linen's.
            return self.loss(logits), (state["intermediates"], logits)

        return jax.value_and_grad(objective, has_aux=True)(variables)

    def arrays(self, optimisers: bool) -> dict[str, np.ndarray]:
        """Compute arrays by golden names: activations, loss, gradients, and steps if wanted."""
        # To compile takes longer than one run of operations that were compiled for another port.
        compute = jax.jit(self.gradients) if optimisers else self.gradients
        (loss, (captured, logits)), grads = compute(self.variables)
        arrays = activations(captured)
        arrays["activations/logits"] = to_numpy(logits)
        arrays["loss"] = to_numpy(loss)
        arrays |= named("gradients", grads)
        for name in self.metadata["optimisers"] if optimisers else ():
            arrays |= self.steps(name, compute)
        return arrays

    def steps(self, name: str, compute: Callable[[Any], Any]) -> dict[str, np.ndarray]:
        """Parameters after steps 1, 2 and 10."""
        options = self.metadata["optimisers"][name]
        rate, decay = options["learning_rate"], options["weight_decay"]
        optimiser = optax.adamw(rate, weight_decay=decay) if decay else optax.adam(rate)
        variables, state = self.variables, optimiser.init(self.variables)
        update = jax.jit(optimiser.update)
        arrays: dict[str, np.ndarray] = {}
        for step in range(1, 11):
            _, grads = compute(variables)
            for index in range(self.metadata["config"]["num_layers"]):
                key = grads["params"][f"blocks_{index}"]["attention"]["key"]
                key["bias"] = jnp.zeros_like(key["bias"])
            if "max_norm" in options:
                norm = optax.global_norm(grads)
                factor = jnp.minimum(1.0, options["max_norm"] / (norm + 1e-6))
                grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)  # noqa: B023
            updates, state = update(grads, state, variables)
            variables = optax.apply_updates(variables, updates)
            if step in (1, 2, 10):
                arrays |= named(f"{name}/{step}", variables)
        return arrays


# What linen calls an activation that it captured, and its golden name.
CAPTURED = {
    "embedded": "embedding",
    "attention_norm": "attention_norm",
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "attention.attention_weights": "attention.weights",
    "attention": "attention.output",
    "feed_forward_norm": "feed_forward_norm",
    "up": "feed_forward.up",
    "activation": "feed_forward.activation",
    "down": "feed_forward.down",
    "": "output",
    "final_norm": "final_norm",
}


def activations(captured: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """By golden names, the activations in the nested dict that linen captured."""
    found: dict[str, np.ndarray] = {}
    for key, entry in captured.items():
        if isinstance(entry, dict):
            found |= activations(entry, f"{prefix}{key}.")
            continue
        array = to_numpy(entry[-1])
        path = re.sub(r"\.?__call__$", "", prefix + key)
        block, name = re.fullmatch(r"(?:blocks_(\d+)\.?)?(.*)", path).groups()
        if name not in CAPTURED or (block is None and name == ""):
            continue
        if name in ("attention.query", "attention.key", "attention.value"):
            array = array.swapaxes(1, 2)
        where = "" if block is None else f"blocks.{block}."
        found[f"activations/{where}{CAPTURED[name]}"] = array
    return found


def named(section: str, tree: Any) -> dict[str, np.ndarray]:
    """By golden names, what has the structure of the variables."""
    params = interop.flax.to_params(jax.tree.map(to_numpy, tree))
    return {f"{section}/{name}": leaf for name, leaf in trees.flatten(params).items()}


def to_numpy(x: Any) -> np.ndarray:
    """Copy; NumPy has no bfloat16, which float32 holds exactly."""
    return np.array(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


# Matrix products that round their inputs.


def product_in(precision: str) -> Callable[..., Any]:
    """Make what multiplies matrices in a precision, forward and backward."""
    if precision in HALF:
        return functools.partial(_half_product, HALF[precision])
    return _tf32_product if precision == "tf32" else jax.lax.dot_general


def _half_product(half: Any, a: Any, b: Any, *args: Any, **_: Any) -> Any:
    """Cast inputs and result; the derivatives of casts are casts."""
    product = jax.lax.dot_general(a.astype(half), b.astype(half), *args)
    return product.astype(jnp.float32)


def _tf32_product(a: Any, b: Any, *args: Any, **_: Any) -> Any:
    return _rounding_gradient(jax.lax.dot_general(_rounded(a), _rounded(b), *args))


@jax.custom_jvp
def _rounded(x: Any) -> Any:
    """Round to 10 explicit bits, and hand on gradients as they are."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


@_rounded.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _rounded(*primals), tangents[0]


@jax.custom_vjp
def _rounding_gradient(x: Any) -> Any:
    """Hand on numbers as they are, and round gradients."""
    return x


_rounding_gradient.defvjp(lambda x: (x, None), lambda _, dx: (_rounded(dx),))
