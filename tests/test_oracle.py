"""marref against the oracle: plain loops over 50-digit numbers, written from the formulas alone.

TOLERANCE in float64 is relative to the largest entry; it is 450 times the float64 epsilon 2⁻⁵².
The first-order error of an algorithm is proportional to the epsilon, with a factor that depends
on the numbers and not on their precision.  Whatever keeps it below 450 epsilons in float64 does
so in float32, where TOLERANCE_32 is 450 · 2⁻²³ = 5.4e-5.
"""

import functools
import itertools

import mpmath
import numpy as np
import pytest

import marref
from marref import decoding

from . import oracle, strategies
from .strategies import both_ways

TOLERANCE = 1e-13
TOLERANCE_32 = TOLERANCE * np.finfo(np.float32).eps / np.finfo(np.float64).eps
EPSILON = 1e-5

SHAPES = {
    "two layers, two heads": {
        "vocab_size": 6,
        "embed_dim": 8,
        "num_layers": 2,
        "num_heads": 2,
        "seq_len": 5,
    },
    "one head": {"vocab_size": 5, "embed_dim": 4, "num_layers": 1, "num_heads": 1, "seq_len": 3},
    "three heads": {"vocab_size": 7, "embed_dim": 6, "num_layers": 1, "num_heads": 3, "seq_len": 4},
}
every_model = pytest.mark.parametrize(
    ("shape", "gelu", "positions"),
    list(itertools.product(SHAPES, ["erf", "tanh"], ["concatenated", "interleaved"])),
)


@functools.cache
def build(shape, gelu, positions, dtype=np.float64):
    """A model, random parameters, and the oracle's logits as a function of one sequence."""
    model = marref.build(
        **SHAPES[shape], dropout=0.0, layer_norm_epsilon=EPSILON, gelu=gelu, positions=positions
    )
    params = strategies.random_params(model, np.random.default_rng(1), dtype, std=0.5)
    digits = oracle.exact(params)
    options = {"num_heads": model.num_heads, "gelu": gelu, "positions": positions}

    @functools.cache
    def logits_of(sequence):
        return oracle.forward(digits, [sequence], **options, epsilon=EPSILON)[0]

    return model, params, lambda tokens: logits_of(tuple(map(int, tokens)))


def random_batch(model, batch=2):
    rng = np.random.default_rng(2)
    tokens, targets = rng.integers(model.vocab_size, size=(2, batch, model.seq_len))
    mask = rng.random(tokens.shape) < 0.6
    mask[0, 0], mask[0, 1] = True, False
    return tokens, targets, mask


def assert_agrees(actual, expected, tolerance=TOLERANCE):
    """The largest difference is at most `tolerance` times the largest entry."""
    expected = np.array(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance


@pytest.mark.parametrize("positions", ["concatenated", "interleaved"])
@pytest.mark.parametrize("embed_dim", [2, 4, 10])
def test_sinusoidal_tables_are_those_of_the_oracle(embed_dim, positions):
    # An angle of 49 may be off by a few times 49 · 2⁻⁵³, and its sine by as much.
    actual = marref.sinusoidal_table(50, embed_dim, positions)
    assert_agrees(actual, oracle.sinusoidal_table(50, embed_dim, positions))


@every_model
def test_logits_are_those_of_the_oracle(shape, gelu, positions):
    model, params, logits_of = build(shape, gelu, positions)
    tokens, _, _ = random_batch(model)
    assert_agrees(model(params, tokens), [logits_of(row) for row in tokens])
    shorter = tokens[:, 1:]
    assert_agrees(model(params, shorter), [logits_of(row) for row in shorter])


@both_ways
@every_model
def test_the_loss_of_the_model_is_that_of_the_oracle(way, shape, gelu, positions):
    model, params, logits_of = build(shape, gelu, positions)
    tokens, targets, mask = random_batch(model)
    expected = oracle.masked_loss([logits_of(row) for row in tokens], targets, mask)
    assert_agrees(marref.mar_loss(model(params, tokens), targets, mask), expected)
    loss, _ = way.loss_and_grads(model, params, tokens, targets, mask)
    assert_agrees(loss, expected)


@every_model
def test_float32_logits_and_loss_are_those_of_the_oracle(shape, gelu, positions):
    model, params, logits_of = build(shape, gelu, positions, np.float32)
    tokens, targets, mask = random_batch(model)
    logits, expected = model(params, tokens), [logits_of(row) for row in tokens]
    assert logits.dtype == np.float32
    assert_agrees(logits, expected, TOLERANCE_32)
    loss = marref.mar_loss(logits, targets, mask)
    assert_agrees(loss, oracle.masked_loss(expected, targets, mask), TOLERANCE_32)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 10000.0])
def test_the_loss_of_any_logits_is_that_of_the_oracle(scale):
    rng = np.random.default_rng(3)
    logits = rng.normal(0.0, scale, (3, 4, 6))
    targets = rng.integers(6, size=(3, 4))
    some, every, one = rng.random((3, 4)) < 0.5, np.ones((3, 4), bool), np.zeros((3, 4), bool)
    one[1, 1] = True
    for mask in (some, every, one):
        expected = oracle.masked_loss(oracle.exact(logits), targets, mask)
        assert_agrees(marref.mar_loss(logits, targets, mask), expected)


def test_the_loss_without_masked_positions_is_zero_as_in_the_oracle():
    logits, targets, mask = np.ones((1, 2, 3)), np.zeros((1, 2), int), np.zeros((1, 2), bool)
    assert marref.mar_loss(logits, targets, mask) == 0
    assert oracle.masked_loss(oracle.exact(logits), targets, mask) == 0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_reveal_counts_are_those_of_the_oracle(schedule):
    for num_masked in (*range(13), 64, 255, 256):
        for num_steps in (*range(1, 14), 48, 300):
            masked = oracle.masked_after_steps(num_masked, num_steps, schedule)
            revealed = [a - b for a, b in itertools.pairwise([num_masked, *masked])]
            actual = marref.schedules.SCHEDULES[schedule](num_masked, num_steps)
            assert actual.tolist() == revealed, (num_masked, num_steps)


def assert_decodes_like_the_oracle(way, model, params, logits_of, start, **options):
    """Tokens and masks after every step are the same, and confidences to TOLERANCE.

    The package decodes the batch at once, the oracle one sequence after the other: those that
    need fewer steps stay as they are.
    """
    tokens, steps = way.iterative_decode(model, params, tokens=start, return_steps=True, **options)
    plain = way.iterative_decode(model, params, tokens=start, **options)
    np.testing.assert_array_equal(plain, tokens)
    traces = [oracle.decode(logits_of, row, **options) for row in start.tolist()]
    assert len(steps["tokens"]) == max(map(len, traces))
    for row, trace in enumerate(traces):
        for step in range(len(steps["tokens"])):
            known = (start[row].tolist(), [False] * start.shape[1], [1] * start.shape[1])
            expected = trace[min(step, len(trace) - 1)] if trace else known
            assert steps["tokens"][step, row].tolist() == expected[0]
            assert steps["mask"][step, row].tolist() == expected[1]
            confidence = np.array(expected[2], dtype=np.float64)
            np.testing.assert_allclose(steps["confidence"][step, row], confidence, TOLERANCE)
        assert tokens[row].tolist() == (trace[-1][0] if trace else start[row].tolist())


def starts(model, mask_token_id):
    """All unknown, one unknown, half unknown, all known."""
    tokens, _, _ = random_batch(model, batch=4)
    tokens[tokens == mask_token_id] = 1
    tokens[0] = tokens[1, -1] = tokens[2, ::2] = mask_token_id
    return tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@both_ways
@every_model
def test_decoding_is_that_of_the_oracle(way, shape, gelu, positions, schedule, temperature):
    model, params, logits_of = build(shape, gelu, positions)
    mask_token_id = 4 if shape == "one head" else 0
    start = starts(model, mask_token_id)
    options = {"schedule": schedule, "temperature": temperature, "mask_token_id": mask_token_id}
    for num_steps in (1, 2, 3, 8):
        assert_decodes_like_the_oracle(
            way, model, params, logits_of, start, num_steps=num_steps, **options
        )


@both_ways
def test_decoding_from_nothing_is_that_of_the_oracle(way):
    model, params, logits_of = build("two layers, two heads", "erf", "concatenated")
    options = {"num_steps": 3, "temperature": 1.0, "schedule": "cosine"}
    for length in range(1, model.seq_len + 1):
        actual = way.iterative_decode(model, params, seq_len=length, **options)
        expected, _, _ = oracle.decode(logits_of, [0] * length, **options)[-1]
        assert actual.tolist() == [expected]


@both_ways
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ties_are_decoded_as_by_the_oracle(way, schedule):
    # Without the last kernel the logits are its bias everywhere: [MASK] would win, and of the
    # others the ids 2 and 3 are equal, as all positions are.
    model, params, _ = build("two layers, two heads", "erf", "concatenated")
    bias = np.array([2.0, 0.5, 1.0, 1.0, 0.25, -1.0])
    params = params | {"head": {"kernel": np.zeros((model.embed_dim, 6)), "bias": bias}}
    rows = oracle.exact(np.tile(bias, (model.seq_len, 1)))
    start = np.array([[0, 0, 0, 0, 0], [0, 4, 0, 0, 0]])
    options = {"num_steps": 3, "temperature": 1.0, "schedule": schedule}
    assert_decodes_like_the_oracle(way, model, params, lambda tokens: rows, start, **options)
    tokens, _, _ = oracle.decode(lambda tokens: rows, [0, 4, 0, 0, 0], **options)[0]
    assert tokens[:3] == [2, 4, 0], "the oracle itself takes the lower id and the lower position"


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_id_is_drawn_with_the_probability_of_the_oracle(temperature, filters):
    """Where the id changes as u rises from 0 to 1 are the oracle's cumulative probabilities."""
    rng = np.random.default_rng(0)
    for logits in (*rng.normal(0.0, 2.0, (20, 7)), np.array([9.0, 1, 0, 1, 1, 0, -200])):
        options = {"temperature": temperature, "mask_token_id": 3, **filters}
        probabilities = oracle.drawn_from(oracle.exact(logits), **options)
        rule = decoding.Rule(
            num_steps=1,
            schedule="cosine",
            order="confidence",
            choice_temperature=0.0,
            exclude_mask_token=True,
            **options,
        )
        ends = np.cumsum(np.array(probabilities, np.float64))
        possible = [token for token in range(7) if probabilities[token] > 1e-10]
        lowest = [0.0, *ends[possible[:-1]] + 1e-12]
        highest = [*ends[possible[:-1]] - 1e-12, 1.0 - 2.0**-53]
        for uniforms in (lowest, highest):
            rows = np.tile(logits, (len(possible), 1))
            tokens = decoding.predict(rows, rule, np.array(uniforms)).tokens
            assert tokens.tolist() == possible


def test_the_oracle_leaves_the_global_precision_alone():
    assert oracle.mp.dps == 50
    assert mpmath.mp.dps == 15
