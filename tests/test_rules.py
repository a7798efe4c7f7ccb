"""What holds for every rule of the decoder, and every combination that Rule accepts."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from marref import decoding

from . import strategies
from .strategies import DEFINITION, FAST, both_ways

ONE_BY_ONE = (decoding.Threshold, decoding.Factor, decoding.EntropyBounded)
REVEALS = (
    decoding.Threshold(0.4),
    decoding.QuotaOrThreshold(0.4),
    decoding.Factor(1.0),
    decoding.EntropyBounded(1.0),
    decoding.Independent(),
)
REMASKS = (
    decoding.ReMDMCap(0.4),
    decoding.ReMDMRescale(0.4),
    decoding.ReMDMConf(),
    decoding.ReMDMLoop(0.3, 0.8, 0.3, 0.6),
    decoding.P2(),
    decoding.Edit(0.3),
)


@st.composite
def decodings(draw, chance=True):
    """A case, partly known, options that do not contradict each other, and what makes an rng."""
    case = draw(strategies.cases())
    length, ids = case.tokens.shape[1], range(2, case.model.vocab_size)
    remask = draw(st.none() | st.sampled_from(REMASKS))
    counts_itself = remask is not None and remask.counts_itself
    reveal = None if counts_itself else draw(st.none() | st.sampled_from(REVEALS))
    order = getattr(reveal, "order", None) or getattr(remask, "order", None)
    noise = {}
    if order is None:
        grid = math.isqrt(length) ** 2 == length
        num_orders = 4 if remask == decoding.P2() else 6 if grid else 5
        order = draw(st.sampled_from(decoding.ORDERS[:num_orders]))
        if chance and order in ("confidence", "margin", "entropy"):
            one = st.sampled_from(["choice_temperature", "order_temperature"])
            noise = draw(st.just({}) | st.builds(lambda name: {name: 1.5}, one))
    if not chance and order == "random":
        order, reveal, remask = "confidence", None, None
    looks_again = remask is not None and remask.looks_again
    by_itself = remask is not None or reveal == decoding.Independent()
    block_length = None if by_itself else draw(st.none() | st.integers(1, length))
    blocks = math.ceil(length / (block_length or length))
    options = {
        "num_steps": draw(st.integers(blocks, blocks + 8)),
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0, 7.0])),
        "score_temperature": draw(st.sampled_from([None, 1.0, 2.0])),
        "schedule": draw(st.sampled_from(["cosine", "linear", "square", "log"])),
        "order": order,
        "reveal": reveal,
        "remask": remask,
        "block_length": block_length,
        "exclude_ids": draw(st.lists(st.sampled_from(ids), unique=True)) if ids else (),
        "top_k": draw(st.sampled_from([None, 1, 3])),
        "top_p": draw(st.sampled_from([None, 0.6])),
        "min_p": draw(st.sampled_from([None, 0.3])),
        "exclude_mask_token": looks_again or draw(st.booleans()),
        **noise,
    }
    draws = chance and (order == "random" or noise != {} or draw(st.booleans()))
    return case, options, lambda: np.random.default_rng(case.seed) if draws else None


def traced(way, case, options, rng, tokens=None):
    """Decode, and give the trace too."""
    tokens = case.tokens if tokens is None else tokens
    return way.iterative_decode(
        case.model, case.params, tokens=tokens, rng=rng, return_steps=True, **options
    )


@both_ways
@given(decoding_=decodings())
@settings(max_examples=60)
def test_known_tokens_stay_and_what_is_excluded_is_never_emitted(way, decoding_):
    case, options, make_rng = decoding_
    tokens, steps = traced(way, case, options, make_rng())
    unknown = case.tokens == 0
    excluded = {*options["exclude_ids"], *([0] if options["exclude_mask_token"] else [])}
    assert not np.isin(tokens[unknown], list(excluded)).any()
    assert not steps["mask"][-1:].any()
    for after in (*steps["tokens"], tokens):
        np.testing.assert_array_equal(after[~unknown], case.tokens[~unknown])
    for name in ("mask", "revealed", "taken_back", "replaced"):
        assert not (steps.get(name, steps["mask"]) & ~unknown).any(), name


@both_ways
@given(decoding_=decodings())
@settings(max_examples=50)
def test_no_more_steps_than_stated_and_each_reveals_something_where_that_is_stated(way, decoding_):
    case, options, make_rng = decoding_
    _, steps = traced(way, case, options, make_rng())
    reveal, remask = options["reveal"], options["remask"]
    longest = int((case.tokens == 0).sum(axis=1).max())
    most = longest if isinstance(reveal, ONE_BY_ONE) else options["num_steps"]
    edits = isinstance(remask, decoding.Edit)
    assert len(steps["mask"]) <= most + (16 if edits else 0)
    if not (isinstance(reveal, decoding.Independent) or (remask is not None and not edits)):
        masked = (case.tokens == 0).any(axis=1)
        for after, revealed in zip(steps["mask"], steps.get("revealed", ()), strict=True):
            assert (revealed.any(axis=1) == masked).all()
            masked = after.any(axis=1)


@both_ways
@given(decoding_=decodings())
@settings(max_examples=60)
def test_each_state_follows_from_the_one_before_and_what_was_done(way, decoding_):
    case, options, make_rng = decoding_
    _, steps = traced(way, case, options, make_rng())
    p2 = isinstance(options["remask"], decoding.P2)
    unknown = case.tokens == 0
    before, masked, confidence = case.tokens, unknown, np.where(unknown, np.nan, 1.0)
    for step in (
        dict(zip(steps, arrays, strict=True)) for arrays in zip(*steps.values(), strict=True)
    ):
        revealed, taken_back, replaced = (step[n] for n in ("revealed", "taken_back", "replaced"))
        generated = unknown & ~masked
        assert not (revealed & ~masked).any()
        assert not ((taken_back | replaced) & ~generated).any()
        assert not (taken_back & replaced).any()
        np.testing.assert_array_equal(step["mask"], masked & ~revealed | taken_back)
        assert (step["tokens"][step["mask"]] == 0).all()
        same = ~(revealed | taken_back | replaced)
        np.testing.assert_array_equal(step["tokens"][same], before[same])
        assert (step["tokens"][replaced] != before[replaced]).all()
        kept = generated & ~taken_back if p2 else np.zeros_like(unknown)
        kept &= masked.any(axis=1)[:, np.newaxis]
        np.testing.assert_array_equal(step["count"], (revealed | kept).sum(axis=1))
        assert (step["score"][revealed | replaced] > -np.inf).all() or options["order"] == "margin"
        assert (step["score"][~unknown] == -np.inf).all()
        if not p2:
            settled = ~step["mask"] & ~masked & ~replaced
            np.testing.assert_array_equal(step["confidence"][settled], confidence[settled])
        before, masked, confidence = step["tokens"], step["mask"], step["confidence"]


@given(decoding_=decodings())
@settings(max_examples=100)
def test_definition_and_fast_way_agree_in_every_rule(decoding_):
    case, options, make_rng = decoding_
    expected, steps = traced(DEFINITION, case, options, make_rng())
    tokens, found = traced(FAST, case, options, make_rng())
    np.testing.assert_array_equal(tokens, expected)
    assert found.keys() == steps.keys()
    for name, array in steps.items():
        if name in ("score", "confidence"):
            np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, name)


@both_ways
@given(decoding_=decodings(chance=False))
@settings(max_examples=30)
def test_without_chance_a_sequence_does_not_depend_on_its_batch_in_any_rule(way, decoding_):
    case, options, _ = decoding_
    together, _ = traced(way, case, options, None)
    alone = [traced(way, case, options, None, row[np.newaxis])[0] for row in case.tokens]
    np.testing.assert_array_equal(together, np.concatenate(alone))
