"""Faults of samplers: what is drawn, in which order, how many, and what is taken back.

They show in `marref.verify.samplers` alone, where a decoder is given the numbers of chance: a
greedy decoder with a cosine or linear schedule has none of these parts.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from marref import decoding
from marref.decoding import (
    P2,
    Edit,
    EntropyBounded,
    Factor,
    Independent,
    Prediction,
    QuotaOrThreshold,
    ReMDMConf,
    Rule,
    State,
    Step,
    Threshold,
    View,
    keep,
    predict,
    rank,
    score,
)
from marref.decoding.planning import Plan, reveal_counts
from marref.decoding.remasking import Remask, ReMDM
from marref.decoding.revealing import count_with_chance
from marref.decoding.state import checked
from marref.loss import log_softmax
from marref.trees import Array
from marref.verify import samplers
from marref.verify.faults.fault import Fault, Stage

fault = Stage()


def _ruled(fault: Fault, changed: Callable[[Rule], dict[str, Any]]) -> None:
    """Predict by the rule with changed(rule) in the place of what it says."""

    @fault.wraps(predict)
    def _(old: Any, logits: Array, rule: Rule, *args: Any) -> Any:
        return old(logits, replace(rule, **changed(rule)), *args)


def _scored(fault: Fault, order: str, scored: Callable[[Array], Array]) -> None:
    """Compute the score of an order from the log-probabilities."""

    @fault.sets("sampler score").wraps(score)
    def _(old: Any, log_probabilities: Array, log_confidence: Array, rule: Rule) -> Any:
        if rule.order != order:
            return old(log_probabilities, log_confidence, rule)
        return scored(log_probabilities)


def _kept(fault: Fault, where: Callable[[Array, Array, Rule], Array]) -> None:
    """Keep of falling probabilities those where(logits, probabilities, rule), and the first.

    Logits and probabilities are handed over in falling order, if there is a top_p.
    """

    @fault.sets("sampler top-p").wraps(keep)
    def _(old: Any, logits: Array, probabilities: Array, rule: Rule) -> Any:
        if rule.top_p is None:
            return old(logits, probabilities, rule)
        order = np.argsort(-logits, axis=1, kind="stable")
        falling = np.take_along_axis(probabilities, order, axis=1)
        kept_falling = where(np.take_along_axis(logits, order, axis=1), falling, rule)
        kept_falling[:, 0] = True
        nucleus = np.empty_like(kept_falling)
        np.put_along_axis(nucleus, order, kept_falling, axis=1)
        return np.where(nucleus, old(logits, probabilities, replace(rule, top_p=None)), 0.0)


def _before(probabilities: Array) -> Array:
    """Sum what comes before each probability of a row."""
    sums: Array = np.cumsum(probabilities, axis=1, dtype=np.float64) - probabilities
    return sums


def _entropy(log_probabilities: Array) -> Array:
    finite = np.where(np.isneginf(log_probabilities), 0.0, log_probabilities)
    entropy: Array = -(np.exp(log_probabilities) * finite).sum(axis=1)
    return entropy


# What is drawn.

fault("sampler-confidence-tempered").says(
    "Confidence is taken from the distribution that tokens are drawn from, at their temperature, "
    "where the rule takes it at temperature 1, as LLaDA's code does. Draws are right, the order is "
    "not; cold draws saturate: all confidences come near 1."
).of(_ruled)(lambda rule: {"score_temperature": None})
fault("sampler-ids-not-excluded").says(
    "Ids that must never be emitted are drawn: the padding of a vocabulary, say. Confidences are "
    "lower by their probability."
).of(_ruled)(lambda rule: {"exclude_ids": ()})


@fault("sampler-excluded-after-softmax").wraps(predict)
def _(old: Any, logits: Array, rule: Rule, *args: Any) -> Any:
    """Ids that must never be emitted are left out of the draw and not of the softmax before it.
    Tokens are right, confidences too low by the probability of these ids."""
    prediction = old(logits, rule, *args)
    if not rule.exclude_ids:
        return prediction
    z = logits.copy()
    z[:, rule.mask_token_id] = -np.inf
    log_probabilities = log_softmax(decoding.over_temperature(z, rule.temperature))
    of_tokens = log_probabilities[np.arange(len(z)), prediction.tokens]
    return Prediction(prediction.tokens, of_tokens, score(log_probabilities, of_tokens, rule))


@fault("sampler-cut-not-renormalised").wraps(keep)
def _(old: Any, logits: Array, probabilities: Array, rule: Rule) -> Any:
    """The uniform number is compared with cumulative sums of what top-k, top-p or min-p left,
    without dividing by its total. Numbers above that total fall off the end: the last id."""
    kept = old(logits, probabilities, rule).copy()
    kept[:, -1] += np.maximum(1.0 - kept.sum(axis=1), 0.0)
    return kept


fault("sampler-top-p-without-crossing").says(
    "Top-p leaves out the id with which the sum comes to p, since the sum it is compared with "
    "includes the id itself. Fewer ids are left than the nucleus has, at least the first one."
).of(_kept)(lambda z, p, rule: np.cumsum(p, axis=1, dtype=np.float64) <= rule.top_p)
fault("sampler-top-p-one-more").says(
    "Top-p keeps one id more than the nucleus has: the mask is shifted by one place too many."
).of(_kept)(lambda z, p, rule: np.insert(_before(p) < rule.top_p, 0, True, axis=1)[:, :-1])
fault("sampler-top-p-untempered").says(
    "The nucleus is that of the distribution at temperature 1; the temperature comes after the "
    "cut. Temperature 1 hides it; above it, too few ids are left."
).of(_kept)(lambda z, p, rule: _before(np.exp(log_softmax(z))) < rule.top_p)


@fault("sampler-top-p-after-top-k").of(_kept)
def _(z: Array, p: Array, rule: Rule) -> Array:
    """Top-p is taken of what top-k left, divided by its sum, as when one filter follows the other
    in Hugging Face's code, where marref takes both from the whole distribution. It shows only where
    both are asked for."""
    first = np.where(np.arange(p.shape[1]) < (rule.top_k or p.shape[1]), p, 0.0)
    sure: Array = _before(first / first.sum(axis=1, keepdims=True)) < rule.top_p
    return sure


@fault("sampler-min-p-absolute").wraps(keep)
def _(old: Any, logits: Array, probabilities: Array, rule: Rule) -> Any:
    """Min-p is compared with probabilities themselves instead of with their ratio to the largest.
    More is cut off, the more so the less sure the model is."""
    if rule.min_p is None:
        return old(logits, probabilities, rule)
    bound = np.minimum(rule.min_p, probabilities.max(axis=1, keepdims=True))
    kept = old(logits, probabilities, replace(rule, min_p=None))
    return np.where(probabilities >= bound, kept, 0.0)


class _DrawAgain(Remask):
    """Replaces all that has been revealed by what is drawn now."""

    looks_again = True

    def replaced(self, step: Step) -> Array:
        return step.generated


again = fault("sampler-revealed-drawn-again")


@again.wraps(samplers.run)
def _(old: Any, rule: Rule, *args: Any) -> Any:
    """Tokens are drawn at all positions that were masked at the start, in every step, and all are
    put in: what was revealed before changes. The first step is right."""
    keeps = rule.remask is None and rule.block_length is None
    return old(replace(rule, remask=_DrawAgain()) if keeps else rule, *args)


@again.wraps(predict)
def _(old: Any, logits: Array, rule: Rule, *args: Any) -> Any:
    stays = None if isinstance(rule.remask, _DrawAgain) else rule.remask
    return old(logits, replace(rule, remask=stays), *args)


# Which come first.


def _noisy(fault: Fault, progress_of: Callable[[Array, Rule], Array]) -> None:
    """Scale noise by 1 - progress_of(k/K, rule)."""

    @fault.sets("sampler annealing").wraps(rank)
    def _(old: Any, z: Array, masked: Array, progress: Array, rule: Rule, noise: Any) -> Any:
        return old(z, masked, progress_of(progress, rule), rule, noise)


fault("sampler-noise-a-step-late").says(
    "Gumbel noise is scaled by 1 - (k - 1)/K in step k instead of 1 - k/K: steps are counted from "
    "0. The last step, which should have none, is noisy, and all others are too noisy."
).of(_noisy)(lambda progress, rule: progress - 1.0 / rule.num_steps)
fault("sampler-noise-not-annealed").says(
    "Gumbel noise has the same scale in every step instead of falling to 0. Late steps reveal "
    "tokens that the model is unsure of."
).of(_noisy)(lambda progress, rule: np.zeros_like(progress))


def _gumbel(fault: Fault, noise: Callable[[Array], Array]) -> None:
    @fault.sets("sampler noise").replaces(samplers.gumbel)
    def _(uniforms: Array) -> Array:
        return noise(uniforms).astype(np.float64)


@fault("sampler-gumbel-float32").of(_gumbel)
def _(uniforms: Array) -> Array:
    """Gumbel noise is computed in float32, where no number lies between 1 - 2⁻²⁴ and 1: it is never
    above 16.6, so that rare ids and positions are drawn too rarely (arXiv 2409.02908)."""
    narrow = np.minimum(uniforms.astype(np.float32), np.float32(1.0 - 2.0**-24))
    noise: Array = -np.log(-np.log(narrow))
    return noise


fault("sampler-gumbel-clipped").says(
    "Gumbel noise is -log(-log(u + ε) + ε) with ε = 1e-6 to keep the logarithms finite: it lies "
    "between -2.6 and 13.8, and the tails are cut off."
).of(_gumbel)(lambda u: -np.log(np.maximum(-np.log(u + 1e-6), 0.0) + 1e-6))


@fault("sampler-positions-by-log-score").wraps(rank)
def _(old: Any, z: Array, masked: Array, progress: Array, rule: Rule, noise: Any) -> Any:
    """Positions are drawn from softmax(log p / T) instead of softmax(p / T), as if the score were
    the logarithm that it is sorted by. Choices differ; scores are right."""
    if rule.order_temperature == 0 or rule.order == "entropy":
        return old(z, masked, progress, rule, noise)
    return np.where(masked, z.astype(np.float64) / rule.order_temperature + noise, -np.inf)


fault("sampler-entropy-reversed").says(
    "The largest entropy comes first instead of the smallest: the score is H where Σ p log p is "
    "meant. What the model knows least is revealed first."
).of(_scored, "entropy")(_entropy)
fault("sampler-entropy-in-bits").says(
    "Entropies are in bits instead of nats. The order is right; scores are larger by 1/log 2 = "
    "1.44, and a bound on entropies reveals fewer."
).of(_scored, "entropy")(lambda log_p: -_entropy(log_p) / math.log(2.0))
fault("sampler-margin-of-logits").says(
    "The margin is that of the two largest logits instead of probabilities: the ratio p₁/p₂ where "
    "the difference p₁ - p₂ is meant."
).of(_scored, "margin")(lambda log_p: np.diff(np.partition(log_p, -2, axis=1)[:, -2:])[:, 0])


# How many.


@fault("sampler-blocks-look-ahead").wraps(Plan.look)
def _(old: Any, self: Plan, masked: Array, planned: Array) -> Any:
    """Positions of later blocks compete with those of the present one: blocks set the counts, and
    nothing is held back. Something is revealed outside of the first block at once."""
    return masked, *old(self, masked, planned)[1:]


@fault("sampler-blocks-with-all-steps").replaces(reveal_counts)
def _(rule: Rule, num_masked: Array, ask: Any) -> list[Array]:
    """Each block takes as many steps as are meant for all of them. Fewer tokens are revealed in a
    step than should be; cut off after the steps asked for, sequences end in [MASK]."""
    nothing = np.zeros(0, np.int64)
    return [ask(int(count), rule.num_steps) if count else nothing for count in num_masked]


@fault("sampler-threshold-strict").sets("sampler threshold").replaces(Threshold.__call__)
def _(self: Threshold, step: Step) -> Array:
    """Confidences must be above the threshold, where one that is equal to it is enough. It shows
    where confidences round to 1 and the threshold is 1: one token a step instead of all."""
    sure = step.masked & (step.confidence > self.probability)
    count: Array = np.maximum(sure.sum(axis=1), 1)
    return count


stuck = fault("sampler-threshold-without-progress").sets("sampler threshold")


@stuck.replaces(Threshold.__call__)
def _(self: Threshold, step: Step) -> Array:
    """Nothing is revealed in a step in which no confidence reaches the threshold, where the surest
    should be: the next step predicts the same, and decoding never ends."""
    count: Array = (step.masked & (step.confidence >= self.probability)).sum(axis=1)
    return count


stuck.replaces(checked)(lambda count, step: count)


@fault("sampler-quota-ignored").replaces(QuotaOrThreshold.__call__)
def _(self: QuotaOrThreshold, step: Step) -> Array:
    """A step reveals what is above the threshold, at least one token, and not as many as the
    schedule says: with an unsure model it ends before all is revealed."""
    sure = step.masked & (step.confidence > self.probability)
    count: Array = np.maximum(sure.sum(axis=1), np.minimum(step.quota, 1))
    return count


@fault("sampler-factor-over-r").replaces(Factor.__call__)
def _(self: Factor, step: Step) -> Array:
    """The bound on the r-th confidence is 1 - f/r instead of 1 - f/(r + 1): places are counted from
    0. It is lower everywhere, and more is revealed."""
    falling = -np.sort(np.where(step.masked, -step.confidence, np.inf), axis=1)
    passes = falling >= 1.0 - self.factor / np.arange(1, falling.shape[1] + 1)
    passes[:, 0] = True
    passes &= ~np.isneginf(falling)
    count: Array = np.logical_and.accumulate(passes, axis=1).sum(axis=1)
    return count


@fault("sampler-entropy-bound-on-all").replaces(EntropyBounded.__call__)
def _(self: EntropyBounded, step: Step) -> Array:
    """The sum of all entropies is bounded, without taking the largest off. Fewer tokens are
    revealed, often one."""
    rising = np.sort(np.where(step.masked, -step.score, np.inf), axis=1)
    count: Array = np.maximum((np.cumsum(rising, axis=1) <= self.bound).sum(axis=1), 1)
    return count


@fault("sampler-independent-constant").replaces(Independent.__call__)
def _(self: Independent, step: Step) -> Array:
    """Masked positions are revealed with probability 1/K in every step instead of 1/(K - k + 1),
    which rises to 1: some are left at the end."""
    return count_with_chance(step, 1.0 / step.num_steps)


# What is taken back.


@fault("sampler-remdm-uncompensated").replaces(ReMDM.counts)
def _(self: ReMDM, step: Step) -> Array:
    """Masked positions are revealed with MDLM's probability, (αₛ - αₜ)/(1 - αₜ), though tokens are
    taken back too, which nothing makes up for: sequences end with more in [MASK] than they should
    have at any time before."""
    _, _, alpha, after = self._time(step)
    return count_with_chance(step, (after - alpha) / (1.0 - alpha))


@fault("sampler-remdm-new-taken-back").replaces(ReMDM.taken_back)
def _(self: ReMDM, step: Step, chosen: Array, uniforms: Array) -> Array:
    """Also what is revealed in this step is taken back with probability σ, which is for tokens that
    were there before it."""
    back: Array = (step.generated | chosen & step.masked) & (
        uniforms < self.sigma_of_generated(step)
    )
    return back


@fault("sampler-remdm-conf-sign").replaces(ReMDMConf.sigma_of_generated)
def _(self: ReMDMConf, step: Step) -> Array:
    """σ is shared out by softmax(p) instead of softmax(-p): what the model was surest of is taken
    back most."""
    weights = np.where(step.generated, np.exp(step.confidence.astype(np.float64)), 0.0)
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    sigma: Array = self._time(step)[1] * weights / total
    return sigma


@fault("sampler-p2-not-scored-again").wraps(State._step)
def _(old: Any, self: State, view: View, prediction: Prediction, chance: Any) -> Any:
    """What is revealed keeps the score with which it was, instead of being scored again given all
    that has been revealed since. What is taken back differs from the second step on."""
    if not isinstance(self.rule.remask, P2):
        return old(self, view, prediction, chance)
    generated = view.generated[view.wanted]
    confidence = np.log(self.confidence[view.wanted])
    tokens, *now = prediction
    stale = (np.where(generated, confidence, array) for array in now)
    return old(self, view, Prediction(tokens, *stale), chance)


@fault("sampler-edit-of-known").wraps(State.look)
def _(old: Any, self: State) -> Any:
    """Editing looks at all tokens that are not [MASK], those among them that were known from the
    start: a prompt is rewritten."""
    view = old(self)
    if not isinstance(self.rule.remask, Edit):
        return view
    generated = ~self.masked & self.busy()[:, np.newaxis]
    return view._replace(generated=generated, wanted=view.masked | generated)


@fault("sampler-edit-without-bound").replaces(Edit.replaced)
def _(self: Edit, step: Step) -> Array:
    """Every revealed token is replaced by the arg max, however unsure that is: what was drawn does
    not last."""
    replaced: Array = step.generated & (step.predicted != step.tokens)
    return replaced
