"""Every backward, held to derivatives that know nothing of the chain rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import marref
from marref import loss, trees
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
from marref.verify import check_gradients, check_layer
from marref.verify.self_check import BOUNDS, random_like, run

from . import strategies

METHODS = pytest.mark.parametrize("method", BOUNDS)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4))
features = st.sampled_from([2, 4, 6])
seeds = st.integers(0, 2**32 - 1)


def assert_agrees(forward, backward, point, rng, method):
    errors = check_layer(forward, backward, point, rng, method=method)
    assert all(error <= BOUNDS[method] for error in errors.values()), errors


def split(point):
    return {name: child for name, child in point.items() if name != "x"}, point["x"]


def assert_layer_agrees(init, forward, backward, shape, seed, method):
    """Check a layer with one input and parameters of its own."""
    rng = np.random.default_rng(seed)

    def push_back(point, dy, cache):
        dx, grads = backward(split(point)[0], dy, cache)
        return {"x": dx, **grads}

    point = {"x": rng.normal(size=shape), **random_like(init(rng), rng)}
    assert_agrees(lambda moved: forward(*split(moved)), push_back, point, rng, method)


@METHODS
@given(shape=shapes, num_in=features, num_out=features, seed=seeds)
@settings(max_examples=15)
def test_linear(method, shape, num_in, num_out, seed):
    assert_layer_agrees(
        lambda rng: linear.init(rng, num_in, num_out, 1.0),
        linear.forward,
        linear.backward,
        (*shape, num_in),
        seed,
        method,
    )


@METHODS
@given(shape=shapes, num=features, epsilon=st.sampled_from([1e-5, 1e-2]), seed=seeds)
@settings(max_examples=15)
def test_layer_norm(method, shape, num, epsilon, seed):
    assert_layer_agrees(
        lambda rng: layer_norm.init(num),
        lambda params, x: layer_norm.forward(params, x, epsilon),
        layer_norm.backward,
        (*shape, num),
        seed,
        method,
    )


@METHODS
@given(shape=shapes, kind=st.sampled_from(gelu.KINDS), scale=st.floats(0.1, 8), seed=seeds)
@settings(max_examples=15)
def test_gelu(method, shape, kind, scale, seed):
    rng = np.random.default_rng(seed)
    assert_agrees(
        lambda point: gelu.forward(point["x"], kind),
        lambda point, dy, cache: {"x": gelu.backward(dy, cache)},
        {"x": rng.normal(0.0, scale, shape)},
        rng,
        method,
    )


@METHODS
@given(shape=shapes, num=features, kind=st.sampled_from(gelu.KINDS), seed=seeds)
@settings(max_examples=8)
def test_feed_forward(method, shape, num, kind, seed):
    assert_layer_agrees(
        lambda rng: feed_forward.init(rng, num, 1.0, 1.0),
        lambda params, x: feed_forward.forward(params, x, kind),
        feed_forward.backward,
        (*shape, num),
        seed,
        method,
    )


@METHODS
@given(shape=shapes, num_heads=st.integers(1, 3), head_dim=st.integers(1, 3), seed=seeds)
@settings(max_examples=15)
def test_attention(method, shape, num_heads, head_dim, seed):
    num = num_heads * head_dim
    assert_layer_agrees(
        lambda rng: attention.init(rng, num, 1.0, 1.0),
        lambda params, x: attention.forward(params, x, num_heads),
        attention.backward,
        (*shape, num),
        seed,
        method,
    )


@METHODS
@given(
    batch=st.integers(1, 2),
    num_heads=st.integers(1, 3),
    queries=st.integers(1, 4),
    keys=st.integers(1, 4),
    head_dim=st.integers(1, 3),
    seed=seeds,
)
@settings(max_examples=15)
def test_attend(method, batch, num_heads, queries, keys, head_dim, seed):
    """With fewer or more queries than keys, so that a forgotten transpose cannot fit."""
    rng = np.random.default_rng(seed)
    lengths = {"query": queries, "key": keys, "value": keys}
    assert_agrees(
        lambda point: attention.attend(**point),
        lambda point, dy, cache: dict(
            zip(lengths, attention.attend_backward(dy, cache), strict=True)
        ),
        {
            name: rng.normal(size=(batch, num_heads, length, head_dim))
            for name, length in lengths.items()
        },
        rng,
        method,
    )


@METHODS
@given(shape=shapes, num=st.integers(1, 6), scale=st.floats(0.1, 3), seed=seeds)
@settings(max_examples=15)
def test_softmax(method, shape, num, scale, seed):
    """A softmax has its own output for a cache."""
    rng = np.random.default_rng(seed)
    assert_agrees(
        lambda point: (attention.softmax(point["scores"]),) * 2,
        lambda point, dy, weights: {"scores": attention.softmax_backward(dy, weights)},
        {"scores": rng.normal(0.0, scale, (*shape, num))},
        rng,
        method,
    )


@METHODS
@given(shape=shapes, positions=st.sampled_from(marref.positions.KINDS), num=features, seed=seeds)
@settings(max_examples=15)
def test_embedding(method, shape, positions, num, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, size=shape)
    assert_agrees(
        lambda point: embedding.forward(point, tokens, positions),
        embedding.backward,
        random_like(embedding.init(rng, 3, num, 1.0), rng),
        rng,
        method,
    )


@METHODS
@given(shape=shapes, rate=st.floats(0.0, 0.9), seed=seeds)
@settings(max_examples=15)
def test_dropout(method, shape, rate, seed):
    rng = np.random.default_rng(seed)
    keep = dropout.draw(rng, shape, rate)
    assert_agrees(
        lambda point: dropout.forward(point["x"], keep, rate),
        lambda point, dy, cache: {"x": dropout.backward(dy, cache)},
        {"x": rng.normal(size=shape)},
        rng,
        method,
    )


@METHODS
@given(shape=shapes, num_heads=st.integers(1, 2), rate=st.sampled_from([0.0, 0.3]), seed=seeds)
@settings(max_examples=5)
def test_block(method, shape, num_heads, rate, seed):
    num = 2 * num_heads
    keep = block.draw_keep(np.random.default_rng(seed), (*shape, num), rate)

    def forward(params, x):
        options = {"num_heads": num_heads, "gelu": "erf", "epsilon": 1e-5}
        return block.forward(params, x, **options, keep=keep, dropout_rate=rate)

    assert_layer_agrees(
        lambda rng: block.init(rng, num, 2, 1.0),
        forward,
        block.backward,
        (*shape, num),
        seed,
        method,
    )


@METHODS
@given(shape=shapes, vocab_size=st.integers(2, 6), seed=seeds)
@settings(max_examples=15)
def test_loss(method, shape, vocab_size, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 3.0, (*shape, vocab_size))
    targets, mask = rng.integers(vocab_size, size=shape), rng.random(shape) < 0.5
    errors = check_gradients(
        lambda point: marref.mar_loss(point["logits"], targets, mask),
        {"logits": logits},
        {"logits": loss.backward(loss.forward(logits, targets, mask)[1])},
        method=method,
    )
    assert errors["logits"] <= BOUNDS[method]


@METHODS
@given(shape=shapes, vocab_size=st.integers(2, 6), seed=seeds)
@settings(max_examples=15)
def test_cross_entropy_with_the_uniform_distribution(method, shape, vocab_size, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 3.0, (*shape, vocab_size))
    targets, mask = rng.integers(vocab_size, size=shape), rng.random(shape) < 0.5
    errors = check_gradients(
        lambda point: loss.uniform(loss.forward(point["logits"], targets, mask)[1])[0],
        {"logits": logits},
        {"logits": loss.uniform(loss.forward(logits, targets, mask)[1])[1]},
        method=method,
    )
    assert errors["logits"] <= BOUNDS[method]


@METHODS
@strategies.both_ways
@given(case=strategies.cases(dropout=0.2))
@settings(max_examples=20)
def test_whole_model_with_dropout(method, way, case):
    model, params, tokens, targets, mask, seed = case
    value, grads = way.loss_and_grads(
        model, params, tokens, targets, mask, np.random.default_rng(seed)
    )

    def function(moved):
        logits, _ = model.forward(moved, tokens, np.random.default_rng(seed))
        return marref.mar_loss(logits, targets, mask)

    # The fast way runs the head at the masked positions only.
    assert abs(value - function(params)) <= 1e-13 * max(abs(value), 1)
    errors = check_gradients(
        function, params, grads, method=method, max_entries=3, rng=np.random.default_rng(seed)
    )
    assert all(error <= BOUNDS[method] for error in errors.values()), errors


@strategies.both_ways
@given(case=strategies.cases())
def test_loss_and_grads_is_forward_loss_and_both_backwards(way, case):
    model, params, tokens, targets, mask, _ = case
    value, grads = way.loss_and_grads(model, params, tokens, targets, mask)
    logits, cache = model.forward(params, tokens)
    long_value, loss_cache = loss.forward(logits, targets, mask)
    long_grads = model.backward(params, loss.backward(loss_cache), cache)
    assert value == pytest.approx(long_value, rel=1e-13)
    largest = max(np.abs(leaf).max() for leaf in trees.flatten(grads).values())
    fast = way.loss_and_grads is marref.loss_and_grads
    atol = 1e-13 * largest * (strategies.steepness(cache) if fast else 1.0)
    for name, leaf in trees.flatten(long_grads).items():
        np.testing.assert_allclose(leaf, trees.flatten(grads)[name], rtol=0, atol=atol)


@given(case=strategies.cases(dropout=0.2))
@settings(max_examples=30)
def test_backward_is_linear_in_dlogits(case):
    model, params, tokens, _, _, seed = case
    logits, cache = model.forward(params, tokens, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, *logits.shape))
    of_sum = trees.flatten(model.backward(params, 2.0 * first + second, cache))
    of_first = trees.flatten(model.backward(params, first, cache))
    of_second = trees.flatten(model.backward(params, second, cache))
    largest = max(np.abs(leaf).max() for leaf in of_sum.values())
    for name, leaf in of_sum.items():
        expected = 2.0 * of_first[name] + of_second[name]
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-12 * largest)


def test_embedding_gradients_accumulate_over_repeated_tokens():
    params = {"table": np.zeros((3, 2))}
    cache = {"tokens": np.array([[1, 1, 2, 1], [1, 2, 2, 1]])}
    grads = embedding.backward(params, np.ones((2, 4, 2)), cache)
    np.testing.assert_array_equal(grads["table"], [[0, 0], [5, 5], [3, 3]])


@strategies.both_ways
@given(case=strategies.cases())
def test_key_bias_gradient_is_zero(way, case):
    model, params, tokens, targets, mask, _ = case
    grads = trees.flatten(way.loss_and_grads(model, params, tokens, targets, mask)[1])
    largest = max(np.abs(leaf).max() for leaf in grads.values())
    for name, leaf in grads.items():
        if name.endswith("key.bias"):
            assert np.abs(leaf).max() <= 1e-14 * largest


def test_a_wrong_gradient_is_reported_by_name():
    point = {"good": np.array([1.0, 2.0]), "bad": np.array([3.0])}
    gradients = {"good": np.array([2.0, 4.0]), "bad": np.array([6.001])}
    for method in BOUNDS:
        errors = check_gradients(
            lambda p: (p["good"] ** 2).sum() + (p["bad"] ** 2).sum(),
            point,
            gradients,
            method=method,
        )
        assert errors["good"] < 1e-9
        assert errors["bad"] == pytest.approx(0.001 / 6.001, rel=1e-5)


def test_self_check_passes_and_covers_every_parameter():
    rows = list(run())
    assert all(row.passed for row in rows)
    assert [row.name for row in rows if row.part == "attend"] == ["query", "key", "value"]
    model = marref.build(
        vocab_size=7, embed_dim=8, num_layers=2, num_heads=2, seq_len=5, num_classes=3
    )
    checked = {row.name for row in rows if row.part == "model"}
    assert checked == set(model.parameter_shapes)


@strategies.both_ways
@given(case=strategies.cases())
@settings(max_examples=10)
def test_gradients_are_analytic_too(way, case):
    """The complex step through the gradients themselves: a product with the Hessian."""
    model, params, tokens, targets, mask, seed = case
    rng = np.random.default_rng(seed)
    direction = trees.map_leaves(lambda leaf: rng.normal(size=leaf.shape), params)

    def gradient(scale):
        moved = trees.map_leaves(lambda leaf, d: leaf + scale * d, params, direction)
        return trees.flatten(way.loss_and_grads(model, moved, tokens, targets, mask)[1])

    lifted = trees.map_leaves(lambda leaf: leaf.astype(complex), params)
    moved = trees.map_leaves(lambda leaf, d: leaf + 1e-30j * d, lifted, direction)
    exact = trees.flatten(way.loss_and_grads(model, moved, tokens, targets, mask)[1])
    above, below, step = gradient(1e-5), gradient(-1e-5), 2e-5
    largest = max(np.abs(leaf.imag).max() for leaf in exact.values()) / 1e-30
    for name, leaf in exact.items():
        np.testing.assert_allclose(
            leaf.imag / 1e-30, (above[name] - below[name]) / step, rtol=0, atol=1e-6 * largest
        )


def test_a_function_that_drops_the_imaginary_part_is_an_error():
    point, grads = {"x": np.ones(2)}, {"x": np.ones(2)}
    with pytest.raises(TypeError, match="drops the imaginary part"):
        check_gradients(lambda moved: float(moved["x"].sum().real), point, grads)
    errors = check_gradients(
        lambda moved: float(moved["x"].sum().real), point, grads, method="central"
    )
    assert errors["x"] < 1e-9
