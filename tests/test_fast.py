"""The fast way, held to the definition: the same results up to rounding, whatever is shared."""

import ctypes
import os
import subprocess
import sys
import threading

import mpmath
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

import marref
from marref import decoding, model, optim, trees
from marref.fast import block, gelu, kernels, memory, packed, parallel, pieces, training
from marref.fast import decoding as fast_decoding
from marref.fast import optim as fast_optim
from marref.layers import attention
from tests import strategies

THREADS = st.sampled_from([None, 1, 2, 3, 6])


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in trees.flatten(tree).values()])


def blas_threads():
    pools = threadpoolctl.ThreadpoolController().select(user_api="blas").info()
    return {pool["num_threads"] for pool in pools}


# Training.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("features", "logits"), [(1, 1), (40, 30), (2**18, 2**21)])
@given(data=st.data(), num_threads=THREADS)
@settings(max_examples=30)
def test_loss_and_gradients_are_the_definitions(dropout, features, logits, data, num_threads):
    case = data.draw(strategies.cases(dropout=dropout, max_batch=5))
    if data.draw(st.booleans()):
        # Sequences of which nothing is masked, and batches.
        rng = np.random.default_rng(case.seed)
        mask = rng.random(case.tokens.shape) < data.draw(st.sampled_from([0.0, 0.2]))
        case = case._replace(mask=mask)
    if data.draw(st.booleans()):
        # Scores so far apart that the maximum must come off.
        for block_params in case.params["blocks"]:
            block_params["attention"]["query"]["kernel"] *= 300.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_FEATURES_AT_ONCE", features)
        patch.setattr(kernels, "LOGITS_AT_ONCE", logits)
        smoothing = data.draw(st.sampled_from([0.0, 0.1, 0.9]))
        assert_trains_as_the_definition(case, num_threads, smoothing)


def assert_trains_as_the_definition(case, num_threads, smoothing):
    mar, params, *batch, seed = case

    def run(function, **options):
        rng = np.random.default_rng(seed)
        value, grads = function(mar, params, *batch, rng, label_smoothing=smoothing, **options)
        return value, grads, rng.random()

    value, grads, next_number = run(model.loss_and_grads)
    fast_value, fast_grads, fast_next = run(marref.loss_and_grads, num_threads=num_threads)
    # Saturated attention multiplies rounding by the size of its scores.
    _, cache = mar.forward(params, batch[0], np.random.default_rng(seed))
    scores = [
        np.abs(block["attention"]["query"]).max() * np.abs(block["attention"]["key"]).max()
        for block in cache["blocks"]
    ]
    rtol = 1e-13 * (max(scores) if max(scores) > 34 else 1.0)
    assert fast_value == pytest.approx(value, rel=rtol)
    assert list(trees.flatten(fast_grads)) == list(trees.flatten(grads))
    atol = rtol * np.abs(flat(grads)).max() * strategies.steepness(cache)
    np.testing.assert_allclose(flat(fast_grads), flat(grads), rtol=0, atol=atol)
    assert fast_next == next_number

    again = run(marref.loss_and_grads, num_threads=num_threads)
    assert again[0] == fast_value
    np.testing.assert_array_equal(flat(again[1]), flat(fast_grads))


@given(case=strategies.cases(dropout=0.3, dtype=np.float32, max_batch=5), num_threads=THREADS)
@settings(max_examples=30)
def test_in_float32_both_ways_are_within_its_rounding_of_float64(case, num_threads):
    mar, params, *batch, seed = case
    wide = trees.map_leaves(lambda leaf: leaf.astype(np.float64), params)
    exact, exact_grads = model.loss_and_grads(mar, wide, *batch, np.random.default_rng(seed))
    errors = []
    for function in (model.loss_and_grads, marref.loss_and_grads):
        options = {} if function is model.loss_and_grads else {"num_threads": num_threads}
        value, grads = function(mar, params, *batch, np.random.default_rng(seed), **options)
        assert value.dtype == flat(grads).dtype == np.float32
        difference = np.abs(flat(grads) - flat(exact_grads)).max() / np.abs(flat(exact_grads)).max()
        errors.append(max(difference, abs(value - exact) / max(1.0, exact)))
    # The same order: neither way loses digits that the other keeps.
    assert errors[1] < 8 * errors[0] + 16 * np.finfo(np.float32).eps


def test_by_default_several_threads_share_enough_work(monkeypatch):
    mar = marref.build(vocab_size=5, embed_dim=8, num_layers=2, num_heads=2, seq_len=6)
    params = strategies.random_params(mar, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(5, size=(4, 6))
    asked = []
    original = parallel.threads
    monkeypatch.setattr(
        parallel, "threads", lambda number, **more: asked.append(number) or original(number, **more)
    )
    monkeypatch.setattr(parallel, "num_cores", lambda: 3)
    for worth, number in ((10**6, 1), (1, 3)):
        asked.clear()
        monkeypatch.setattr(parallel, "FEATURES_WORTH_A_THREAD", worth)
        marref.loss_and_grads(mar, params, tokens, tokens, tokens < 3)
        marref.fast.logits(mar, params, tokens)
        marref.iterative_decode(mar, params, batch_size=4)
        assert asked == [number] * 3


def test_complex_parameters_are_the_definitions_business():
    mar = marref.build(vocab_size=5, embed_dim=4, num_layers=2, num_heads=2, seq_len=3)
    params = strategies.random_params(mar, np.random.default_rng(0), np.complex128)
    tokens = np.array([[0, 1, 0]])
    value, grads = marref.loss_and_grads(mar, params, tokens, tokens, tokens < 1)
    expected, expected_grads = model.loss_and_grads(mar, params, tokens, tokens, tokens < 1)
    assert value == expected
    np.testing.assert_array_equal(flat(grads), flat(expected_grads))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_logits_take_the_definitions_loss(smoothing):
    mar = marref.build(vocab_size=5, embed_dim=4, num_layers=1, num_heads=2, seq_len=3)
    params = strategies.random_params(mar, np.random.default_rng(0), np.float32)
    tokens = np.array([[0, 1, 0]])
    for size in (100.0, 1e4):
        params["head"]["bias"][:] = np.array([0, 1, -1, 2, 0.5]) * size
        value, grads = marref.loss_and_grads(
            mar, params, tokens, tokens, tokens < 1, label_smoothing=smoothing
        )
        expected, expected_grads = model.loss_and_grads(
            mar, params, tokens, tokens, tokens < 1, label_smoothing=smoothing
        )
        assert value == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(flat(grads), flat(expected_grads), rtol=0, atol=1e-6)


def test_the_loss_of_sure_predictions_keeps_its_digits():
    logits = np.array([[0.0, 30.0, 2.0], [35.0, -4.0, -5.0]], np.float32)
    ids = np.array([1, 0])
    exact = logits.astype(float)
    value, cache = marref.loss.forward(exact, ids, np.ones(2, bool))
    fast, dlogits = training._cross_entropy(logits.copy(), ids, 2, 0.0)
    assert fast == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(dlogits, marref.loss.backward(cache), rtol=1e-5)


def test_logits_that_are_not_finite_are_an_error():
    mar = marref.build(vocab_size=5, embed_dim=4, num_layers=1, num_heads=2, seq_len=3)
    params = strategies.random_params(mar, np.random.default_rng(0))
    params["head"]["bias"][2] = np.inf
    tokens = np.array([[0, 1, 0]])
    with pytest.raises(ValueError, match="logits: inf at"):
        marref.loss_and_grads(mar, params, tokens, tokens, tokens < 1)
    for num_threads in (1, 2):
        with pytest.raises(ValueError, match="logits: inf at"):
            marref.iterative_decode(mar, params, num_threads=num_threads)


def test_attention_weights_that_are_let_go_are_computed_again(monkeypatch):
    """In a model whose weights take more memory than the rest; gradients are those of backward."""
    mar = marref.build(vocab_size=5, embed_dim=2, num_layers=2, num_heads=1, seq_len=33)
    params = strategies.random_params(mar, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(5, size=(2, 33))
    weighed = []
    original = kernels.weigh
    monkeypatch.setattr(kernels, "weigh", lambda *args: weighed.append(1) or original(*args))
    for length, times in ((33, 4), (31, 2)):
        weighed.clear()
        part = tokens[:, :length]
        _, grads = marref.loss_and_grads(mar, params, part, part, part < 3, num_threads=1)
        assert len(weighed) == times
        _, expected = model.loss_and_grads(mar, params, part, part, part < 3)
        atol = 1e-13 * abs(flat(expected)).max()
        np.testing.assert_allclose(flat(grads), flat(expected), rtol=0, atol=atol)


def test_training_holds_few_sequences_and_logits_at_a_time(monkeypatch):
    mar = marref.build(vocab_size=8, embed_dim=4, num_layers=1, num_heads=1, seq_len=6)
    params = strategies.random_params(mar, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(8, size=(7, 6))
    sequences, logits = [], []
    forward, cross_entropy = block.forward, training._cross_entropy

    def counting_forward(model, packed, x, batch, *rest, **options):
        sequences.append(batch)
        return forward(model, packed, x, batch, *rest, **options)

    def counting_cross_entropy(part, *rest):
        logits.append(len(part))
        return cross_entropy(part, *rest)

    monkeypatch.setattr(block, "forward", counting_forward)
    monkeypatch.setattr(training, "_cross_entropy", counting_cross_entropy)
    monkeypatch.setattr(training, "_FEATURES_AT_ONCE", 2 * 6 * 4 + 5)
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 5 * 8 + 7)
    for num_threads, expected in ((1, [1, 2, 2, 2]), (2, [1, 2, 2, 2]), (3, [1, 1, 1, 1, 1, 2])):
        sequences.clear()
        logits.clear()
        marref.loss_and_grads(mar, params, tokens, tokens, tokens < 6, num_threads=num_threads)
        assert sorted(sequences) == expected
        assert max(logits) <= 5
        assert sum(logits) == (tokens < 6).sum()


@given(mask=strategies.masks())
def test_rows_are_the_masked_positions_and_no_position_comes_twice(mask):
    rows = block.rows_of(mask)
    assert rows.at.tolist() == np.flatnonzero(mask).tolist()
    assert rows.wanted.shape == (len(mask), mask.sum(axis=1).max())
    sequences = rows.rectangle // mask.shape[1]
    np.testing.assert_array_equal(
        sequences, np.broadcast_to(np.arange(len(mask))[:, np.newaxis], sequences.shape)
    )
    assert len(np.unique(rows.rectangle)) == rows.rectangle.size


# Forward and decoding.


@given(case=strategies.cases(max_batch=5), num_threads=THREADS)
@settings(max_examples=30)
def test_logits_are_the_definitions(case, num_threads):
    mar, params, tokens, *_ = case
    expected = mar(params, tokens)
    found = marref.fast.logits(mar, params, tokens, num_threads=num_threads)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@given(data=st.data(), num_threads=THREADS, known=st.booleans())
@settings(max_examples=60)
def test_decoding_is_the_definitions(data, num_threads, known):
    mar, params, tokens, *_, seed = data.draw(strategies.cases(max_batch=4))
    start = {"tokens": tokens} if known else {"batch_size": len(tokens)}
    chance = data.draw(
        st.sampled_from(
            [{}, {"rng": 1}, {"rng": 1, "order": "random"}, {"rng": 1, "choice_temperature": 4.5}]
        )
    )
    options = {
        **start,
        **chance,
        "num_steps": data.draw(st.integers(1, 7)),
        "temperature": data.draw(st.sampled_from([0, 0.3, 1.0, 2.0])),
        "exclude_mask_token": data.draw(st.booleans()),
        "top_k": data.draw(st.sampled_from([None, 1, 2, 3])),
        "top_p": data.draw(st.sampled_from([None, 0.4, 0.9, 1.0])),
        "return_steps": True,
    }

    def decode(function, **more):
        if "rng" in options:
            options["rng"] = np.random.default_rng(seed)
        return function(mar, params, **options, **more)

    tokens, steps = decode(decoding.iterative_decode)
    fast_tokens, fast_steps = decode(marref.iterative_decode, num_threads=num_threads)
    np.testing.assert_array_equal(fast_tokens, tokens)
    for name, array in steps.items():
        assert fast_steps[name].dtype == array.dtype
        np.testing.assert_allclose(fast_steps[name], array, rtol=1e-11)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 3.0, 1e-300])
@pytest.mark.parametrize("score_temperature", [None, 0.5, 1.0])
def test_the_arg_max_is_scored_as_the_definition_does(order, temperature, score_temperature):
    rule = decoding.Rule(
        num_steps=8,
        mask_token_id=0,
        temperature=temperature,
        schedule="cosine",
        order=order,
        choice_temperature=0.0,
        exclude_mask_token=True,
        exclude_ids=(3,),
        score_temperature=score_temperature,
    )
    logits = np.random.default_rng(0).normal(0.0, 5.0, (40, 7))
    logits[0] = 1.0  # all equal: the margin is 0, its logarithm -inf
    expected = decoding.predict(logits, rule, None)
    found = fast_decoding._predict(logits.copy(), rule, None, np.zeros(40, int))
    for theirs, ours in zip(expected, found, strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-12)


def count_rows(monkeypatch):
    """Let every call note how many positions it predicts."""
    rows = []
    original = fast_decoding.head

    def counting(work, x, use):
        rows.append(len(x))
        return original(work, x, use)

    monkeypatch.setattr(fast_decoding, "head", counting)
    return rows


def test_the_head_runs_at_the_masked_positions_only(monkeypatch):
    mar = marref.build(vocab_size=4, embed_dim=2, num_layers=1, num_heads=1, seq_len=6)
    params = strategies.random_params(mar, np.random.default_rng(0))
    rows = count_rows(monkeypatch)
    marref.iterative_decode(
        mar, params, tokens=[[0, 1, 0, 0, 1, 1]], num_steps=3, schedule="linear"
    )
    assert rows == [3, 2, 1]


def test_a_sequence_that_is_complete_is_not_computed_again(monkeypatch):
    mar = marref.build(vocab_size=4, embed_dim=2, num_layers=1, num_heads=1, seq_len=3)
    params = strategies.random_params(mar, np.random.default_rng(0))
    rows = count_rows(monkeypatch)
    marref.iterative_decode(mar, params, tokens=[[0, 0, 0], [1, 0, 1], [1, 1, 1]], num_steps=3)
    assert rows == [3 + 1, 2, 1]


@given(case=strategies.cases(), num_threads=st.integers(1, 3), drawn=st.booleans())
@settings(max_examples=20)
def test_from_nothing_the_first_step_is_computed_once_for_all_sequences(case, num_threads, drawn):
    """Beside a sequence that is known it is not, and gives the same tokens."""
    mar, params, *_, seed = case
    length = mar.seq_len

    def decode(**start):
        rng = np.random.default_rng(seed) if drawn else None
        options = {"num_steps": 2, "num_threads": num_threads}
        return marref.iterative_decode(mar, params, rng=rng, **options, **start)

    with pytest.MonkeyPatch.context() as patch:
        rows = count_rows(patch)
        tokens = decode(batch_size=3)
        first = np.cumsum(rows).tolist().index(length)
        assert sum(rows[first + 1 :]) == 3 * (length - marref.schedules.cosine(length, 2)[0])
        rows.clear()
        beside = decode(tokens=[*np.zeros((3, length), int), np.ones(length, int)])
        assert 3 * length in np.cumsum(rows)
    np.testing.assert_array_equal(tokens, beside[:3])


def test_logits_are_made_a_few_at_a_time(monkeypatch):
    mar = marref.build(vocab_size=8, embed_dim=4, num_layers=1, num_heads=1, seq_len=7)
    params = strategies.random_params(mar, np.random.default_rng(0))
    whole = marref.iterative_decode(mar, params, num_steps=3)
    rows = []
    original = fast_decoding._predict

    def counting(logits, *rest):
        rows.append(len(logits))
        return original(logits, *rest)

    monkeypatch.setattr(fast_decoding, "_predict", counting)
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 16)
    np.testing.assert_array_equal(marref.iterative_decode(mar, params, num_steps=3), whole)
    assert max(rows) <= 3


def test_the_error_of_one_member_is_seen_and_leaves_no_thread_waiting(monkeypatch):
    mar = marref.build(vocab_size=8, embed_dim=4, num_layers=3, num_heads=1, seq_len=7)
    params = strategies.random_params(mar, np.random.default_rng(0))
    original = block.finished
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return original(*arguments)

    monkeypatch.setattr(block, "finished", failing)
    with pytest.raises(ZeroDivisionError):
        marref.iterative_decode(mar, params, num_threads=2)


# Kernels.


@given(
    shape=st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 6), st.integers(1, 4)),
    tile=st.integers(1, 100),
    keep=st.booleans(),
)
def test_attention_without_the_maximum_in_tiles_is_the_definitions(shape, tile, keep):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_TILE", tile)
        assert_attends_as_the_definition(shape, keep)


def assert_attends_as_the_definition(shape, keep):
    rng = np.random.default_rng(0)
    query, key, value, dcontext = rng.normal(size=(4, *shape))
    context, cache = attention.attend(query, key, value)
    fast_context = np.empty(shape)
    attended = kernels.attend(query / np.sqrt(shape[-1]), key, value, fast_context, keep=keep)
    np.testing.assert_allclose(fast_context, context, rtol=1e-12, atol=1e-14)
    out = tuple(np.empty(shape) for _ in range(3))
    kernels.attend_backward(dcontext.copy(), attended, fast_context, out)
    expected = attention.attend_backward(dcontext, cache)
    for found, right, factor in zip(out, expected, (np.sqrt(shape[-1]), 1, 1), strict=True):
        np.testing.assert_allclose(found / factor, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shift", [-1e4, -800, -90, -49, -20, 0, 20, 49, 90, 800, 1e4])
def test_a_constant_added_to_all_scores_changes_no_attention_weight(shift, dtype):
    """Exactly: scores and shift are multiples of 1/16 that float32 holds."""
    scores = np.random.default_rng(0).integers(-12, 12, (2, 3, 4, 5)) / 16
    one = np.ones((2, 3, 5, 1), dtype)

    def weights(by):
        query = np.concatenate([scores, np.full((2, 3, 4, 1), by)], axis=-1).astype(dtype)
        key = np.concatenate([np.broadcast_to(np.eye(5, dtype=dtype), (2, 3, 5, 5)), one], axis=-1)
        exponentials, sums = kernels.weigh(query, key)
        return exponentials / sums

    np.testing.assert_allclose(weights(shift), weights(0), rtol=8 * np.finfo(dtype).eps)


@given(case=strategies.cases(), centre=st.booleans())
@settings(max_examples=20)
def test_packed_parameters_compute_what_the_parameters_do(case, centre):
    mar, params, *_ = case
    params = params["blocks"][0]
    rng = np.random.default_rng(case.seed)
    x = rng.normal(size=(6, mar.embed_dim))
    both = packed.pack(params, mar.num_heads, centre=centre)
    normal, _ = kernels.normalise(kernels.remove_mean(x.copy()), mar.layer_norm_epsilon)
    source, _ = marref.layers.layer_norm.forward(
        params["attention_norm"], x, mar.layer_norm_epsilon
    )
    query, key, value = np.split(kernels.linear(normal, both.qkv_kernel, both.qkv_bias), 3, axis=1)
    for name, found, factor in (
        ("query", query, (mar.num_heads / mar.embed_dim) ** 0.5),
        ("key", key, 1),
        ("value", value, 1),
    ):
        right, _ = marref.layers.linear.forward(params["attention"][name], source)
        np.testing.assert_allclose(found, factor * right, rtol=0, atol=1e-12)
    written = kernels.linear(normal, both.output_kernel, both.output_bias)
    right, _ = marref.layers.linear.forward(params["attention"]["output"], normal)
    right = kernels.remove_mean(right) if centre else right
    np.testing.assert_allclose(written, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", [1000.1, 0.1, 1 / 3])
@pytest.mark.parametrize("features", [2, 6, 100, 256])
def test_features_that_are_equal_become_exactly_zero(number, features):
    for dtype in (np.float32, np.float64):
        for rows in (1, 2, 7):
            assert (kernels.remove_mean(np.full((rows, features), number, dtype)) == 0).all()


GRID = np.concatenate([np.linspace(-40, 40, 200_001), np.linspace(-6, 6, 200_001)])


def test_gelu_in_float32_is_within_its_bounds():
    exact = GRID.astype(np.float32).astype(float)
    value, slope = (
        exact * ndtr(exact),
        ndtr(exact) + exact * np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi),
    )
    unit = 2.0**-23 * np.maximum(1.0, np.abs(exact))
    found = gelu.value(exact.astype(np.float32), "erf")
    both = gelu.value_and_slope(exact.astype(np.float32), "erf")
    assert (np.abs(found - value) / unit).max() < 1.6
    assert (np.abs(both[0] - value) / unit).max() < 1.6
    assert np.abs(both[1] - slope).max() < 2 * 2.0**-23
    assert found.dtype == both[1].dtype == np.float32


def test_gelu_in_float32_is_that_of_50_digits():
    for x in np.random.default_rng(0).normal(0.0, 3.0, 100).astype(np.float32):
        with mpmath.workdps(50):
            exact = float(mpmath.mpf(float(x)) * mpmath.ncdf(float(x)))
        found = float(gelu.value(np.array([x]), "erf")[0])
        assert abs(found - exact) < 1.6 * 2.0**-23 * max(1.0, abs(x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", marref.layers.gelu.KINDS)
def test_gelu_is_the_definitions(kind, dtype):
    x = GRID[:400_000:500].astype(dtype).reshape(2, -1)
    value, cache = marref.layers.gelu.forward(x.astype(float), kind)
    found = gelu.value(x.copy(), kind)
    both = gelu.value_and_slope(x.copy(), kind)
    eps, size = np.finfo(dtype).eps, np.maximum(1.0, np.abs(x.astype(float)))
    # 1 - gate has an error of eps/2 where the gate is almost 1; the slope has it times 2 x u′.
    steep = size * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * size**2) if kind == "tanh" else 0.0
    for array, right, bound in (
        (found, value, 2 * eps * size),
        (both[0], value, 2 * eps * size),
        (both[1], cache["slope"], eps * (2 + steep)),
    ):
        assert array.dtype == dtype
        assert (np.abs(array - right) <= bound).all()


def test_gelu_of_extreme_and_special_numbers():
    x = np.array([0.0, -0.0, 3.4e38, -3.4e38, 1e-45, np.nan], np.float32)
    with np.errstate(over="ignore"):
        found = gelu.value(x, "erf")
    np.testing.assert_array_equal(found, np.array([0, 0, 3.4e38, 0, 0, np.nan], np.float32))
    assert gelu.value(np.zeros((0, 3), np.float32), "erf").shape == (0, 3)


# Adam.


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("num_threads", [None, 1, 3])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_adam_in_pieces_is_the_definitions(monkeypatch, in_place, num_threads, dtype, rtol):
    monkeypatch.setattr(pieces, "_PIECE", 10)
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "vector": (25,), "matrix": (7, 4), "empty": (0, 3)}
    params, first, second = (
        {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        for _ in range(3)
    )
    params["matrix"] = np.asfortranarray(params["matrix"])
    state = optim.init(params)
    expected, expected_state = optim.step(params, first, state, 0.1, weight_decay=0.1)
    expected, expected_state = optim.step(expected, second, expected_state, 0.1, weight_decay=0.1)

    arrays = trees.flatten({"params": params, **state})
    before = {name: array.copy() for name, array in arrays.items()}
    options = {"weight_decay": 0.1, "in_place": in_place, "num_threads": num_threads}
    stepped, new_state = marref.adam_step(params, first, state, 0.1, **options)
    stepped, new_state = marref.adam_step(stepped, second, new_state, 0.1, **options)
    assert new_state["step"] == 2
    written = trees.flatten({"params": stepped, **new_state})
    for name, right in trees.flatten({"params": expected, **expected_state}).items():
        np.testing.assert_allclose(written[name], right, rtol=rtol, atol=rtol)
        assert written[name].dtype == right.dtype
        assert (written[name] is arrays[name]) == (in_place and name != "step")
        if not in_place:
            np.testing.assert_array_equal(arrays[name], before[name])


# Threads and memory.


def test_blas_has_the_number_of_threads_that_is_asked_for_and_its_own_afterwards():
    before = blas_threads()
    with parallel.threads(2) as run:
        assert run(lambda _: blas_threads(), range(2)) == [{1}, {1}]
    with parallel.threads(1, blas_threads=2) as run:
        assert run(lambda _: blas_threads(), range(1)) == [{2}]
    assert blas_threads() == before


def test_an_error_in_a_thread_reaches_the_caller_and_the_process_is_as_it_was():
    before = blas_threads(), sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), parallel.threads(2) as run:
        run(lambda x: 1 / x, [1, 0])
    assert (blas_threads(), sys.getswitchinterval()) == before


def test_threads_do_not_wait_long_for_the_interpreter_meanwhile():
    with parallel.threads(2) as run:
        assert run(lambda _: sys.getswitchinterval(), range(2)) == [pytest.approx(1e-4)] * 2


def test_threads_have_the_errstate_of_the_caller():
    with np.errstate(divide="raise"), parallel.threads(2) as run, pytest.raises(FloatingPointError):
        run(lambda x: np.ones(1) / x, [1.0, 0.0])


def test_a_run_within_a_run_does_not_wait_for_itself():
    with parallel.threads(3) as run:
        assert run(lambda _: run(abs, [-1, -2, -3]), range(3)) == [[1, 2, 3]] * 3


def test_callers_in_several_threads_do_not_wait_for_each_other():
    """A schedule that asks another thread, which calls marref too."""
    before = blas_threads(), sys.getswitchinterval()
    mar = marref.build(vocab_size=5, embed_dim=4, num_layers=1, num_heads=1, seq_len=6)
    params = strategies.random_params(mar, np.random.default_rng(0))

    def schedule(num_masked, num_steps):
        other = threading.Thread(target=marref.iterative_decode, args=(mar, params))
        other.start()
        other.join(timeout=60)
        assert not other.is_alive()
        return marref.schedules.cosine(num_masked, num_steps)

    for num_threads in (1, 2):
        marref.iterative_decode(mar, params, schedule=schedule, num_threads=num_threads)
    assert (blas_threads(), sys.getswitchinterval()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_that_computes_can_compute():
    program = """
import os, sys, threadpoolctl
from marref.fast import parallel
before = sys.getswitchinterval()
with parallel.threads(2):
    child = os.fork()
    if child == 0:
        os.alarm(60) if hasattr(os, "alarm") else None
        assert sys.getswitchinterval() == before
        parallel._inside.set(False)
        with parallel.threads(2) as run:
            assert run(abs, [-1, -2]) == [1, 2]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)


def test_a_call_from_within_a_thread_starts_no_others_and_does_not_wait():
    mar = marref.build(vocab_size=5, embed_dim=4, num_layers=2, num_heads=2, seq_len=6)
    params = strategies.random_params(mar, np.random.default_rng(0))
    expected = decoding.iterative_decode(mar, params, batch_size=3)

    def nested(num_threads):
        return marref.iterative_decode(mar, params, batch_size=3, num_threads=num_threads)

    with parallel.threads(2) as run:
        for tokens in run(nested, [2, 3, None]):
            np.testing.assert_array_equal(tokens, expected)


def test_without_threadpoolctl_it_goes_on_with_one_thread_and_says_so_once(monkeypatch):
    monkeypatch.setattr(parallel, "threadpoolctl", None)
    monkeypatch.setattr(parallel, "_said", False)
    assert parallel.choose(None, 99, 100) == 1
    with (
        pytest.warns(RuntimeWarning, match=r'pip install "marref\[fast\]"'),
        parallel.threads(2) as run,
    ):
        assert run(lambda a, b: a + b, [1, 2], [3, 4]) == [4, 6]
    assert parallel.choose(None, 10**9, 1) == 1
    for num_threads in (1, 2):
        with parallel.threads(num_threads) as run:
            assert run(str, [1]) == ["1"]


@pytest.mark.parametrize(
    ("asked", "work", "cores", "chosen"),
    [(None, 99, 4, 1), (None, 100, 4, 1), (None, 399, 4, 3), (None, 4000, 4, 4), (7, 1, 4, 7)],
)
def test_threads_are_chosen_by_work_and_cores_unless_they_are_asked_for(
    monkeypatch, asked, work, cores, chosen
):
    monkeypatch.setattr(parallel, "num_cores", lambda: cores)
    assert parallel.choose(asked, work, 100) == chosen


def test_no_more_cores_are_counted_than_the_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from marref.fast import parallel; assert parallel.num_cores() == 1"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_the_number_of_threads_may_be_an_integer_of_numpy(dtype):
    mar = marref.build(vocab_size=5, embed_dim=32, num_layers=1, num_heads=1, seq_len=9)
    params = strategies.random_params(mar, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(5, size=(7, 9))

    def run(num_threads):
        rng = np.random.default_rng(2)
        batch = (tokens, tokens, tokens < 3)
        value, _ = marref.loss_and_grads(mar, params, *batch, rng, num_threads=num_threads)
        decoded = marref.iterative_decode(mar, params, rng=rng, num_threads=num_threads)
        return value, decoded.tolist()

    assert run(dtype(2)) == run(2)


@given(length=st.integers(1, 50), num_parts=st.integers(1, 60))
def test_parts_are_contiguous_and_almost_equal(length, num_parts):
    parts = parallel.split(length, num_parts)
    assert len(parts) == min(length, num_parts)
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


FREED = """
import resource, sys
import numpy as np
import marref

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def call():
    model = marref.build(vocab_size=5, embed_dim=4, num_layers=1, num_heads=1, seq_len=3)
    marref.iterative_decode(model, model.init(np.random.default_rng(0)))

returned = faults()
"""


@pytest.mark.skipif(
    sys.platform == "win32" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs mallopt"
)
@pytest.mark.parametrize("before", ["assert marref.memory.keep_freed()", "call()"])
def test_freed_memory_is_kept_from_the_first_call_on(before):
    """A second array on the memory of a first one touches no new page."""
    program = f"{FREED}\n{before}\nfaults()\nassert faults() < returned / 5, returned\n"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_memory_is_left_alone_if_that_was_decided_before(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_decided", False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: asked.append(1) or object())
    assert not memory.keep_freed(False)
    memory.keep_by_default()
    assert not asked
    monkeypatch.setattr(memory, "_decided", False)
    memory.keep_by_default()
    assert asked


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_of_a_run_is_its_parts_to_the_bit(monkeypatch, max_norm, decay, dtype, num_threads):
    monkeypatch.setattr(pieces, "_PIECE", 16)
    rng = np.random.default_rng(0)

    def draw():
        return {"w": rng.normal(size=(7, 5)).astype(dtype), "b": [rng.normal(size=3).astype(dtype)]}

    params, average = draw(), draw()
    state = optim.init(params)
    ours = [trees.map_leaves(np.copy, tree) for tree in (params, average, state)]
    for _ in range(3):
        grads = draw()
        clipped, expected_norm = optim.clip_by_global_norm(grads, max_norm)
        for leaf in trees.flatten(params).values():
            if decay == "all" or leaf.ndim == 2:
                leaf *= 1.0 - 0.1 * 0.3
        params, state = marref.adam_step(params, clipped, state, 0.1)
        for name, mean in trees.flatten(average).items():
            mean += (1.0 - 0.9) * (trees.flatten(params)[name] - mean)
        ours[2], norm = fast_optim.run_step(
            ours[0],
            grads,
            ours[2],
            ours[1],
            0.1,
            max_norm=max_norm,
            weight_decay=0.3,
            decay=decay,
            average_decay=0.9,
            num_threads=num_threads,
        )
        assert norm == expected_norm
    for one, other in zip((params, average, state), ours, strict=True):
        expected = trees.flatten(one)
        for name, leaf in trees.flatten(other).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_a_step_of_a_run_without_an_average_leaves_the_parameters_as_adam_made_them():
    params, grads = {"w": np.ones((2, 2))}, {"w": np.full((2, 2), 0.1)}
    options = {"max_norm": 9.0, "weight_decay": 0.0, "decay": "all", "average_decay": 0.0}
    expected, _ = marref.adam_step(params, grads, optim.init(params), 0.1, in_place=False)
    fast_optim.run_step(params, grads, optim.init(params), None, 0.1, **options)
    np.testing.assert_array_equal(params["w"], expected["w"])
