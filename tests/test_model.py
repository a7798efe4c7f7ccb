import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import marref
from marref import trees
from marref.layers import attention, block, dropout, embedding, gelu, layer_norm
from marref.model import head_forward

from . import strategies


@strategies.both_ways
@given(case=strategies.cases(dropout=0.2))
def test_parameters_gradients_and_parameter_shapes_have_the_same_paths(way, case):
    model, params, tokens, targets, mask, _ = case
    _, grads = way.loss_and_grads(model, params, tokens, targets, mask)
    shapes = {name: leaf.shape for name, leaf in trees.flatten(params).items()}
    assert shapes == {name: leaf.shape for name, leaf in trees.flatten(grads).items()}
    assert list(shapes.items()) == list(model.parameter_shapes.items())


@strategies.both_ways
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@given(data=st.data())
@settings(max_examples=15)
def test_dtype_in_equals_dtype_out_everywhere(way, dtype, data):
    case = data.draw(strategies.cases(dropout=0.2, dtype=dtype))
    model, params, tokens, targets, mask, seed = case
    logits, cache = model.forward(params, tokens, np.random.default_rng(seed))
    assert logits.dtype == dtype
    for name, leaf in trees.flatten(cache).items():
        if leaf is not tokens:
            assert leaf.dtype == dtype, name
    assert marref.mar_loss(logits, targets, mask).dtype == dtype
    if dtype != np.complex128:
        loss, grads = way.loss_and_grads(model, params, tokens, targets, mask)
        assert loss.dtype == dtype
        assert {leaf.dtype for leaf in trees.flatten(grads).values()} == {np.dtype(dtype)}


@strategies.both_ways
@given(case=strategies.cases(dropout=0.2))
def test_arguments_are_never_written_to(way, case):
    model, params, tokens, targets, mask, seed = case
    arrays = [*trees.flatten(params).values(), tokens, targets, mask]
    for array in arrays:
        array.setflags(write=False)
    logits, cache = model.forward(params, tokens, np.random.default_rng(seed))
    for leaf in trees.flatten(cache).values():
        leaf.setflags(write=False)
    logits.setflags(write=False)
    _, loss_cache = marref.loss.forward(logits, targets, mask)
    dlogits = marref.loss.backward(loss_cache)
    dlogits.setflags(write=False)
    grads = model.backward(params, dlogits, cache)
    for leaf in trees.flatten(grads).values():
        leaf.setflags(write=False)
    state = marref.optim.init(params)
    for leaf in trees.flatten(state).values():
        leaf.setflags(write=False)
    way.loss_and_grads(model, params, tokens, targets, mask, np.random.default_rng(seed))
    in_place = {} if way.adam_step is marref.optim.step else {"in_place": False}
    way.adam_step(params, grads, state, 0.1, weight_decay=0.1, **in_place)
    marref.optim.clip_by_global_norm(grads, 1.0)
    way.iterative_decode(model, params, tokens=tokens, num_steps=3)


@given(case=strategies.cases(max_batch=4))
def test_permuting_the_batch_permutes_the_result(case):
    model, params, tokens, *_ = case
    order = np.random.default_rng(case.seed).permutation(len(tokens))
    logits = model(params, tokens)
    np.testing.assert_allclose(model(params, tokens[order]), logits[order], rtol=0, atol=1e-12)
    alone = np.concatenate([model(params, row[np.newaxis]) for row in tokens])
    np.testing.assert_allclose(alone, logits, rtol=0, atol=1e-12)


@given(case=strategies.cases(max_batch=4))
def test_a_sequence_has_the_same_logits_alone_and_in_any_batch_to_the_bit(case):
    assert_logits_do_not_depend_on_the_batch(case.model, case.params, case.tokens)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("embed_dim", "num_heads", "length"), [(64, 4, 64), (48, 3, 17)])
def test_a_sequence_has_the_same_logits_in_models_of_some_size(embed_dim, num_heads, length, dtype):
    """Wide enough for the blocked and the threaded kernels of a BLAS."""
    model = marref.build(18, embed_dim=embed_dim, num_layers=2, num_heads=num_heads, seq_len=length)
    rng = np.random.default_rng(0)
    params = strategies.random_params(model, rng, dtype)
    assert_logits_do_not_depend_on_the_batch(model, params, rng.integers(18, size=(7, length)))


def assert_logits_do_not_depend_on_the_batch(model, params, tokens):
    together = model(params, tokens)
    for row in range(len(tokens)):
        np.testing.assert_array_equal(model(params, tokens[row : row + 1])[0], together[row])
    order = np.arange(len(tokens))[::-1]
    np.testing.assert_array_equal(model(params, tokens[order]), together[order])
    half = (len(tokens) + 1) // 2
    np.testing.assert_array_equal(model(params, tokens[:half]), together[:half])


@given(case=strategies.cases())
def test_calling_the_model_is_forward_without_dropout(case):
    model, params, tokens, *_ = case
    logits, _ = model.forward(params, tokens)
    np.testing.assert_array_equal(model(params, tokens), logits)


def test_every_token_reaches_every_position():
    model = marref.build(vocab_size=5, embed_dim=8, num_layers=1, num_heads=2, seq_len=6)
    params = strategies.random_params(model, np.random.default_rng(0))
    tokens = np.array([[1, 2, 3, 4, 1, 2]])
    logits = model(params, tokens)
    for position in range(6):
        changed = tokens.copy()
        changed[0, position] = 0
        moved = np.abs(model(params, changed) - logits).max(axis=(0, 2))
        assert (moved > 1e-9).all(), f"token {position} reaches only {moved}"


def test_the_order_of_tokens_matters():
    model = marref.build(vocab_size=5, embed_dim=8, num_layers=1, num_heads=2, seq_len=6)
    params = strategies.random_params(model, np.random.default_rng(0))
    logits = model(params, [[1, 2, 3, 4]])
    swapped = model(params, [[2, 1, 3, 4]])
    assert np.abs(swapped[:, 2:] - logits[:, 2:]).max() > 1e-6


def test_a_sequence_may_be_shorter_than_seq_len_but_not_longer():
    model = marref.build(vocab_size=5, embed_dim=8, num_layers=1, num_heads=2, seq_len=6)
    params = model.init(np.random.default_rng(0))
    assert model(params, [[1, 2]]).shape == (1, 2, 5)
    with pytest.raises(ValueError, match=r"tokens: shape \[1, 7\].*seq_len = 6"):
        model(params, [[1] * 7])


def test_defaults_are_those_of_the_specification():
    assert dataclasses.asdict(marref.build(8192)) == {
        "vocab_size": 8192,
        "embed_dim": 256,
        "num_layers": 6,
        "num_heads": 8,
        "seq_len": 256,
        "dropout": 0.1,
        "layer_norm_epsilon": 1e-5,
        "gelu": "erf",
        "positions": "concatenated",
        "num_classes": None,
    }


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_init_draws_the_documented_distributions(std):
    model = marref.build(vocab_size=100, embed_dim=64, num_layers=8, num_heads=4, seq_len=4)
    params = model.init(np.random.default_rng(0), std=std)
    for name, leaf in trees.flatten(params).items():
        if name.endswith("bias"):
            assert (leaf == 0).all()
        elif name.endswith("scale"):
            assert (leaf == 1).all()
        else:
            residual = name.endswith(("output.kernel", "down.kernel"))
            expected = std / 4 if residual else std
            assert stats.kstest(leaf.ravel() / expected, "norm").pvalue > 1e-4, name


def test_one_seed_is_one_model_in_every_dtype():
    model = marref.build(vocab_size=5, embed_dim=8, num_layers=1, num_heads=2)
    wide = trees.flatten(model.init(np.random.default_rng(3)))
    narrow = trees.flatten(model.init(np.random.default_rng(3), np.float32))
    for name, leaf in wide.items():
        np.testing.assert_array_equal(leaf.astype(np.float32), narrow[name])


def test_dropout_keeps_the_mean_and_drops_the_same_features_in_both_precisions():
    x = np.ones(100_000)
    keep = dropout.draw(np.random.default_rng(0), x.shape, 0.25)
    y, _ = dropout.forward(x, keep, 0.25)
    assert set(np.unique(y)) == {0.0, 1 / 0.75}
    # Standard deviation of the dropped fraction: sqrt(0.25 · 0.75 / 100000) = 0.0014.
    assert abs((y == 0).mean() - 0.25) < 5 * 0.0014
    narrow, _ = dropout.forward(x.astype(np.float32), keep, 0.25)
    np.testing.assert_array_equal(narrow == 0, y == 0)
    for rng, rate in ((None, 0.25), (np.random.default_rng(0), 0.0)):
        nothing_dropped = dropout.draw(rng, x.shape, rate)
        assert nothing_dropped is None
        assert dropout.forward(x, nothing_dropped, rate)[0] is x


@given(case=strategies.cases(dropout=0.4, max_batch=4))
def test_the_masks_of_draw_keep_are_those_of_forward_and_a_slice_drops_the_same(case):
    model, params, tokens, _, _, seed = case
    logits, cache = model.forward(params, tokens, np.random.default_rng(seed))
    keep = model.draw_keep(np.random.default_rng(seed), tokens.shape)
    leaves = trees.flatten(cache)
    for name, kept in trees.flatten(keep).items():
        assert kept.shape == (*tokens.shape, model.embed_dim)
        mask = leaves[name + "_dropout"]
        np.testing.assert_array_equal(mask, kept / (1 - model.dropout), name)
    for row in range(len(tokens)):
        part = slice(row, row + 1)
        sliced = trees.map_leaves(lambda kept, part=part: kept[part], keep)
        np.testing.assert_array_equal(
            logits_with_keep(model, params, tokens[part], sliced), logits[part]
        )


def logits_with_keep(model, params, tokens, keep):
    """The forward pass of a model, its layers one after the other, with masks drawn before."""
    x, _ = embedding.forward(params["embedding"], tokens, model.positions)
    x, _ = dropout.forward(x, keep["embedding"], model.dropout)
    for block_params, block_keep in zip(params["blocks"], keep["blocks"], strict=True):
        x, _ = block.forward(
            block_params,
            x,
            num_heads=model.num_heads,
            gelu=model.gelu,
            epsilon=model.layer_norm_epsilon,
            keep=block_keep,
            dropout_rate=model.dropout,
        )
    return head_forward(params, x, model.layer_norm_epsilon)[0]


def test_one_seed_drops_the_same_features_in_both_precisions():
    model = marref.build(vocab_size=5, embed_dim=8, num_layers=2, num_heads=2, dropout=0.5)
    masks = []
    for dtype in (np.float32, np.float64):
        params = model.init(np.random.default_rng(0), dtype)
        _, cache = model.forward(params, [[1, 2, 3], [4, 0, 1]], np.random.default_rng(5))
        masks.append({k: v != 0 for k, v in trees.flatten(cache).items() if "dropout" in k})
    narrow, wide = masks
    assert len(narrow) == 5
    for name, kept in narrow.items():
        assert 0 < kept.mean() < 1
        np.testing.assert_array_equal(kept, wide[name], name)


def test_dropout_of_the_model_acts_on_the_embedding_and_on_both_branches():
    model = marref.build(vocab_size=5, embed_dim=8, num_layers=2, num_heads=2, dropout=0.5)
    params = strategies.random_params(model, np.random.default_rng(0))
    _, cache = model.forward(params, [[1, 2, 3]], np.random.default_rng(0))
    masks = [name for name in trees.flatten(cache) if "dropout" in name]
    assert masks == [
        "embedding_dropout",
        "blocks.0.attention_dropout",
        "blocks.0.feed_forward_dropout",
        "blocks.1.attention_dropout",
        "blocks.1.feed_forward_dropout",
    ]


def test_layer_norm_keeps_its_digits_far_from_zero():
    # In float32, mean(x²) - mean(x)² would be off by 10% here.
    rng = np.random.default_rng(0)
    x = rng.normal(1000.0, 1.0, (4, 256))
    params = layer_norm.init(256)
    exact, _ = layer_norm.forward(params, x.astype(np.float32).astype(float), 1e-5)
    narrow, _ = layer_norm.forward(layer_norm.init(256, np.float32), x.astype(np.float32), 1e-5)
    # One rounding of x - mean, at 1000, is 2⁻²⁴·1000 = 6e-5.
    assert np.abs(narrow - exact).max() < 2e-4


CONSTANTS = (1000.1, -1000.1, 0.1, 1e-3, 1 / 3, 1e6 / 7, 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("features", [2, 6, 96, 100, 256, 768])
def test_a_constant_row_normalises_to_exactly_its_bias_wherever_it_stands(features, dtype):
    """Alone, and among others in batches of any shape: all bits are equal."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=features).astype(dtype) for name in ("scale", "bias")}
    for constant in CONSTANTS:
        for shape in ((1,), (2,), (7,), (1, 3), (2, 7)):
            for place in (*np.ndindex(shape), ...):
                x = rng.normal(size=(*shape, features)).astype(dtype)
                x[place] = constant
                y, cache = layer_norm.forward({**params, "bias": 0 * params["bias"]}, x, 1e-5)
                assert (cache["normalised"][place] == 0).all(), (constant, shape, place)
                assert (y[place] == 0).all()
                y, _ = layer_norm.forward(params, x, 1e-5)
                np.testing.assert_array_equal(
                    y[place], np.broadcast_to(params["bias"], y[place].shape)
                )
                assert (cache["inverse_std"][place] == dtype(1) / np.sqrt(dtype(1e-5))).all()


@pytest.mark.parametrize("kind", gelu.KINDS)
def test_gelu_keeps_its_digits_for_negative_inputs(kind):
    # Through Φ itself, where 0.5 (1 + erf(x/√2)) has lost 4% at -5 in float32.
    x = np.linspace(-9, 9, 200, dtype=np.float32)
    exact, _ = gelu.forward(x.astype(float), kind)
    narrow, _ = gelu.forward(x, kind)
    # σ(2u) = exp(2u)/(1 + …) turns the rounding of 2u, at most 3·2⁻²⁴·|2u|, into a relative error;
    # |2u| <= 66 at |x| = 9.
    np.testing.assert_allclose(narrow, exact, rtol=3 * 66 * 2.0**-24)


def test_sinusoidal_tables_have_the_documented_entries():
    concatenated = marref.sinusoidal_table(5, 8)
    interleaved = marref.sinusoidal_table(5, 8, "interleaved")
    p, i = 3, 2
    assert concatenated[p, i] == pytest.approx(np.sin(p * 10000 ** (-i / 3)), rel=1e-14)
    assert concatenated[p, 4 + i] == pytest.approx(np.cos(p * 10000 ** (-i / 3)), rel=1e-14)
    assert interleaved[p, 2 * i] == pytest.approx(np.sin(p * 10000 ** (-2 * i / 8)), rel=1e-14)
    assert interleaved[p, 2 * i + 1] == pytest.approx(np.cos(p * 10000 ** (-2 * i / 8)), rel=1e-14)
    np.testing.assert_allclose(marref.sinusoidal_table(2, 2)[1], [np.sin(1), np.cos(1)])


def test_the_sinusoidal_table_is_shared_and_cannot_be_written_to():
    table = marref.sinusoidal_table(5, 8)
    assert marref.sinusoidal_table(5, 8) is table
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_beyond_the_range_of_exp_are_no_matter(dtype):
    model = marref.build(vocab_size=5, embed_dim=4, num_layers=1, num_heads=1, seq_len=3)
    params = strategies.random_params(model, np.random.default_rng(0), dtype)
    params["blocks"][0]["attention"]["query"]["kernel"] *= 3000
    _, cache = model.forward(params, [[1, 2, 3]])
    weights = cache["blocks"][0]["attention"]["weights"]
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("shift", [-1e4, -800, -90, -49, 0, 49, 90, 800, 1e4])
def test_a_constant_added_to_all_scores_changes_no_attention_weight(shift, dtype):
    """Exactly: scores and shift are multiples of 1/16 that float32 holds."""
    scores = np.random.default_rng(0).integers(-12, 12, (2, 3, 4, 5)) / 16
    weights, moved = (attention.softmax((scores + by).astype(dtype)) for by in (0, shift))
    np.testing.assert_allclose(moved, weights, rtol=8 * np.finfo(dtype).eps)


@given(case=strategies.cases())
@settings(max_examples=20)
def test_epsilon_reaches_every_norm(case):
    """Against the definition, at the variance that the norm itself reports."""
    model, params, tokens, *_ = case
    _, cache = model.forward(params, tokens)
    norms = [cache["final_norm"]]
    for block_cache in cache["blocks"]:
        norms += [block_cache["attention_norm"], block_cache["feed_forward_norm"]]
    for norm in norms:
        # mean(x̂²) = σ²/(σ² + ε), so 1 - mean(x̂²) = ε/(σ² + ε) = ε · inverse_std².
        lost = 1.0 - (norm["normalised"] ** 2).mean(axis=-1, keepdims=True)
        expected = model.layer_norm_epsilon * norm["inverse_std"] ** 2
        np.testing.assert_allclose(lost, expected, rtol=1e-6, atol=1e-14)
