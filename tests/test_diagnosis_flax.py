"""Diagnosis names the mistakes of a user who wrote MAR in Flax's linen.

The user's model, `benchmarks.ports.in_flax`, is made of linen's own layers, takes the variables
that marref wrote for it, and hands over, by golden names, the activations that linen captures, the
loss, and jax's gradients.
"""

import re

import pytest

from marref import files
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


@pytest.fixture(scope="module")
def vectors():
    return Golden(*files.load(golden.shipped("tiny")))


@pytest.fixture(scope="module")
def run_flax(vectors):
    """Run the user's program; what it computes in bfloat16 is handed over in float32."""
    pytest.importorskip("flax")
    from benchmarks.ports import in_flax

    def run(*mistakes, precision="float32"):
        return in_flax.FlaxPort(vectors, precision, mistakes).arrays(optimisers=False)

    return run


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
