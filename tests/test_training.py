import functools
import math

import numpy as np
import pytest

import marref
from marref import training, trees


@pytest.fixture(scope="module")
def small():
    model = marref.build(
        vocab_size=6, embed_dim=16, num_layers=1, num_heads=2, seq_len=8, dropout=0.0
    )
    rng = np.random.default_rng(0)
    start = rng.integers(1, 6, size=(200, 1))
    # Every sequence counts on from its first token: one known token tells all the others.
    tokens = (start + np.arange(8) - 1) % 5 + 1
    return model, model.init(rng, np.float32, std=0.25), tokens


def fit(model, params, tokens, **changes):
    options = {
        "num_steps": 500,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "mask_schedule": "uniform",
        "rng": np.random.default_rng(1),
    }
    return training.train(model, params, tokens, **{**options, **changes})


def test_training_learns_what_there_is_to_learn(small):
    model, params, tokens = small
    trained, history = fit(model, params, tokens)
    predict = functools.partial(model, trained)
    bits = training.bits_per_token(predict, tokens, 0.5, np.random.default_rng(2))
    baseline = training.position_log_frequencies(tokens, 6)
    assert bits < 0.3
    assert training.bits_per_token(
        lambda x: np.broadcast_to(baseline, (*x.shape, 6)), tokens, 0.5, np.random.default_rng(2)
    ) == pytest.approx(math.log2(5), abs=0.05)
    assert history[-1].loss < history[0].loss / 4
    completed = marref.iterative_decode(model, trained, tokens=[[0, 0, 0, 2, 0, 0, 0, 0]])
    assert completed.tolist() == [[4, 5, 1, 2, 3, 4, 5, 1]]


def test_one_seed_is_one_training_run(small):
    runs = [fit(*small, num_steps=3, warmup_steps=1) for _ in range(2)]
    first, second = (trees.flatten(params) for params, _ in runs)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    other, _ = fit(*small, num_steps=3, warmup_steps=1, rng=np.random.default_rng(2))
    assert not np.array_equal(first["head.kernel"], trees.flatten(other)["head.kernel"])


def test_the_history_says_what_happened_in_every_step(small):
    seen = []
    _, history = fit(*small, num_steps=4, warmup_steps=1, on_step=seen.append)
    assert history == seen
    assert [record.step for record in history] == [1, 2, 3, 4]
    rates = [record.learning_rate for record in history]
    assert rates == pytest.approx([0.005, 0.01, 0.0075, 0.0025])
    assert all(record.tokens_per_second > 0 and record.grad_norm > 0 for record in history)


def test_a_callback_sees_parameters_and_moments_of_every_step(small):
    seen = []

    def on_state(record, state):
        norm = np.linalg.norm(state.optimiser["first_moment"]["head"]["kernel"])
        seen.append((record.step, state.params["head"]["kernel"].copy(), norm, state.average))

    trained, _ = fit(*small, num_steps=3, warmup_steps=1, on_state=on_state)
    steps, kernels, norms, averages = zip(*seen, strict=True)
    assert steps == (1, 2, 3)
    assert averages == (None, None, None)
    np.testing.assert_array_equal(kernels[-1], trained["head"]["kernel"])
    assert not np.array_equal(kernels[0], kernels[1])
    assert min(norms) > 0


def test_bits_per_token_do_not_depend_on_the_batch_size(small):
    model, params, tokens = small
    predict = functools.partial(model, params)
    bits = [
        training.bits_per_token(predict, tokens, 0.3, np.random.default_rng(0), batch_size=size)
        for size in (7, 200)
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


def test_frequencies_are_counted_at_each_position_and_start_at_one():
    log_frequencies = training.position_log_frequencies([[1, 2], [1, 1]], 3)
    np.testing.assert_allclose(np.exp(log_frequencies), [[0.2, 0.6, 0.2], [0.2, 0.4, 0.4]])


def test_the_digits_are_all_there_and_split_without_overlap():
    train, held_out = marref.data.digits()
    assert train.shape == (1500, 64)
    assert held_out.shape == (297, 64)
    together = np.concatenate([train, held_out])
    assert (together.min(), together.max()) == (1, 17)
    # The first image of the original file, a zero, and sums that any change would move.
    assert (together.sum(), (together**2).sum()) == (676_726, 8_145_456)


def test_diverged_training_says_in_which_step(small):
    model, params, tokens = small
    broken = trees.map_leaves(lambda leaf: leaf * np.float32("nan"), params)
    with pytest.raises(FloatingPointError, match="training diverged in step 1: logits: nan"):
        fit(model, broken, tokens)


def test_gradients_that_are_no_longer_finite_are_divergence_too(small, monkeypatch):
    def overflows(model, params, *_, **__):
        return np.float32(1.0), trees.map_leaves(lambda leaf: leaf + np.float32("inf"), params)

    monkeypatch.setattr(training.loop, "loss_and_grads", overflows)
    with pytest.raises(FloatingPointError, match="diverged in step 1: grads: their norm is inf"):
        fit(*small)


def test_an_error_that_is_no_divergence_is_not_called_so(small, monkeypatch):
    def refuses(*_, **__):
        raise ValueError("targets: id 9")

    monkeypatch.setattr(training.loop, "loss_and_grads", refuses)
    with pytest.raises(ValueError, match=r"^targets: id 9$"):
        fit(*small)


def test_training_is_what_its_options_say():
    """Two steps, written out with the public functions and the same generator."""
    model = marref.build(vocab_size=6, embed_dim=8, num_layers=1, num_heads=2, dropout=0.3)
    params = model.init(np.random.default_rng(0), std=0.5)
    tokens = np.random.default_rng(1).integers(5, size=(20, 6))
    options = {
        "batch_size": 4,
        "learning_rate": 0.1,
        "warmup_steps": 1,
        "weight_decay": 0.2,
        "max_norm": 0.05,
        "mask_schedule": "cosine",
        "mask_token_id": 5,
    }
    rng = np.random.default_rng(7)
    trained, _ = training.train(model, params, tokens, num_steps=2, rng=rng, **options)

    rng = np.random.default_rng(7)
    state = marref.optim.init(params)
    for rate in (0.05, 0.1):
        targets = tokens[rng.integers(20, size=4)]
        ratios = marref.sample_mask_ratio(rng, "cosine", size=4)
        inputs, mask = marref.mask_tokens(targets, ratios, rng, 5)
        _, grads = marref.loss_and_grads(model, params, inputs, targets, mask, rng)
        grads, norm = marref.optim.clip_by_global_norm(grads, 0.05)
        assert norm > 0.05
        params, state = marref.adam_step(params, grads, state, rate, weight_decay=0.2)
    expected = trees.flatten(params)
    for name, leaf in trees.flatten(trained).items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_bits_per_token_hide_tokens_behind_the_given_mask_token():
    seen = []

    def predict(tokens):
        seen.append(tokens)
        return np.zeros((*tokens.shape, 4))

    tokens = np.ones((3, 5), int)
    bits = training.bits_per_token(predict, tokens, 1.0, np.random.default_rng(0), mask_token_id=3)
    assert bits == pytest.approx(2.0)
    assert (seen[0] == 3).all()
