"""MAR in pure JAX, compiled, with the head at the masked positions only."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from benchmarks.cases import CONFIGS, LEARNING_RATE, MASK_TOKEN, Case
from benchmarks.contestants import layout

Array = npt.NDArray[np.generic]
Params = dict[str, jax.Array]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def tiny_operation() -> None:
    """Make JAX load its compiler."""
    jax.block_until_ready(jax.jit(jax.grad(lambda x: (x @ x).sum()))(jnp.ones((8, 8))))


def _norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    normalised = jax.nn.standardize(x, epsilon=1e-5)
    return normalised * params[f"{name}.scale"] + params[f"{name}.bias"]


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.kernel"] + params[f"{name}.bias"]


class Model:
    """The hyper-parameters of a case and the functions of its model."""

    def __init__(self, case: Case, arrays: Mapping[str, Array]):
        config = CONFIGS[case.config]
        self.num_layers, self.num_heads = config.num_layers, config.num_heads
        self.dropout = case.dropout
        self.positions = jnp.array(arrays["positions"])

    def encode(self, params: Params, tokens: jax.Array, key: jax.Array | None) -> jax.Array:
        """Run everything below the head; a key turns dropout on."""
        num_keys = 1 + 2 * self.num_layers
        keys = iter([None] * num_keys if key is None else jax.random.split(key, num_keys))
        x = self._drop(params["embedding.table"][tokens] + self.positions, next(keys))
        for index in range(self.num_layers):
            name = f"blocks.{index}"
            branch = _norm(params, f"{name}.attention_norm", x)
            x = x + self._drop(self._attention(params, f"{name}.attention", branch), next(keys))
            branch = _norm(params, f"{name}.feed_forward_norm", x)
            branch = _linear(params, f"{name}.feed_forward.up", branch)
            branch = jax.nn.gelu(branch, approximate=False)
            x = x + self._drop(_linear(params, f"{name}.feed_forward.down", branch), next(keys))
        return _norm(params, "final_norm", x)

    def _attention(self, params: Params, name: str, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], self.num_heads, -1)
        parts = jnp.split(_linear(params, f"{name}.qkv", x), 3, axis=-1)
        query, key, value = (part.reshape(heads) for part in parts)
        context = jax.nn.dot_product_attention(query, key, value)
        return _linear(params, f"{name}.output", context.reshape(x.shape))

    def _drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if key is None or self.dropout == 0:
            return x
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)

    def loss(
        self,
        params: Params,
        tokens: jax.Array,
        rows: jax.Array,
        labels: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Cross-entropy over the masked positions."""
        hidden = self.encode(params, tokens, key)
        logits = _linear(params, "head", hidden.reshape(-1, hidden.shape[-1])[rows])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    def train_step(self, params: Params, state: dict, *batch: jax.Array) -> tuple[Params, dict]:
        """Gradients and a step of Adam."""
        key, dropout_key = jax.random.split(state["key"])
        grads = jax.grad(self.loss)(params, *batch, dropout_key)
        count = state["count"] + 1
        first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, state["first"], grads)
        second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g**2, state["second"], grads)
        correction1, correction2 = 1 - BETA1**count, 1 - BETA2**count

        def update(param: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return param - LEARNING_RATE * (m / correction1) / (jnp.sqrt(v / correction2) + EPSILON)

        state = {"key": key, "count": count, "first": first, "second": second}
        return jax.tree.map(update, params, first, second), state

    def decode_step(self, params: Params, tokens: jax.Array, count: jax.Array) -> jax.Array:
        """Reveal the ``count`` most confident predictions of each sequence."""
        logits = _linear(params, "head", self.encode(params, tokens, None))
        probabilities = jax.nn.softmax(logits.at[..., MASK_TOKEN].set(-jnp.inf))
        masked = tokens == MASK_TOKEN
        confidence = jnp.where(masked, probabilities.max(-1), -1)
        rank = jnp.argsort(jnp.argsort(-confidence, axis=1), axis=1)
        return jnp.where(rank < count, probabilities.argmax(-1), tokens)


def _load(arrays: Mapping[str, Array]) -> Params:
    return {name: jnp.array(layout.read(arrays, name)) for name in layout.names(arrays)}


class Training:
    """A step of training, compiled as a whole; parameters and moments are donated."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        self.model = Model(case, arrays)
        self.params = _load(arrays)
        self.state = {
            "key": jax.random.key(0),
            "count": jnp.zeros((), jnp.int32),
            "first": jax.tree.map(jnp.zeros_like, self.params),
            "second": jax.tree.map(jnp.zeros_like, self.params),
        }
        rows = np.flatnonzero(arrays["mask"])
        labels = arrays["targets"].reshape(-1)[rows]
        self.batch = tuple(map(jnp.array, (arrays["tokens"], rows, labels)))
        self.train_step = jax.jit(self.model.train_step, donate_argnums=(0, 1))

    def run(self) -> None:
        """Take one step."""
        self.params, self.state = self.train_step(self.params, self.state, *self.batch)
        jax.block_until_ready(self.params)

    def loss_and_gradients(self) -> tuple[float, dict[str, Array]]:
        """Loss, and gradients by marref's names."""
        loss, grads = jax.jit(jax.value_and_grad(self.model.loss))(self.params, *self.batch)
        return float(loss), layout.split({name: np.asarray(grad) for name, grad in grads.items()})


class Decoding:
    """Generate from nothing."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        model = Model(case, arrays)
        self.decode_step = jax.jit(model.decode_step)
        self.params = _load(arrays)
        self.reveal_counts = arrays["reveal_counts"]
        self.shape = (case.batch, case.seq_len)

    def run(self) -> Array:
        """Decode once."""
        tokens = jnp.full(self.shape, MASK_TOKEN)
        for count in self.reveal_counts:
            tokens = self.decode_step(self.params, tokens, count)
        return np.asarray(tokens)


TASKS = {"training": Training, "decoding": Decoding}
