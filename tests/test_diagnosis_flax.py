"""Diagnosis names the mistakes of a user who wrote MAR in Flax's linen.

The user's model is made of linen's own layers, takes the variables that marref wrote for it, and
hands over, by golden names, the activations that linen captures, the loss, and jax's gradients.
"""

import importlib
import math
import re

import numpy as np
import pytest

import marref
from marref import files, interop, trees
from marref.verify import golden
from marref.verify.comparison import Golden
from marref.verify.diagnosis import diagnose

# A mistake in Flax, by the name that diagnosis should find, and what differs first.  The first two
# are Flax's own defaults.
FIRST_DIFFERENCE = {
    "layer-norm-epsilon-1e-6": "activations/blocks.0.attention_norm",
    "gelu-tanh": "activations/blocks.0.feed_forward.activation",
    "positions-interleaved": "activations/embedding",
    "attention-unscaled": "activations/blocks.0.attention.weights",
    "attention-causal": "activations/blocks.0.attention.weights",
    "residual-around-attention-missing": "activations/blocks.0.feed_forward_norm",
    "loss-over-all-positions": "loss",
}
DEFAULTS = ("layer-norm-epsilon-1e-6", "gelu-tanh")

# What linen calls an activation that it captured, and marref's name for it.
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
    "head": "logits",
}


@pytest.fixture(scope="module")
def vectors():
    return Golden(*files.load(golden.shipped("tiny")))


@pytest.fixture(scope="module")
def model_of(vectors):
    """The user's model, as a function of the mistakes in it and of its dtype."""
    pytest.importorskip("flax")
    linen = importlib.import_module("flax.linen")
    config = vectors.model

    def unscaled(query, key, value, **options):
        """Undo the scaling that linen always does."""
        scale = math.sqrt(query.shape[-1])
        return linen.dot_product_attention(query * scale, key, value, **options)

    class Block(linen.Module):
        mistakes: tuple
        dtype: np.dtype

        def setup(self):
            self.attention_norm = linen.LayerNorm(**norm_options(self))
            options = {"attention_fn": unscaled} if has(self, "attention-unscaled") else {}
            self.attention = linen.MultiHeadDotProductAttention(
                config.num_heads, dtype=self.dtype, **options
            )
            self.feed_forward_norm = linen.LayerNorm(**norm_options(self))
            self.up = linen.Dense(4 * config.embed_dim, dtype=self.dtype)
            self.down = linen.Dense(config.embed_dim, dtype=self.dtype)

        def __call__(self, x):
            causal = linen.make_causal_mask(x[..., 0]) if has(self, "attention-causal") else None
            branch = self.attention(self.attention_norm(x), mask=causal, sow_weights=True)
            x = branch if has(self, "residual-around-attention-missing") else x + branch
            hidden = self.up(self.feed_forward_norm(x))
            exact = {} if has(self, "gelu-tanh") else {"approximate": False}
            hidden = linen.gelu(hidden, **exact)
            self.sow("intermediates", "activation", hidden)
            return x + self.down(hidden)

    class Model(linen.Module):
        mistakes: tuple
        dtype: np.dtype

        def setup(self):
            self.embedding = linen.Embed(config.vocab_size, config.embed_dim, dtype=self.dtype)
            self.blocks = [Block(self.mistakes, self.dtype) for _ in range(config.num_layers)]
            self.final_norm = linen.LayerNorm(**norm_options(self))
            self.head = linen.Dense(config.vocab_size, dtype=self.dtype)

        def __call__(self, tokens):
            layout = "interleaved" if has(self, "positions-interleaved") else "concatenated"
            table = marref.sinusoidal_table(tokens.shape[1], config.embed_dim, layout)
            x = self.embedding(tokens) + table.astype(self.dtype)
            self.sow("intermediates", "embedded", x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.final_norm(x))

    def has(module, mistake):
        return mistake in module.mistakes

    def norm_options(module):
        epsilon = {} if has(module, "layer-norm-epsilon-1e-6") else {"epsilon": 1e-5}
        return {"dtype": module.dtype, **epsilon}

    return Model


@pytest.fixture(scope="module")
def run_flax(vectors, model_of):
    """Run the user's program; what it computes in bfloat16 is handed over in float32."""
    jax = importlib.import_module("jax")
    batch = vectors.batch
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), vectors.params)
    variables = interop.flax.to_variables(params, vectors.model.num_heads)

    def run(*mistakes, precision="float32"):
        model = model_of(mistakes, jax.numpy.dtype(precision))

        def loss(variables):
            logits, state = model.apply(
                variables, batch["tokens"], capture_intermediates=True, mutable="intermediates"
            )
            log_probabilities = jax.nn.log_softmax(logits)
            chosen = batch["targets"][..., np.newaxis]
            errors = -jax.numpy.take_along_axis(log_probabilities, chosen, axis=-1)[..., 0]
            where = None if "loss-over-all-positions" in mistakes else batch["mask"] == 1
            return errors.mean(where=where), state["intermediates"]

        # Without jit: to compile each of the models would take longer than all else.
        results = jax.value_and_grad(loss, has_aux=True)(variables)
        (value, captured), grads = jax.tree.map(lambda x: np.asarray(x, np.float32), results)
        named = trees.flatten(interop.flax.to_params(grads))
        return {
            **activations(captured),
            "loss": value,
            **{f"gradients/{name}": array for name, array in named.items()},
        }

    return run


def activations(captured, prefix=""):
    """By golden names, the activations in the nested dict that linen captured."""
    named = {}
    for key, entry in captured.items():
        if isinstance(entry, dict):
            named |= activations(entry, f"{prefix}{key}.")
            continue
        (array,) = entry
        path = re.sub(r"\.?__call__$", "", prefix + key)
        block, name = re.fullmatch(r"(?:blocks_(\d+)\.?)?(.*)", path).groups()
        if name not in CAPTURED or (block is None and name == ""):
            continue
        if name in ("attention.query", "attention.key", "attention.value"):
            array = array.swapaxes(1, 2)
        where = "" if block is None else f"blocks.{block}."
        named[f"activations/{where}{CAPTURED[name]}"] = array
    return named


def names_of(explanation):
    return tuple(fault.name for fault in explanation.faults)


def test_a_flax_model_hands_over_every_activation_but_the_context(vectors, run_flax):
    expected = {
        name
        for name in vectors.arrays
        if re.match("activations/|loss|gradients/", name) and not name.endswith(".context")
    }
    assert run_flax().keys() == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_correct_flax_model_is_never_accused(vectors, run_flax, precision):
    diagnosis = diagnose(vectors, run_flax(precision=precision), precision, most_together=1)
    assert diagnosis.agrees, diagnosis.comparison.first
    assert diagnosis.comparison.precision == precision
    assert diagnosis.explanations == ()


@pytest.mark.parametrize("name", FIRST_DIFFERENCE)
def test_a_mistake_in_flax_is_located_and_named(vectors, run_flax, name):
    diagnosis = diagnose(vectors, run_flax(name), most_together=1)
    assert diagnosis.comparison.precision == "float32"
    assert diagnosis.comparison.first.name == FIRST_DIFFERENCE[name]
    assert names_of(diagnosis.explanations[0]) == (name,)
    assert diagnosis.explanations[0].ratio < 1


def test_both_defaults_of_flax_are_named_together(vectors, run_flax):
    diagnosis = diagnose(vectors, run_flax(*DEFAULTS))
    assert diagnosis.comparison.first.name == FIRST_DIFFERENCE["layer-norm-epsilon-1e-6"]
    assert set(names_of(diagnosis.explanations[0])) == set(DEFAULTS)
    assert diagnosis.explanations[0].ratio < 1
