import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import marref
from marref import decoding, schedules, trees
from marref.loss import log_softmax

from . import strategies
from .strategies import both_ways


@st.composite
def decodings(draw):
    """A case and options for the decoder; the case's tokens are partly known."""
    case = draw(strategies.cases())
    order = draw(st.sampled_from(("confidence", "random")))
    sampled = order == "random" or draw(st.booleans())
    noisy = sampled and order == "confidence" and draw(st.booleans())
    options = {
        "num_steps": draw(st.integers(1, 9)),
        "temperature": draw(st.sampled_from([0.01, 1.0, 7.0])),
        "schedule": draw(st.sampled_from(["cosine", "linear"])),
        "order": order,
        "choice_temperature": 4.5 if noisy else 0.0,
    }
    seed = draw(st.integers(0, 2**32 - 1))
    return case, options, (lambda: np.random.default_rng(seed)) if sampled else (lambda: None)


def rule(**changes):
    options = {
        "num_steps": 4,
        "mask_token_id": 0,
        "temperature": 1.0,
        "schedule": "linear",
        "order": "confidence",
        "choice_temperature": 0.0,
        "exclude_mask_token": True,
    }
    return decoding.Rule(**{**options, **changes})


def with_logits(logits, seq_len=4):
    """A model whose logits are the given ones at every position, whatever the tokens."""
    model = marref.build(len(logits), embed_dim=2, num_layers=1, num_heads=1, seq_len=seq_len)
    params = trees.map_leaves(np.zeros_like, model.init(np.random.default_rng(0)))
    params["head"]["bias"] = np.array(logits)
    return model, params


@both_ways
@given(decoding=decodings())
@settings(max_examples=150)
def test_what_holds_for_every_decoding(way, decoding):
    (model, params, start, *_), options, make_rng = decoding
    tokens, steps = way.iterative_decode(
        model, params, tokens=start, rng=make_rng(), return_steps=True, **options
    )
    known = start != 0
    assert tokens.shape == start.shape
    assert tokens.dtype == np.int64
    assert ((tokens > 0) & (tokens < model.vocab_size)).all(), "[MASK] is never emitted"
    np.testing.assert_array_equal(tokens[known], start[known], "known tokens are kept")

    masks = np.concatenate([~known[np.newaxis], steps["mask"]])
    assert (masks[1:] <= masks[:-1]).all(), "what is revealed stays revealed"
    assert not masks[-1].any(), "all is revealed by the last step"
    schedule = schedules.SCHEDULES[options["schedule"]]
    for row in range(len(start)):
        counts = schedule(int((~known[row]).sum()), options["num_steps"])
        revealed = -np.diff(masks[:, row].sum(axis=1))
        np.testing.assert_array_equal(revealed[: len(counts)], counts)
        assert (revealed[len(counts) :] == 0).all()
    assert len(steps["mask"]) == max(min(options["num_steps"], int(row.sum())) for row in ~known)

    assert (steps["tokens"][steps["mask"]] == 0).all()
    for before, after, mask in zip(
        steps["tokens"][:-1], steps["tokens"][1:], steps["mask"][:-1], strict=True
    ):
        np.testing.assert_array_equal(before[~mask], after[~mask], "revealed tokens stay")
    confidence = steps["confidence"]
    assert ((confidence > 0) & (confidence <= 1 + 1e-12)).all()
    assert (confidence[:, known] == 1).all()

    again = way.iterative_decode(model, params, tokens=start, rng=make_rng(), **options)
    np.testing.assert_array_equal(again, tokens, "one seed is one result")


@both_ways
@given(case=strategies.cases(), temperature=st.sampled_from([0.3, 1.0, 3.0]))
def test_each_step_reveals_the_most_confident_arg_max(way, case, temperature):
    model, params, start, *_ = case
    _, steps = way.iterative_decode(
        model, params, tokens=start, temperature=temperature, num_steps=3, return_steps=True
    )
    tokens, mask = start, start == 0
    for after, mask_after, confidence_after in zip(
        steps["tokens"], steps["mask"], steps["confidence"], strict=True
    ):
        logits = model(params, tokens)
        logits[..., 0] = -np.inf
        probabilities = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        confidence = probabilities.max(axis=-1)
        revealed = mask & ~mask_after
        np.testing.assert_array_equal(after[revealed], logits.argmax(axis=-1)[revealed])
        np.testing.assert_allclose(confidence_after[mask], confidence[mask], rtol=1e-10)
        for row in range(len(tokens)):
            if mask_after[row].any() and revealed[row].any():
                least = confidence[row, revealed[row]].min()
                assert least >= confidence[row, mask_after[row]].max() * (1 - 1e-10)
        tokens, mask = after, mask_after


@both_ways
@given(case=strategies.cases())
@settings(max_examples=30)
def test_a_sequence_does_not_depend_on_the_batch_that_it_sits_in(way, case):
    model, params, start, *_ = case
    together = way.iterative_decode(model, params, tokens=start, num_steps=3)
    alone = [
        way.iterative_decode(model, params, tokens=row[np.newaxis], num_steps=3) for row in start
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@both_ways
def test_the_specification_s_call_returns_one_sequence(way):
    model = marref.build(vocab_size=9, embed_dim=8, num_layers=1, num_heads=2, seq_len=12)
    params = model.init(np.random.default_rng(0))
    tokens = way.iterative_decode(
        model, params, seq_len=12, vocab_size=9, num_steps=8, mask_token_id=0, temperature=1.0
    )
    assert tokens.shape == (1, 12)
    np.testing.assert_array_equal(way.iterative_decode(model, params), tokens)
    assert way.iterative_decode(model, params, seq_len=5, batch_size=3).shape == (3, 5)


@both_ways
def test_equal_confidences_go_to_the_lower_position_and_equal_logits_to_the_lower_id(way):
    model, params = with_logits([0.0, 1.0, 1.0], seq_len=4)
    tokens, steps = way.iterative_decode(
        model, params, num_steps=4, schedule="linear", return_steps=True
    )
    assert tokens.tolist() == [[1, 1, 1, 1]]
    assert steps["mask"][:, 0].tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
        [False, False, False, False],
    ]


@both_ways
def test_the_mask_token_is_left_out_of_the_softmax_too(way):
    model, params = with_logits([5.0, 1.0, 0.0])
    tokens, steps = way.iterative_decode(model, params, num_steps=1, return_steps=True)
    assert (tokens == 1).all()
    assert steps["confidence"] == pytest.approx(1 / (1 + np.exp(-1)))


@both_ways
def test_with_exclude_mask_token_off_the_mask_token_may_be_emitted(way):
    model, params = with_logits([5.0, 1.0, 0.0])
    tokens, steps = way.iterative_decode(
        model, params, num_steps=2, exclude_mask_token=False, return_steps=True
    )
    assert (tokens == 0).all()
    assert not steps["mask"][-1].any()
    assert steps["confidence"] == pytest.approx(1 / (1 + np.exp(-4) + np.exp(-5)))


@both_ways
def test_another_id_may_be_the_mask_token(way):
    model, params = with_logits([0.0, 1.0, 9.0])
    tokens = way.iterative_decode(model, params, mask_token_id=2, tokens=[[2, 0, 2, 2]])
    assert tokens.tolist() == [[1, 0, 1, 1]]


@both_ways
def test_temperature_scales_confidence_but_not_the_arg_max(way):
    model, params = with_logits([0.0, 2.0, 1.0])
    for temperature in (0.5, 1.0, 4.0):
        tokens, steps = way.iterative_decode(
            model, params, num_steps=1, temperature=temperature, return_steps=True
        )
        assert (tokens == 1).all()
        assert steps["confidence"] == pytest.approx(1 / (1 + np.exp(-1 / temperature)))


@both_ways
def test_extreme_temperatures_give_no_nan(way):
    model, params = with_logits([0.0, 2.0, 1.0])
    narrow = trees.map_leaves(lambda leaf: leaf.astype(np.float32), params)
    for temperature in (1e-46, 1e39):
        rng = np.random.default_rng(0)
        options = {"temperature": temperature, "rng": rng, "return_steps": True}
        _, steps = way.iterative_decode(model, narrow, **options)
        assert np.isfinite(steps["confidence"]).all()
    for temperature in (1e-300, 1e300):
        _, steps = way.iterative_decode(model, params, temperature=temperature, return_steps=True)
        assert np.isfinite(steps["confidence"]).all()


def test_confidence_keeps_sure_tokens_apart_in_float32():
    # 1 - 1e-10 and 1 - 1e-12 are both 1 in float32; their logarithms are not equal.
    logits = np.array([[50.0, 0.0, -23.0], [50.0, 0.0, -27.6]], np.float32)
    assert np.float32(1 - 1e-10) == np.float32(1 - 1e-12) == 1
    _, log_confidence, _ = decoding.predict(logits, rule(mask_token_id=0), None)
    np.testing.assert_allclose(log_confidence, -np.exp([-23.0, -27.6]), rtol=1e-5)


@both_ways
def test_drawn_tokens_follow_the_softmax_at_the_temperature(way):
    logits, temperature, count = [3.0, 0.0, 1.0, 2.0], 1.5, 40_000
    model, params = with_logits(logits, seq_len=4)
    tokens, steps = way.iterative_decode(
        model,
        params,
        batch_size=count // 4,
        num_steps=1,
        temperature=temperature,
        rng=np.random.default_rng(0),
        return_steps=True,
    )
    expected = np.exp(np.array(logits[1:]) / temperature)
    expected /= expected.sum()
    assert stats.chisquare(np.bincount(tokens.ravel())[1:], count * expected).pvalue > 1e-3
    np.testing.assert_allclose(steps["confidence"][-1], expected[tokens - 1], rtol=1e-12)


@both_ways
@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 3}, [1, 4, 2]),
        ({"top_k": 99}, [1, 2, 3, 4]),
        ({"top_p": 0.1}, [1]),
        ({"top_p": 0.8}, [1, 4, 2]),
        ({"top_p": 1.0}, [1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.8}, [1, 4]),
    ],
)
def test_drawn_tokens_follow_the_part_that_is_kept_and_confidence_the_whole(way, filters, kept):
    # The probabilities of ids 1 to 4 at this temperature are 0.45, 0.16, 0.08 and 0.31.
    logits, temperature, count = [9.0, 3.0, 1.0, 0.0, 2.4], 2.0, 8000
    logits[2] = 3.0 + temperature * np.log(0.16 / 0.45)
    logits[3] = 3.0 + temperature * np.log(0.08 / 0.45)
    logits[4] = 3.0 + temperature * np.log(0.31 / 0.45)
    model, params = with_logits(logits, seq_len=4)
    tokens, steps = way.iterative_decode(
        model,
        params,
        batch_size=count // 4,
        num_steps=1,
        temperature=temperature,
        rng=np.random.default_rng(0),
        return_steps=True,
        **filters,
    )
    whole = np.array([0.0, 0.45, 0.16, 0.08, 0.31])
    expected = np.where(np.isin(range(5), kept), whole, 0.0)
    expected *= count / expected.sum()
    counts = np.bincount(tokens.ravel(), minlength=5)
    assert np.flatnonzero(counts).tolist() == sorted(kept)
    if len(kept) > 1:
        assert stats.chisquare(counts[sorted(kept)], expected[sorted(kept)]).pvalue > 1e-3
    np.testing.assert_allclose(steps["confidence"][-1], whole[tokens], rtol=1e-12)


@both_ways
def test_of_equal_logits_top_k_and_top_p_keep_the_lower_ids(way):
    model, params = with_logits([9.0, 1.0, 2.0, 1.0, 1.0], seq_len=4)
    for filters in ({"top_k": 3}, {"top_p": 2 / 3}):
        tokens = way.iterative_decode(
            model, params, batch_size=500, rng=np.random.default_rng(0), **filters
        )
        assert set(tokens.ravel().tolist()) == {1, 2, 3}


@both_ways
@given(decoding=decodings())
@settings(max_examples=40)
def test_filters_that_keep_all_change_nothing_and_without_rng_none_does(way, decoding):
    (model, params, start, *_), options, make_rng = decoding
    plain = way.iterative_decode(model, params, tokens=start, rng=make_rng(), **options)
    all_kept = {"top_k": model.vocab_size, "top_p": 1.0}
    filters = all_kept if make_rng() is not None else {"top_k": 1, "top_p": 0.01}
    found = way.iterative_decode(model, params, tokens=start, rng=make_rng(), **options, **filters)
    np.testing.assert_array_equal(found, plain)


@both_ways
@given(case=strategies.cases(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_temperature_0_and_top_k_1_give_the_arg_max_with_the_confidence_of_the_whole(
    way, case, seed
):
    model, params, start, *_ = case
    expected, steps = way.iterative_decode(model, params, tokens=start, return_steps=True)
    for only_best in ({"temperature": 0}, {"top_k": 1}):
        rng = np.random.default_rng(seed)
        tokens, drawn = way.iterative_decode(
            model, params, tokens=start, rng=rng, return_steps=True, **only_best
        )
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(drawn["confidence"], steps["confidence"], rtol=1e-11)


def test_the_id_with_which_the_sum_reaches_top_p_is_the_last():
    logits, probabilities = np.array([[1.0, 3.0, 2.0, 1.0]]), np.array([[0.125, 0.5, 0.25, 0.125]])
    for top_p, kept in ((0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.8, [0, 1, 2])):
        found = decoding.keep(logits, probabilities, rule(top_p=top_p))
        assert np.flatnonzero(found[0]).tolist() == kept


def test_ids_of_tiny_probability_survive_top_p_1_in_float32():
    # In float32 the other probabilities add up to more than 1.
    logits = np.append(np.zeros(8191), -12.0).astype(np.float32)[np.newaxis]
    probabilities = np.exp(log_softmax(logits))
    assert probabilities[0, :-1].sum(dtype=np.float64) > 1
    kept = decoding.keep(logits, probabilities, rule(top_p=1.0))
    np.testing.assert_array_equal(kept, probabilities)


@both_ways
def test_random_order_reveals_every_position_first_equally_often(way):
    model, params = with_logits([0.0, 1.0, 2.0], seq_len=4)
    _, steps = way.iterative_decode(
        model,
        params,
        batch_size=8000,
        num_steps=4,
        order="random",
        rng=np.random.default_rng(0),
        return_steps=True,
    )
    first = (~steps["mask"][0]).sum(axis=0)
    assert stats.chisquare(first).pvalue > 1e-3


@both_ways
def test_a_large_choice_temperature_makes_the_order_random(way):
    model = marref.build(vocab_size=3, embed_dim=2, num_layers=1, num_heads=1, seq_len=3)
    params = strategies.random_params(model, np.random.default_rng(1))

    def first_revealed(choice_temperature):
        _, steps = way.iterative_decode(
            model,
            params,
            batch_size=2000,
            num_steps=3,
            schedule="linear",
            temperature=1e-6,
            choice_temperature=choice_temperature,
            rng=np.random.default_rng(0),
            return_steps=True,
        )
        return (~steps["mask"][0]).mean(axis=0)

    # At temperature 1e-6 nothing is left to the drawing of tokens.
    assert sorted(first_revealed(0.0)) == [0.0, 0.0, 1.0]
    assert first_revealed(1e9) == pytest.approx([1 / 3] * 3, abs=0.05)


class OneNudge(np.random.Generator):
    """Draws the lowest id always, and no noise but 1 at one place in one step."""

    def __init__(self, step, place):
        super().__init__(np.random.PCG64(0))
        self.countdown, self.place = step, place

    def random(self, size=None, dtype=np.float64, out=None):
        return np.zeros(size)

    def gumbel(self, loc=0.0, scale=1.0, size=None):
        noise = np.zeros(size)
        self.countdown -= 1
        noise[self.place] = self.countdown == 0
        return noise


@both_ways
@pytest.mark.parametrize("num_steps", [4, 9])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_gumbel_noise_in_step_k_of_K_is_scaled_by_1_minus_k_over_K(way, step, num_steps):
    # There are four tokens, so K is 4 even if more steps are asked for.
    model = marref.build(vocab_size=5, embed_dim=4, num_layers=1, num_heads=1, seq_len=4)
    params = strategies.random_params(model, np.random.default_rng(2))
    options = {"num_steps": num_steps, "schedule": "linear", "return_steps": True}
    _, quiet = way.iterative_decode(model, params, rng=OneNudge(0, (0, 0)), **options)
    last = int(np.flatnonzero(quiet["mask"][2, 0])[0])
    confidence = np.log(quiet["confidence"][step - 1, 0])
    masked = quiet["mask"][step - 2, 0] if step > 1 else np.ones(4, bool)
    gap = confidence[masked].max() - confidence[last]
    for factor, overtakes in ((0.99, False), (1.01, True)):
        _, steps = way.iterative_decode(
            model,
            params,
            choice_temperature=factor * gap / (1 - step / 4),
            rng=OneNudge(step, (0, last)),
            **options,
        )
        assert steps["mask"][step - 1, 0, last] == (not overtakes)


@both_ways
def test_a_schedule_may_be_a_function(way):
    model, params = with_logits([0.0, 1.0, 2.0], seq_len=5)
    _, steps = way.iterative_decode(
        model, params, schedule=lambda masked, _: [masked - 1, 1], return_steps=True
    )
    assert steps["mask"].sum(axis=(1, 2)).tolist() == [1, 0]


@both_ways
def test_nothing_masked_takes_no_step(way):
    model, params = with_logits([0.0, 1.0, 2.0])
    tokens, steps = way.iterative_decode(model, params, tokens=[[1, 2, 1]], return_steps=True)
    _, others = way.iterative_decode(model, params, tokens=[[1, 0, 1]], return_steps=True)
    assert {name: (x.shape[1:], x.dtype) for name, x in steps.items()} == {
        name: (x.shape[1:], x.dtype) for name, x in others.items()
    }
    assert tokens.tolist() == [[1, 2, 1]]
    assert {len(x) for x in steps.values()} == {0}


@both_ways
def test_defaults_are_those_of_the_specification(way):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(way.iterative_decode).parameters.items()
    }
    expected = {"num_steps": 8, "mask_token_id": 0, "temperature": 1.0, "schedule": "cosine"}
    assert expected.items() <= defaults.items()
    assert (defaults["order"], defaults["rng"]) == ("confidence", None)


# The parts of the definition.

rows = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)


@given(num=rows, vocab_size=st.integers(2, 6), mask_token_id=st.integers(0, 1), seed=seeds)
def test_predict_draws_the_first_id_whose_cumulative_probability_is_above_u(
    num, vocab_size, mask_token_id, seed
):
    rng = np.random.default_rng(seed)
    logits, uniforms = rng.normal(0.0, 2.0, (num, vocab_size)), rng.random(num)
    before = logits.copy()
    tokens, log_confidence, _ = decoding.predict(
        logits, rule(mask_token_id=mask_token_id, temperature=0.7), uniforms
    )
    np.testing.assert_array_equal(logits, before, "the logits are left alone")
    for row, u, token, log_p in zip(logits, uniforms, tokens, log_confidence, strict=True):
        p = np.exp(row / 0.7)
        p[mask_token_id] = 0.0
        p /= p.sum()
        assert p[:token].sum() <= u + 1e-12
        assert p[: token + 1].sum() > u - 1e-12
        assert log_p == pytest.approx(np.log(p[token]), rel=1e-12, abs=1e-12)


def test_predict_with_u_at_the_ends_of_its_interval_draws_the_first_and_the_last_id():
    logits, last = np.array([[0.0, 1.0, 2.0]]), np.array([1 - 2.0**-53])
    for mask_token_id, ends in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        found = [
            decoding.predict(logits, rule(mask_token_id=mask_token_id), u).tokens.item()
            for u in (np.zeros(1), last)
        ]
        assert tuple(found) == ends


@given(num=rows, length=st.integers(1, 6), seed=seeds)
def test_choose_marks_the_highest_priorities_and_of_equals_the_lower_position(num, length, seed):
    rng = np.random.default_rng(seed)
    priority = rng.choice([-np.inf, 0.0, 0.5, 1.0], (num, length))
    counts = rng.integers(length + 1, size=num)
    chosen = decoding.choose(priority, counts)
    for row, count, marked in zip(priority, counts, chosen, strict=True):
        order = sorted(range(length), key=lambda position, row=row: (-row[position], position))
        assert np.flatnonzero(marked).tolist() == sorted(order[:count])


def test_rank_gives_what_is_not_masked_no_chance():
    log_confidence, masked = np.array([[-0.5, -np.inf, -2.0]]), np.array([[True, False, True]])
    progress = np.array([0.25])
    plain = decoding.rank(log_confidence, masked, progress, rule(), None)
    np.testing.assert_array_equal(plain, log_confidence)
    annealed = rule(choice_temperature=4.0)
    gumbel = decoding.draw_noise(masked, annealed, np.random.default_rng(0))
    np.testing.assert_array_equal(gumbel, np.random.default_rng(0).gumbel(size=(1, 3)))
    noisy = decoding.rank(log_confidence, masked, progress, annealed, gumbel)
    np.testing.assert_allclose(noisy, log_confidence + 0.75 * 4.0 * gumbel, rtol=1e-15)
    rng = np.random.default_rng(0)
    at_random = rule(order="random")
    noise = decoding.draw_noise(masked, at_random, rng)
    random = decoding.rank(log_confidence, masked, progress, at_random, noise)
    assert ((random[masked] >= 0) & (random[masked] < 1)).all()
    assert noisy[0, 1] == random[0, 1] == -np.inf


def test_the_decoder_asks_for_the_masked_positions_of_every_step():
    asked = []

    def predict_at(tokens, masked, uniforms, scale):
        asked.append((tokens.tolist(), masked.tolist(), uniforms))
        count = masked.sum()
        rising = np.linspace(-1.0, -0.5, count)
        return decoding.Prediction(np.full(count, 2), rising, rising)

    start = np.array([[0, 1, 0, 0]])
    tokens, steps = decoding.decode(predict_at, start, rule(num_steps=3), None, np.dtype("f8"))
    assert tokens.tolist() == [[2, 1, 2, 2]]
    assert asked == [
        ([[0, 1, 0, 0]], [[True, False, True, True]], None),
        ([[0, 1, 0, 2]], [[True, False, True, False]], None),
        ([[0, 1, 2, 2]], [[True, False, False, False]], None),
    ]
    assert steps["mask"].sum(axis=(1, 2)).tolist() == [2, 1, 0]


def test_reveal_counts_of_sequences_with_fewer_steps_end_with_zeros():
    masked = np.arange(5) < np.array([[5], [0], [2]])
    plan = decoding.planning.make(rule(num_steps=3), masked)
    assert plan.counts.tolist() == [[2, 1, 2, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert plan.num_rounds.tolist() == [3, 0, 2]
