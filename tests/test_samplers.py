"""Is chance right?  The decoder's distribution against that of the rules by the book.

For few ids and positions `rules_oracle` gives every history that decoding may run through, with its
probability.  The decoder is held to it twice: fed with every outcome instead of a draw, which must
give the same distribution to 1e-12, and by its draws, 4,000 with a fixed seed, which must not
differ from it at a significance of 1e-3.  The faults below all differ at 1e-9.
"""

import dataclasses
import functools
import itertools
import random
from collections import Counter, defaultdict
from fractions import Fraction as F

import numpy as np
import pytest
from scipy import stats

import marref
from marref import decoding
from marref.decoding import Chance, State
from marref.loss import log_softmax

from . import rules_oracle as book
from . import strategies
from .rules_oracle import Rule

NUM_DRAWS = 4_000
SIGNIFICANCE = 1e-3
OF_A_FAULT = 1e-9

THREE, FOUR, KNOWN = (0, 0, 0), (0, 0, 0, 0), (0, 2, 0)
RULES = {
    "arg max": (THREE, Rule(draws=False)),
    "temperature 0": (THREE, Rule(temperature=F(0))),
    "tempered confidence": (THREE, Rule(num_steps=2, temperature=F(1, 2))),
    "untempered confidence": (
        THREE,
        Rule(num_steps=2, temperature=F(1, 2), score_temperature=F(1)),
    ),
    "hot": (THREE, Rule(num_steps=2, temperature=F(2), score_temperature=F(1, 3))),
    "known": (KNOWN, Rule()),
    "gumbel": (THREE, Rule(choice_temperature=F(3, 2))),
    "gumbel, 4.5": (KNOWN, Rule(choice_temperature=F(9, 2))),
    "gumbel on margin": (THREE, Rule(order="margin", choice_temperature=F(3, 2))),
    "gumbel on entropy": (THREE, Rule(order="entropy", choice_temperature=F(1, 2))),
    "gumbel in blocks": (FOUR, Rule(num_steps=4, choice_temperature=F(2), block_length=2)),
    "random": (THREE, Rule(num_steps=2, order="random")),
    "margin": (THREE, Rule(order="margin", num_steps=2)),
    "margin of arg max": (THREE, Rule(order="margin", draws=False)),
    "entropy": (THREE, Rule(order="entropy", temperature=F(1, 2))),
    "alg_temp": (THREE, Rule(order_temperature=F(1, 5))),
    "alg_temp of margin": (THREE, Rule(order="margin", order_temperature=F(1, 5), num_steps=2)),
    "alg_temp of entropy": (THREE, Rule(order="entropy", order_temperature=F(1, 2))),
    "alg_temp of arg max": (
        THREE,
        Rule(order_temperature=F(1, 5), temperature=F(0)),
    ),
    "left to right": (THREE, Rule(order="left-to-right", num_steps=2)),
    "halton, 3 by 3": ((0,) * 9, Rule(order="halton", num_steps=5)),
    "halton": (FOUR, Rule(order="halton")),
    "halton, known": ((0, 0, 1, 0), Rule(order="halton", num_steps=2)),
    "blocks": (FOUR, Rule(block_length=2)),
    "blocks that do not divide": ((2, 0, 0, 0), Rule(block_length=2, num_steps=3)),
    "blocks in random order": (FOUR, Rule(block_length=3, order="random")),
    "blocks and threshold": (FOUR, Rule(block_length=2, reveal=("threshold", F(3, 5)))),
    "blocks and quota": (
        FOUR,
        Rule(num_steps=4, block_length=2, reveal=("quota-or-threshold", F(1, 2))),
    ),
    "quota after a block that was done early": (
        (0, 0, 2, 0, 0, 0),
        Rule(num_steps=4, block_length=3, reveal=("quota-or-threshold", F(1, 2))),
    ),
    "threshold": (THREE, Rule(reveal=("threshold", F(2, 5)))),
    "threshold, untempered": (
        THREE,
        Rule(reveal=("threshold", F(2, 5)), temperature=F(1, 2), score_temperature=F(1)),
    ),
    "quota or threshold": (FOUR, Rule(reveal=("quota-or-threshold", F(3, 5)))),
    "factor": (FOUR, Rule(reveal=("factor", F(1)))),
    "entropy-bounded": (FOUR, Rule(order="entropy", reveal=("entropy-bounded", F(1, 2)))),
    "independent": (THREE, Rule(order="random", reveal=("independent",))),
    "ReMDM cap": (KNOWN, Rule(num_steps=4, order="random", remask=("remdm-cap", F(3, 5)))),
    "ReMDM rescale": (
        KNOWN,
        Rule(num_steps=4, order="random", remask=("remdm-rescale", F(2, 5))),
    ),
    "ReMDM conf": (THREE, Rule(order="random", remask=("remdm-conf",), temperature=F(1, 2))),
    "ReMDM loop": (
        KNOWN,
        Rule(
            num_steps=4,
            order="random",
            remask=("remdm-loop", F(1, 5), F(3, 4), F(1, 2), F(4, 5)),
        ),
    ),
    "P2": (THREE, Rule(remask=("p2",))),
    "P2, more steps than positions": (KNOWN, Rule(remask=("p2",), num_steps=5)),
    "P2 by entropy": (THREE, Rule(remask=("p2",), order="entropy", num_steps=4)),
    "P2 with gumbel": (KNOWN, Rule(remask=("p2",), choice_temperature=F(3, 2))),
    "edit": (THREE, Rule(remask=("edit", F(1, 2)), num_steps=2)),
    "edit without end": (KNOWN, Rule(remask=("edit", F(1, 4)), num_steps=2)),
    "edit and threshold": (THREE, Rule(remask=("edit", F(1, 2)), reveal=("threshold", F(2, 5)))),
    "edit and independent": (
        (0, 0),
        Rule(num_steps=2, order="random", remask=("edit", F(3, 5)), reveal=("independent",)),
    ),
    "top_k": (KNOWN, Rule(top_k=2)),
    "top_p": (KNOWN, Rule(top_p=F(3, 5), temperature=F(2))),
    "min_p": (KNOWN, Rule(min_p=F(1, 2))),
    "all filters": (KNOWN, Rule(top_k=2, top_p=F(9, 10), min_p=F(1, 3), temperature=F(2))),
    "excluded": (KNOWN, Rule(exclude_ids=(2,), choice_temperature=F(1))),
    "excluded and P2": (THREE, Rule(exclude_ids=(1,), remask=("p2",), top_p=F(9, 10))),
}
of_rules = pytest.mark.parametrize(("start", "rule"), RULES.values(), ids=RULES)


class Table:
    """A model: conditionals of random fractions, given any tokens, which need not fit a joint."""

    def __init__(self, length, num_ids):
        self.rng, self.base = random.Random(0), num_ids ** np.arange(length)
        self.sequences = list(itertools.product(range(num_ids), repeat=length))
        self.rows = {tokens: self.rows_of(tokens, num_ids) for tokens in self.sequences}

    def rows_of(self, tokens, num_ids):
        return [self.fractions(num_ids) for _ in tokens]

    def fractions(self, num_ids):
        weights = [0, *self.rng.sample(range(1, 98), num_ids - 1)]
        return [F(weight, sum(weights)) for weight in weights]

    def __call__(self, tokens):
        return self.rows[tokens]

    def predict_at(self, rule):
        """What the decoder asks a model; the logit of [MASK] is large, and must not matter."""
        decoder, logits = of_decoder(rule), np.empty((len(self.rows), *self.shape))
        for tokens, rows in self.rows.items():
            probabilities = np.array(rows, np.float64)
            logits[tokens @ self.base, :, 0] = 3.0
            logits[tokens @ self.base, :, 1:] = np.log(probabilities[:, 1:])

        def predict_at(tokens, wanted, uniforms, scale=None):
            at = logits[tokens @ self.base][wanted]
            return decoding.predict(at, decoder, uniforms if rule.draws else None, tokens[wanted])

        return predict_at

    @property
    def shape(self):
        """Length and number of ids."""
        return np.shape(self.rows[self.sequences[0]])


@functools.cache
def table_for(start, rule):
    """Four ids where that is not too much.

    Of two ids that may be drawn, confidence, margin and entropy order positions alike, at every
    temperature.
    """
    if len(start) > 6:
        return Table(len(start), 2)
    few = len(start) < 4 and rule.num_steps < 4 and not rule.remask[0].startswith("remdm")
    return Table(len(start), 4 if few else 3)


@functools.cache
def by_the_book(start, rule):
    """The distribution of the histories."""
    return book.histories(rule, table_for(start, rule), start)


def options(rule):
    """The arguments that the decoder has for a rule."""
    names = dataclasses.asdict(rule)
    del names["draws"]
    for name, value in names.items():
        names[name] = float(value) if isinstance(value, F) else value
    (reveal, *bounds), (remask, *etas) = names["reveal"], names["remask"]
    names["reveal"] = None if reveal == "linear" else decoding.REVEALS[reveal](*map(float, bounds))
    names["remask"] = None if remask == "none" else decoding.REMASKS[remask](*map(float, etas))
    return {"schedule": "linear", **names}


def of_decoder(rule):
    """The same rule for the decoder."""
    return decoding.Rule(mask_token_id=0, exclude_mask_token=True, **options(rule))


# Every outcome.


@of_rules
@pytest.mark.parametrize("inside", [1e-12, 1 - 1e-12], ids=["lower ends", "upper ends"])
def test_fed_with_every_outcome_the_decoder_has_the_distribution_of_the_book(start, rule, inside):
    expected = by_the_book(start, rule)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-12)
    assert_same(fed(table_for(start, rule), rule, start, inside), expected)


class Halves(Table):
    """1/2, 1/4 and 1/4 everywhere, which float64 has exactly: equal numbers and bounds met."""

    def fractions(self, num_ids):
        return [F(0), *self.rng.sample([F(1, 2), F(1, 4), F(1, 4)], 3)]


@pytest.mark.parametrize(
    "rule",
    [
        Rule(num_steps=2),
        Rule(num_steps=2, order="margin", draws=False),
        Rule(top_k=2),
        Rule(top_p=F(1, 2)),
        Rule(top_p=F(3, 4)),
        Rule(min_p=F(1, 2)),
        Rule(reveal=("threshold", F(1, 2))),
        Rule(reveal=("quota-or-threshold", F(1, 4))),
        Rule(reveal=("factor", F(3, 2))),
        Rule(remask=("edit", F(1, 2))),
        Rule(remask=("p2",)),
    ],
)
def test_equal_numbers_and_bounds_that_are_met_are_as_in_the_book(rule):
    table = Halves(3, 4)
    assert_same(fed(table, rule, THREE, 0.5), book.histories(rule, table, THREE))


def assert_same(found, expected):
    apart = {key: float(found.get(key, 0) - expected.get(key, 0)) for key in {*found, *expected}}
    worst = max(apart, key=lambda key: abs(apart[key]))
    assert abs(apart[worst]) < 1e-12, (worst, apart[worst])


def fed(table, rule, start, inside):
    """The distribution of the histories of a decoder that is given every outcome.

    Where a number decides that is uniform in [0, 1), the book says which parts of [0, 1) it has to
    tell apart, and the decoder is given one just inside each, at the fraction ``inside`` of it.
    Branches are the rows of one batch; those with the same history are joined after every step.
    """
    decoder = of_decoder(rule)
    predict_at = table.predict_at(rule)
    state = State.start(np.array([start]), decoder, np.dtype(np.float64))
    histories, chances, ended = [(start,)], np.ones(1), {}
    while True:
        busy = state.busy()
        ended |= {histories[row]: chances[row] for row in np.flatnonzero(~busy)}
        if not busy.any():
            return ended
        walk = at_rows(np.flatnonzero(busy), state, histories, chances)
        walk = branch(walk, [token_outcomes(rule, table, h, inside) for h in walk[1]])
        priorities = [priority(predict_at, walk, noise) for noise in (0.0, 1.0)]
        outcomes = zip(walk[1], *priorities, strict=True)
        walk = branch(walk, [order_outcomes(rule, *each, inside) for each in outcomes])
        walk = branch(walk, [remask_outcomes(rule, table, h, inside) for h in walk[1]])

        state, histories, chances, *numbers = walk
        view, prediction = look(predict_at, state, numbers[0])
        state.advance(view, prediction, Chance(*numbers) if rule.draws else Chance())
        np.testing.assert_array_equal(state.masked, state.tokens == 0)
        state, histories, chances = joined(state, histories, chances)


def branch(walk, outcomes):
    """Split each row into its outcomes, pairs of numbers and a probability; they come last."""
    rows = np.repeat(np.arange(len(outcomes)), [len(of_row) for of_row in outcomes])
    numbers, shares = zip(*itertools.chain(*outcomes), strict=True)
    state, histories, chances, *before = at_rows(rows, *walk)
    return state, histories, chances * np.array(shares, float), *before, np.array(numbers, float)


def joined(state, histories, chances):
    """Join the rows that have the same history, and so the same future."""
    total, first = defaultdict(float), {}
    for row, tokens in enumerate(state.tokens.tolist()):
        history = (*histories[row], tuple(tokens))
        total[history] += chances[row]
        first.setdefault(history, row)
    return at_rows(list(first.values()), state)[0], list(total), np.array(list(total.values()))


def at_rows(rows, *parts):
    """The given rows of states, lists and arrays."""
    return [part_at_rows(part, rows) for part in parts]


def part_at_rows(part, rows):
    if isinstance(part, list):
        return [part[row] for row in rows]
    if isinstance(part, np.ndarray):
        return part[rows]
    arrays = {name: value[rows] for name, value in vars(part).items() if name in OF_ROWS}
    return dataclasses.replace(
        part, plan=type(part.plan)(*(array[rows] for array in part.plan)), **arrays
    )


OF_ROWS = {field.name for field in dataclasses.fields(State)} - {"rule", "plan", "number"}


def look(predict_at, state, uniforms):
    view = state.look()
    return view, predict_at(state.tokens, view.wanted, uniforms[view.wanted])


def priority(predict_at, walk, noise):
    """What the decoder ranks positions by if all noise is this number."""
    state, _, _, uniforms = walk
    view, prediction = look(predict_at, state, uniforms)
    noise = np.full(state.tokens.shape, noise)
    return state._step(view, prediction, Chance(noise=noise)).priority


def token_outcomes(rule, table, history, inside):
    """A number for each position that the decoder draws a token for, 1/2 elsewhere."""
    rows = [book.without(rule.exclude_ids, p) for p in table(history[-1])]
    parts = {}
    for i in book.present_block(rule, history) if 0 in history[-1] else []:
        ids = book.drawn(rule, rows[i])
        ends = [sum(ids.get(j, 0) for j in range(token)) for token in sorted(ids)]
        parts[i] = {ends[k] + inside * float(ids[t]): ids[t] for k, t in enumerate(sorted(ids))}
    return spread(parts, len(history[0]))


def order_outcomes(rule, history, at_0, at_1, inside):
    """Noise for every order, by the location and the scale that it has in the decoder."""
    chance = book.chance_to_be_revealed(rule, len(history))
    if chance is not None:
        masked = [i for i, token in enumerate(history[-1]) if token == 0]
        return spread(dict.fromkeys(masked, flip(1 - chance, inside)), len(at_0))
    ranked = np.flatnonzero(np.isfinite(at_0))
    scale = float((at_1[ranked] - at_0[ranked]).max(initial=0.0))
    if scale == 0.0:
        return [(np.full(len(at_0), 0.5), 1.0)]
    weights = dict(zip(ranked, np.exp((at_0[ranked] - at_0[ranked].max()) / scale), strict=True))
    outcomes = []
    for order in itertools.permutations(ranked):
        drawn = np.array([weights[i] for i in order])
        noise = np.full(len(at_0), 0.5)
        noise[list(order)] = (-np.arange(len(order)) - at_0[list(order)]) / scale
        outcomes.append((noise, np.prod(drawn / np.cumsum(drawn[::-1])[::-1])))
    return outcomes


def remask_outcomes(rule, table, history, inside):
    """A number for each token that may be taken back."""
    generated = [i for i, t in enumerate(history[0]) if t == 0 and history[-1][i] != 0]
    sigmas = book.sigmas(rule, table, history, generated)
    return spread({i: flip(sigma, inside) for i, sigma in sigmas.items()}, len(history[0]))


def flip(chance, inside):
    """Numbers below a bound and not, with their probabilities."""
    parts = {inside * float(chance): chance, float(chance + inside * (1 - chance)): 1 - chance}
    return {number: share for number, share in parts.items() if share > 0}


def spread(parts, length):
    """Arrays of numbers, those of each position by themselves, 1/2 where there are none."""
    return [
        ([numbers.get(i, 0.5) for i in range(length)], chance)
        for numbers, chance in book.product(parts)
    ]


# Draws.


@of_rules
def test_draws_follow_the_book(start, rule):
    found = drawn(table_for(start, rule).predict_at(rule), start, rule)
    assert p_value(found, by_the_book(start, rule)) > SIGNIFICANCE


def drawn(predict_at, start, rule, seed=0):
    """How often each history comes about."""
    tokens = np.tile(start, (NUM_DRAWS, 1))
    rng = np.random.default_rng(seed) if rule.draws else None
    _, steps = decoding.decode(predict_at, tokens, of_decoder(rule), rng, np.dtype(np.float64))
    return count_histories(tokens, steps)


def count_histories(start, steps):
    """How often each history comes about in a batch."""
    of_rows = np.concatenate([start[np.newaxis], steps["tokens"]]).swapaxes(0, 1)
    counts = Counter(map(bytes, of_rows.astype(np.uint8).reshape(len(start), -1)))
    at = range(0, of_rows[0].size, start.shape[1])
    return {tuple(tuple(key[i : i + at.step]) for i in at): count for key, count in counts.items()}


def p_value(found, expected):
    """Chi-square of the counts of histories, those with fewer than 5 expected taken together.

    A step at the end that changes nothing is not counted, since in a batch all wait for the last.
    0 where something impossible has come about, 1 where only one thing is possible, and has.
    """
    found, expected = without_waiting(found), without_waiting(expected)
    if not found.keys() <= expected.keys():
        return 0.0
    total = sum(found.values())
    pairs = sorted((float(chance) * total, found[key]) for key, chance in expected.items())
    rare = [pair for pair in pairs if pair[0] < 5]
    cells = np.array([np.sum(rare, axis=0), *pairs[len(rare) :]] if rare else pairs)
    return 1.0 if len(cells) == 1 else stats.chisquare(cells[:, 1], cells[:, 0]).pvalue


def without_waiting(histories):
    """The same numbers for histories up to the last change."""
    shorter = defaultdict(float)
    for history, number in histories.items():
        changes = [k for k in range(1, len(history)) if history[k] != history[k - 1]]
        shorter[history[: max(changes, default=0) + 1]] += float(number)
    return shorter


TEMPERED, UNTEMPERED = RULES["tempered confidence"], RULES["untempered confidence"]


def annealed_by_k_minus_1(monkeypatch, rule):
    def rank(score, masked, progress, of_decoder, noise):
        earlier = progress - 1 / 3
        return decoding.rank(score, masked, earlier, of_decoder, noise)

    monkeypatch.setattr("marref.decoding.state.rank", rank)


def uniform_for_gumbel(monkeypatch, rule):
    def draw_noise(masked, of_decoder, rng):
        return rng.random(masked.shape)

    monkeypatch.setattr("marref.decoding.state.draw_noise", draw_noise)


def gumbel_on_p(monkeypatch, rule):
    def rank(score, masked, progress, of_decoder, noise):
        return decoding.rank(np.exp(score), masked, progress, of_decoder, noise)

    monkeypatch.setattr("marref.decoding.state.rank", rank)


def order_by_log_p(monkeypatch, rule):
    monkeypatch.setattr("marref.decoding.ordering._published", lambda score, rule: score)


def no_crossing_token(monkeypatch, rule):
    def keep(logits, probabilities, of_decoder):
        sums = np.cumsum(-np.sort(-probabilities, axis=1), axis=1)
        most = np.maximum((sums <= of_decoder.top_p).sum(axis=1), 1)
        bound = -np.take_along_axis(np.sort(-probabilities, axis=1), most[:, np.newaxis] - 1, 1)
        return np.where(probabilities >= bound, probabilities, 0.0)

    monkeypatch.setattr("marref.decoding.predicting.keep", keep)


def not_renormalised(monkeypatch, rule):
    def keep(logits, probabilities, of_decoder):
        kept = decoding.keep(logits, probabilities, of_decoder)
        kept[:, -1] += 1.0 - kept.sum(axis=1)
        return kept

    monkeypatch.setattr("marref.decoding.predicting.keep", keep)


def nothing_made_up_for(monkeypatch, rule):
    def counts(self, step):
        return decoding.Independent()(step)

    monkeypatch.setattr("marref.decoding.remasking.ReMDM.counts", counts)


def other_tokens_scored(monkeypatch, rule):
    monkeypatch.setattr("marref.decoding.P2.looked_at", lambda self, held, largest: largest)


def without_option(**changes):
    def fault(monkeypatch, rule):
        return dataclasses.replace(rule, **changes)

    return fault


FAULTS = {
    "untempered where tempered is meant": (
        "tempered confidence",
        without_option(score_temperature=F(1)),
    ),
    "tempered where untempered is meant": (
        "untempered confidence",
        without_option(score_temperature=None),
    ),
    "annealing by k - 1": ("gumbel", annealed_by_k_minus_1),
    "uniform noise": ("gumbel", uniform_for_gumbel),
    "noise added to p": ("gumbel", gumbel_on_p),
    "log p over T": ("alg_temp", order_by_log_p),
    "a block that looks ahead": ("blocks", without_option(block_length=None)),
    "one block for all": ("gumbel in blocks", without_option(block_length=None)),
    "the schedule's quota alone": ("quota or threshold", without_option(reveal=("linear",))),
    "the threshold alone": (
        "quota or threshold",
        without_option(reveal=("threshold", F(3, 5))),
    ),
    "top_p without the crossing token": ("top_p", no_crossing_token),
    "top_p not renormalised": ("top_p", not_renormalised),
    "excluded ids drawn": ("excluded", without_option(exclude_ids=())),
    "nothing made up for": ("ReMDM rescale", nothing_made_up_for),
    "cap for rescale": ("ReMDM rescale", without_option(remask=("remdm-cap", F(2, 5)))),
    "P2 scores another token": ("P2", other_tokens_scored),
}


@pytest.mark.parametrize(("right", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_rule_is_told_by_its_draws(right, fault, monkeypatch):
    start, rule = RULES[right]
    wrong = fault(monkeypatch, rule) or rule
    found = drawn(table_for(start, rule).predict_at(wrong), start, wrong)
    assert p_value(found, by_the_book(start, rule)) < OF_A_FAULT


@strategies.both_ways
@pytest.mark.parametrize(
    "name",
    ["untempered confidence", "gumbel", "alg_temp of entropy", "ReMDM rescale", "P2", "edit"],
)
def test_draws_with_a_model_follow_the_book(way, name):
    start, rule = RULES[name]
    model = marref.build(vocab_size=4, embed_dim=4, num_layers=1, num_heads=1, seq_len=3)
    params = strategies.random_params(model, np.random.default_rng(4), std=1.0)

    @functools.cache
    def probabilities(tokens):
        weights = np.exp(model(params, np.array([tokens]))[0])
        weights[:, 0] = 0.0
        return (weights / weights.sum(axis=1, keepdims=True)).tolist()

    tokens, rng = np.tile(start, (NUM_DRAWS, 1)), np.random.default_rng(0)
    _, steps = way.iterative_decode(
        model, params, tokens=tokens, rng=rng, return_steps=True, **options(rule)
    )
    expected = book.histories(rule, probabilities, start)
    assert p_value(count_histories(tokens, steps), expected) > SIGNIFICANCE


# What is known of rules.


class Joint(Table):
    """The exact conditionals of a random joint distribution."""

    def __init__(self, length, num_ids):
        ids = list(itertools.product(range(1, num_ids), repeat=length))
        rng = random.Random(1)
        weights = {tokens: rng.randint(1, 97) for tokens in ids}
        self.joint = {
            tokens: F(weight, sum(weights.values())) for tokens, weight in weights.items()
        }
        super().__init__(length, num_ids)

    def rows_of(self, tokens, num_ids):
        return [self.given_others(tokens, i, num_ids) for i in range(len(tokens))]

    def given_others(self, tokens, i, num_ids):
        fits = [
            (ids[i], p)
            for ids, p in self.joint.items()
            if all(t in (0, ids[j]) for j, t in enumerate(tokens) if j != i)
        ]
        total = sum(p for _, p in fits)
        return [sum(p for token, p in fits if token == wanted) / total for wanted in range(num_ids)]


class Alone(Table):
    """The same probabilities whatever the other tokens are."""

    def rows_of(self, tokens, num_ids):
        self.rng.seed(2)
        return super().rows_of(tokens, num_ids)


@pytest.mark.parametrize("order", ["random", "left-to-right", "halton", "margin", "entropy"])
def test_one_token_a_step_in_an_order_that_sees_no_draw_draws_from_the_joint(order):
    table = Joint(4, 3)
    rule = Rule(num_steps=4, order=order)
    assert_same(book.results(fed(table, rule, FOUR, 0.5)), table.joint)


def test_one_token_a_step_in_order_of_its_confidence_does_not():
    table = Joint(4, 3)
    found = book.results(fed(table, Rule(num_steps=4), FOUR, 0.5))
    assert max(abs(found[ids] - p) for ids, p in table.joint.items()) > 1e-3


@pytest.mark.parametrize(
    "rule",
    [
        Rule(num_steps=1),
        Rule(num_steps=1, order="random"),
        Rule(num_steps=1, choice_temperature=F(9, 2)),
        Rule(num_steps=1, block_length=3),
        Rule(num_steps=1, order="random", reveal=("independent",)),
        Rule(num_steps=1, order="random", remask=("remdm-cap", F(1))),
        Rule(num_steps=1, remask=("p2",)),
        Rule(reveal=("threshold", F(0))),
        Rule(order="entropy", reveal=("entropy-bounded", F(9))),
    ],
)
def test_one_step_draws_from_the_product_of_the_marginals(rule):
    table = Joint(3, 3)
    marginals = [dict(enumerate(row)) for row in table(THREE)]
    expected = {
        tuple(ids.values()): p for ids, p in book.product(dict(enumerate(marginals))) if p > 0
    }
    assert_same(book.results(fed(table, rule, THREE, 0.5)), expected)


@pytest.mark.parametrize("name", ["gumbel", "quota or threshold", "ReMDM cap", "P2", "edit"])
def test_options_that_keep_all_change_no_bit(name):
    start, rule = RULES[name]
    table = table_for(start, rule)
    tokens = np.tile(start, (50, 1))
    all_kept = dataclasses.replace(
        rule, top_k=table.shape[1], top_p=F(1), min_p=F(1, 10**6), score_temperature=F(1)
    )
    (_, steps), (_, same) = (
        decoding.decode(
            table.predict_at(each),
            tokens,
            of_decoder(each),
            np.random.default_rng(3),
            np.dtype(np.float64),
        )
        for each in (rule, all_kept)
    )
    for name, array in steps.items():
        np.testing.assert_array_equal(same[name], array, name)


REMDM = {
    "cap": ("remdm-cap", F(3, 5)),
    "rescale": ("remdm-rescale", F(2, 5)),
    "loop": ("remdm-loop", F(1, 5), F(3, 4), F(1, 2), F(4, 5)),
}


@pytest.mark.parametrize("remask", REMDM.values(), ids=REMDM)
def test_remdm_keeps_how_many_are_unmasked_and_what_they_are(remask):
    """With α as the rule has it, P(token after step k) is α_k p, and that of [MASK] 1 - α_k."""
    rule = Rule(num_steps=4, order="random", remask=remask)
    table = Alone(2, 3)
    found = fed(table, rule, (0, 0), 0.5)
    for k in range(1, 5):
        after = defaultdict(float)
        for history, chance in found.items():
            after[history[k]] += chance
        alpha = book.alpha_of(rule, 1 - F(k, 4))
        one_by_one = {
            i: {0: 1 - alpha, 1: alpha * p[1], 2: alpha * p[2]} for i, p in enumerate(table((0, 0)))
        }
        expected = {tuple(ids.values()): chance for ids, chance in book.product(one_by_one)}
        assert_same(after, expected)


SURE = np.array([19.0, 40.0, 23.0, 18.0, 33.0, 28.0])  # The largest logit less the other one.


def sure_logits():
    return np.stack([np.zeros(6), SURE, np.zeros(6)], axis=1).astype(np.float32)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_the_surest_come_first_in_float32_too(order):
    rule = of_decoder(Rule(num_steps=6, order=order))

    def predict_at(tokens, wanted, uniforms, scale):
        return decoding.predict(sure_logits()[wanted[0]], rule, uniforms)

    start = np.zeros((1, 6), np.int64)
    _, steps = decoding.decode(predict_at, start, rule, None, np.dtype(np.float32))
    assert steps["revealed"][:, 0].argmax(axis=1).tolist() == np.argsort(-SURE).tolist()


def test_ranked_by_p_itself_they_would_come_from_left_to_right():
    p = np.exp(log_softmax(sure_logits()[:, 1:]))
    for ties in (p[:, 0], p[:, 0] - p[:, 1]):
        assert ties.dtype == np.float32
        assert (ties == 1).all()
        chosen = decoding.choose(ties[np.newaxis], np.array([2]))
        assert np.flatnonzero(chosen).tolist() == [0, 1]
