"""Classes: the vector that they add, its gradient, guidance; and that they change nothing else."""

import functools
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import marref
from marref import chance, decoding, masking, trees
from marref.fast import block
from marref.layers import class_embedding
from marref.verify.gradients import check_gradients, check_layer

from . import oracle, strategies
from .strategies import both_ways

BOUNDS = {"complex-step": 1e-12, "central": 1e-6}
METHODS = pytest.mark.parametrize("method", BOUNDS)
SIZES = {"vocab_size": 6, "embed_dim": 8, "num_layers": 2, "num_heads": 2, "seq_len": 5}
MODEL = marref.build(**SIZES, dropout=0.0, num_classes=3)
PARAMS = strategies.random_params(MODEL, np.random.default_rng(1), std=0.5)
LABELS = np.array([2, 0, 3, 2])


def batch_of(model=MODEL, batch=4):
    rng = np.random.default_rng(2)
    tokens, targets = rng.integers(model.vocab_size, size=(2, batch, model.seq_len))
    mask = rng.random(tokens.shape) < 0.6
    mask[:, 0] = True
    return tokens, targets, mask


def assert_close(actual, expected, tolerance=1e-13):
    expected = np.array(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


# The layer.


def test_the_vector_of_its_class_is_added_at_every_position_and_no_class_is_the_last_row():
    params = {"table": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    y, cache = class_embedding.forward(params, np.zeros((2, 3, 2)), np.array([0, 2]))
    np.testing.assert_array_equal(y, [[[1, 2]] * 3, [[5, 6]] * 3])
    np.testing.assert_array_equal(cache["output"], [[1, 2], [5, 6]])
    dx, grads = class_embedding.backward(params, np.ones((2, 3, 2)), cache)
    np.testing.assert_array_equal(dx, np.ones((2, 3, 2)))
    np.testing.assert_array_equal(grads["table"], [[3, 3], [0, 0], [3, 3]])


@METHODS
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 3),
    num=st.integers(1, 4),
    num_classes=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=15)
def test_gradients_of_the_layer(method, batch, length, num, num_classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=batch, endpoint=True)
    point = {"x": rng.normal(size=(batch, length, num))}
    point |= class_embedding.init(rng, num_classes, num, 1.0)

    def backward(point, dy, cache):
        dx, grads = class_embedding.backward(point, dy, cache)
        return {"x": dx, **grads}

    errors = check_layer(
        lambda moved: class_embedding.forward(moved, moved["x"], labels),
        backward,
        point,
        rng,
        method=method,
    )
    assert all(error <= BOUNDS[method] for error in errors.values()), errors


# The model.


@METHODS
@both_ways
@given(drawn=strategies.labelled_cases(dropout=0.2))
@settings(max_examples=10)
def test_gradients_of_the_whole_model(method, way, drawn):
    (model, params, tokens, targets, mask, seed), labels = drawn

    def rng():
        return np.random.default_rng(seed)

    value, grads = way.loss_and_grads(model, params, tokens, targets, mask, rng(), labels=labels)

    def function(moved):
        return marref.mar_loss(model.forward(moved, tokens, rng(), labels)[0], targets, mask)

    assert abs(value - function(params)) <= 1e-13 * max(abs(value), 1)
    errors = check_gradients(function, params, grads, method=method, max_entries=3, rng=rng())
    assert all(error <= BOUNDS[method] for error in errors.values()), errors


def test_logits_and_loss_are_those_of_the_oracle():
    tokens, targets, mask = batch_of()
    options = {"num_heads": 2, "gelu": "erf", "positions": "concatenated", "epsilon": 1e-5}
    expected = oracle.forward(oracle.exact(PARAMS), tokens, LABELS.tolist(), **options)
    assert_close(MODEL(PARAMS, tokens, LABELS), expected)
    loss = oracle.masked_loss(expected, targets, mask)
    for way in (strategies.DEFINITION, strategies.FAST):
        value, _ = way.loss_and_grads(MODEL, PARAMS, tokens, targets, mask, labels=LABELS)
        assert_close(value, loss)
    no_class = oracle.forward(oracle.exact(PARAMS), tokens, [3] * 4, **options)
    assert_close(MODEL(PARAMS, tokens), no_class)


@both_ways
def test_loss_gradients_and_optimiser_steps_are_those_of_pytorch(way):
    torch = pytest.importorskip("torch")
    from .test_torch import hold_key_biases
    from .torch_mar import TorchMAR

    model = marref.build(**SIZES, dropout=0.0, num_classes=3)
    config = {name: value for name, value in model.as_dict().items() if name != "dropout"}
    witness = TorchMAR(**config)
    witness.load(trees.flatten(PARAMS))
    optimiser = torch.optim.AdamW(witness.parameters(), 0.01, weight_decay=0.1)
    batch, params, state = batch_of(), PARAMS, marref.optim.init(PARAMS)
    for _ in range(3):
        optimiser.zero_grad()
        torch_loss, torch_logits = witness.loss_and_logits(*batch, LABELS)
        torch_loss.backward()
        witness.hold_key_biases()
        loss, grads = way.loss_and_grads(model, params, *batch, labels=LABELS)
        assert_close(model(params, batch[0], LABELS), torch_logits.detach().numpy(), 1e-12)
        assert loss == pytest.approx(torch_loss.item(), rel=1e-12)
        grads = hold_key_biases(grads)
        largest = max(np.abs(leaf).max() for leaf in trees.flatten(grads).values())
        for name, leaf in witness.gradients().items():
            np.testing.assert_allclose(
                trees.flatten(grads)[name], leaf, rtol=0, atol=1e-12 * largest
            )
        optimiser.step()
        params, state = way.adam_step(params, grads, state, 0.01, weight_decay=0.1)
        for name, leaf in witness.read().items():
            assert_close(trees.flatten(params)[name], leaf, 1e-12)


def test_without_labels_all_sequences_have_no_class():
    tokens, targets, mask = batch_of()
    no_class = np.full(4, 3)
    np.testing.assert_array_equal(MODEL(PARAMS, tokens), MODEL(PARAMS, tokens, no_class))
    for way in (strategies.DEFINITION, strategies.FAST):
        _, grads = way.loss_and_grads(MODEL, PARAMS, tokens, targets, mask)
        table = grads["class_embedding"]["table"]
        assert table[3].any()
        assert not table[:3].any()


def test_classes_leave_the_other_parameters_and_a_model_without_them_alone():
    plain = marref.build(**SIZES)
    ours, others = (trees.flatten(model.init(np.random.default_rng(0))) for model in (MODEL, plain))
    assert ours.keys() - others.keys() == {"class_embedding.table"}
    for name, leaf in others.items():
        np.testing.assert_array_equal(ours[name], leaf)
    assert "num_classes" not in plain.as_dict()
    assert marref.build(**MODEL.as_dict()) == MODEL
    tokens, _, _ = batch_of()
    zero = {**PARAMS, "class_embedding": {"table": np.zeros((4, 8))}}
    without = {name: child for name, child in PARAMS.items() if name != "class_embedding"}
    np.testing.assert_array_equal(MODEL(zero, tokens, LABELS), plain(without, tokens))


def test_a_model_with_classes_is_saved_and_loaded(tmp_path):
    marref.save_model(tmp_path / "m.npz", MODEL, PARAMS)
    model, params = marref.load_model(tmp_path / "m.npz")
    assert model == MODEL
    tokens, _, _ = batch_of()
    np.testing.assert_array_equal(model(params, tokens, LABELS), MODEL(PARAMS, tokens, LABELS))


# The fast way.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@given(data=st.data(), num_threads=st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=20)
def test_fast_loss_gradients_and_logits_are_the_definitions(dropout, data, num_threads):
    (model, params, *batch, seed), labels = data.draw(
        strategies.labelled_cases(dropout, max_batch=5)
    )

    def run(function, **options):
        rng = np.random.default_rng(seed)
        value, grads = function(model, params, *batch, rng, labels=labels, **options)
        return value, trees.flatten(grads)

    value, grads = run(marref.model.loss_and_grads)
    fast_value, fast_grads = run(marref.loss_and_grads, num_threads=num_threads)
    assert fast_value == pytest.approx(value, rel=1e-13)
    _, cache = model.forward(params, batch[0], np.random.default_rng(seed), labels)
    largest = max(np.abs(leaf).max() for leaf in grads.values())
    assert fast_grads.keys() == grads.keys()
    for name, leaf in grads.items():
        atol = 1e-13 * largest * strategies.steepness(cache)
        np.testing.assert_allclose(fast_grads[name], leaf, rtol=0, atol=atol)
    logits = marref.fast.logits(model, params, batch[0], labels, num_threads=num_threads)
    assert_close(logits, model(params, batch[0], labels))


@given(data=st.data(), num_threads=st.sampled_from([None, 1, 2, 3]), known=st.booleans())
@settings(max_examples=40)
def test_fast_decoding_is_the_definitions(data, num_threads, known):
    (model, params, tokens, *_, seed), labels = data.draw(strategies.labelled_cases(max_batch=4))
    start = {"tokens": tokens} if known else {"batch_size": len(tokens)}
    options = {
        **start,
        "labels": labels,
        "num_steps": data.draw(st.integers(1, 4)),
        "temperature": data.draw(st.sampled_from([1.0, 2.0])),
        "return_steps": True,
    }
    if labels is not None:
        options["guidance_scale"] = data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
        options["guidance"] = data.draw(st.sampled_from(decoding.GUIDANCES))
    drawn = data.draw(st.booleans())

    def decode(function, **more):
        rng = np.random.default_rng(seed) if drawn else None
        return function(model, params, rng=rng, **options, **more)

    tokens, steps = decode(decoding.iterative_decode)
    fast_tokens, fast_steps = decode(marref.iterative_decode, num_threads=num_threads)
    np.testing.assert_array_equal(fast_tokens, tokens)
    for name, array in steps.items():
        assert fast_steps[name].dtype == array.dtype
        np.testing.assert_allclose(fast_steps[name], array, rtol=1e-11)


@pytest.mark.parametrize("failing_call", range(1, 5))
def test_the_error_of_one_member_leaves_no_thread_waiting_for_the_pass_without_class(
    monkeypatch, failing_call
):
    """A member that fails late in the first pass, when the other one waits in the second."""
    original = block.finished
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == failing_call:
            time.sleep(0.05)
            raise ZeroDivisionError
        return original(*arguments)

    monkeypatch.setattr(block, "finished", failing)
    with pytest.raises(ZeroDivisionError):
        marref.iterative_decode(MODEL, PARAMS, labels=[1], guidance_scale=2.0, num_threads=2)


@both_ways
def test_float32_stays_float32(way):
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), PARAMS)
    tokens, targets, mask = batch_of()
    value, grads = way.loss_and_grads(MODEL, params, tokens, targets, mask, labels=LABELS)
    assert value.dtype == np.float32
    assert {leaf.dtype for leaf in trees.flatten(grads).values()} == {np.dtype(np.float32)}
    _, steps = way.iterative_decode(
        MODEL, params, labels=LABELS, guidance_scale=2.0, guidance="linear", return_steps=True
    )
    assert steps["confidence"].dtype == np.float32


# Guidance.


@functools.cache
def oracle_logits(sequence, label):
    options = {"num_heads": 2, "gelu": "erf", "positions": "concatenated", "epsilon": 1e-5}
    return oracle.forward(oracle.exact(PARAMS), [sequence], [label], **options)[0]


@both_ways
@pytest.mark.parametrize(
    ("guidance", "scale", "schedule"),
    [
        ("constant", 1.0, "cosine"),
        ("constant", 3.0, "linear"),
        ("linear", 3.0, "cosine"),
        ("linear", 0.5, "linear"),
    ],
)
def test_guided_decoding_is_that_of_the_oracle(way, guidance, scale, schedule):
    start = np.zeros((4, 5), int)
    start[1, ::2], start[2, 3] = 4, 2
    settings_ = {"num_steps": 3, "temperature": 1.0, "schedule": schedule}
    tokens, steps = way.iterative_decode(
        MODEL,
        PARAMS,
        tokens=start,
        labels=LABELS,
        guidance_scale=scale,
        guidance=guidance,
        return_steps=True,
        **settings_,
    )
    for row, label in enumerate(LABELS.tolist()):
        num_masked = int((start[row] == 0).sum())
        scales = oracle.guidance_scales(num_masked, 5, 3, schedule, scale)
        if guidance == "constant":
            scales = [scale] * len(scales)
        in_order = iter(scales)

        def logits_of(sequence, label=label, in_order=in_order):
            s = next(in_order)
            of_class, of_none = (oracle_logits(tuple(sequence), one) for one in (label, 3))
            pairs = zip(of_class, of_none, strict=True)
            return [oracle.guided(c, u, s) for c, u in pairs]

        trace = oracle.decode(logits_of, start[row].tolist(), **settings_)
        for step, (expected, _, confidence) in enumerate(trace):
            assert steps["tokens"][step, row].tolist() == expected
            confidence = np.array(confidence, dtype=np.float64)
            np.testing.assert_allclose(steps["confidence"][step, row], confidence, 1e-12)
        assert tokens[row].tolist() == trace[-1][0]


@both_ways
def test_scale_0_is_no_class_and_a_class_that_is_no_class_needs_no_guidance(way):
    def decode(**options):
        rng = np.random.default_rng(0)
        return way.iterative_decode(MODEL, PARAMS, rng=rng, **options)

    plain = decode(batch_size=4)
    np.testing.assert_array_equal(decode(labels=LABELS, guidance_scale=0.0), plain)
    np.testing.assert_array_equal(decode(labels=[3] * 4, guidance_scale=5.0), plain)
    assert (decode(labels=LABELS, guidance_scale=5.0) != plain).any()


@both_ways
def test_labels_say_how_many_sequences_are_generated(way):
    assert way.iterative_decode(MODEL, PARAMS, labels=LABELS).shape == (4, 5)


def test_the_scale_grows_linearly_with_what_is_known_after_a_step():
    from .test_decoding import rule

    scales = decoding.scale_at(
        np.array([0.0, 0.25, 1.0]), rule(guidance_scale=5.0, guidance="linear")
    )
    np.testing.assert_array_equal(scales, [1.0, 2.0, 5.0])
    scales = decoding.scale_at(np.array([0.0, 1.0]), rule(guidance_scale=5.0))
    np.testing.assert_array_equal(scales, [5.0, 5.0])


def test_a_guided_distribution_is_the_product_that_bayes_says():
    """p(token) (p(token | class) / p(token))^s, to 1."""
    rng = np.random.default_rng(0)
    of_class, of_none = rng.dirichlet(np.ones(5), 2)
    for scale in (0.0, 0.5, 1.0, 3.0):
        logits = decoding.guide(np.log([of_class]), np.log([of_none]), np.array([scale]))
        expected = of_none * (of_class / of_none) ** scale
        found = np.exp(marref.loss.log_softmax(logits))[0]
        np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-13)


# Labels that are dropped in training.


def test_labels_are_dropped_as_often_as_asked_and_one_by_one():
    labels = np.tile(np.arange(3), 4000)
    dropped = masking.drop_labels(labels, 0.1, np.random.default_rng(0), 3)
    assert dropped.dtype == np.int64
    kept = dropped != 3
    np.testing.assert_array_equal(dropped[kept], labels[kept])
    assert abs((~kept).mean() - 0.1) < 4 * np.sqrt(0.09 / len(labels))
    np.testing.assert_array_equal(
        masking.drop_labels(labels, 0.0, np.random.default_rng(0), 3), labels
    )


def test_a_new_purpose_leaves_the_streams_of_the_others_alone():
    first = ("parameters", "split", "batch", "mask", "dropout", "validation", "sample")
    assert chance.PURPOSES[: len(first)] == first
    streams = {int(chance.generator(0, purpose).integers(2**62)) for purpose in chance.PURPOSES}
    assert len(streams) == len(chance.PURPOSES)


def test_every_pair_of_classes_is_told_apart():
    tokens = np.ones((4, 5), int)
    logits = MODEL(PARAMS, tokens, np.arange(4))
    for one, other in itertools.combinations(range(4), 2):
        assert np.abs(logits[one] - logits[other]).max() > 1e-3
