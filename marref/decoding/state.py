"""One step of the decoder: from what is predicted and what is drawn to the next state.

All that chance decides is drawn beforehand (`Chance`), so that what follows is a function: whoever
gives it all numbers that could be drawn sees all that could happen, and another implementation that
is given the same numbers must do the same.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import numpy as np

from marref import checks
from marref.decoding import planning
from marref.decoding.ordering import choose, draw_noise, rank
from marref.decoding.predicting import Prediction
from marref.decoding.revealing import Independent, Step
from marref.decoding.rule import Rule
from marref.trees import Array


class View(NamedTuple):
    """Where a step predicts, and how much the schedule reveals."""

    masked: Array
    """[batch, length]; masked, and in the present block of its sequence."""
    generated: Array
    """[batch, length]; revealed before, in a sequence that takes this step."""
    wanted: Array
    """[batch, length]; where something is predicted."""
    ranked: Array
    """[batch, length]; where something may be chosen."""
    quota: Array
    """[batch]; how many the schedule reveals, 0 where it is not asked or has come to its end."""
    plan_step: Array
    """[batch]; the step of the plan that this is, from 0."""


class Chance(NamedTuple):
    """What is drawn for a step, each float64 [batch, length], NaN where nothing is, or None."""

    uniforms: Array | None = None
    """In [0, 1), for the tokens that are drawn."""
    noise: Array | None = None
    """For the order, see `marref.decoding.ordering.draw_noise`."""
    remask_uniforms: Array | None = None
    """In [0, 1), for what is taken back."""

    @classmethod
    def draw(cls, rule: Rule, view: View, rng: np.random.Generator | None) -> Self:
        """Draw in the order of the fields, the positions row by row."""
        if rng is None:
            return cls()
        uniforms = np.full(view.wanted.shape, np.nan)
        uniforms[view.wanted] = rng.random(view.wanted.sum())
        noise = draw_noise(view.ranked, rule, rng)
        takes_back = rule.remask is not None and rule.remask.needs_rng
        return cls(uniforms, noise, rng.random(uniforms.shape) if takes_back else None)


@dataclasses.dataclass
class State:
    """Where a decoder stands between two steps; arrays [batch, length] or [batch]."""

    rule: Rule
    plan: planning.Plan
    unknown: Array
    """What was masked at the start: all that may change."""
    tokens: Array
    masked: Array
    confidence: Array
    """Of what has been revealed, and of the latest prediction elsewhere; 1 where known."""
    planned: Array
    """How many steps of the plan are behind each sequence."""
    idle: Array
    """How many steps it has taken with nothing masked."""
    changed: Array
    """Whether its last step changed it."""
    number: int = 1
    """Of the step to come."""

    @classmethod
    def start(cls, tokens: Array, rule: Rule, dtype: np.dtype[Any]) -> Self:
        """Begin with what is known."""
        masked = tokens == rule.mask_token_id
        plan = planning.make(rule, masked)
        ones, zeros = np.ones(tokens.shape, dtype), np.zeros(len(tokens), np.int64)
        return cls(rule, plan, masked, tokens, masked, ones, zeros, zeros, zeros > 0)

    def busy(self) -> Array:
        """Mark the sequences that take another step."""
        rule = self.rule
        busy: Array = np.any(self.masked, axis=1)
        if rule.keeps_to_schedule:
            busy = self.planned < self.plan.num_rounds
        if rule.remask is not None:
            more = rule.remask.goes_on(self.number, rule.num_steps, self.idle, self.changed)
            busy = busy | (more & self.unknown.any(axis=1))
        return busy

    def look(self) -> View:
        """Find out where the next step predicts."""
        remask = self.rule.remask
        masked, index, quota = self.plan.look(self.masked, self.planned)
        generated = self.unknown & ~self.masked & self.busy()[:, np.newaxis]
        wanted = masked | generated if remask is not None and remask.looks_again else masked
        ranked = wanted if remask is not None and remask.counts_itself else masked
        return View(masked, generated, wanted, ranked, quota, index)

    def advance(self, view: View, prediction: Prediction, chance: Chance) -> dict[str, Array]:
        """Take a step, and return all that it looked at, decided and led to."""
        step = self._step(view, prediction, chance)
        count = np.minimum(self._count(step), view.ranked.sum(axis=1))
        chosen = choose(step.priority, count) & view.ranked
        revealed = chosen & view.masked
        taken_back = replaced = np.zeros_like(revealed)
        if self.rule.remask is not None:
            taken_back = self.rule.remask.taken_back(step, chosen, chance.remask_uniforms)
            replaced = self.rule.remask.replaced(step)

        tokens = np.where(revealed | replaced, step.predicted, self.tokens)
        tokens = np.where(taken_back, self.rule.mask_token_id, tokens)
        self.idle = self.idle + ~self.masked.any(axis=1)
        self.changed = np.any(revealed | taken_back | replaced, axis=1)
        self.confidence = np.where(view.ranked | replaced, step.confidence, self.confidence)
        self.masked = self.masked & ~revealed | taken_back
        self.planned = view.plan_step + 1
        self.tokens, self.number = tokens, self.number + 1
        drawn = {name: array for name, array in chance._asdict().items() if array is not None}
        return {
            "tokens": tokens,
            "mask": self.masked,
            "confidence": self.confidence,
            "score": step.score,
            "count": count,
            "revealed": revealed,
            "taken_back": taken_back,
            "replaced": replaced,
            **drawn,
        }

    def _step(self, view: View, prediction: Prediction, chance: Chance) -> Step:
        """Put predictions where they belong, and rank them."""
        rule, dtype = self.rule, self.confidence.dtype
        predicted, confidence = self.tokens.copy(), self.confidence.copy()
        score = np.full(self.tokens.shape, -np.inf, dtype)
        predicted[view.wanted] = prediction.tokens
        confidence[view.wanted] = np.exp(prediction.log_confidence)
        score[view.wanted] = prediction.score
        rounds = self.plan.num_rounds if rule.keeps_to_schedule else rule.num_steps
        progress = np.minimum(np.full(len(score), self.number) / np.maximum(rounds, 1), 1.0)
        return Step(
            number=self.number,
            num_steps=rule.num_steps,
            quota=view.quota,
            masked=view.masked,
            generated=view.generated,
            num_unknown=self.unknown.sum(axis=1),
            tokens=self.tokens,
            predicted=predicted,
            confidence=confidence,
            score=score,
            priority=rank(score, view.ranked, progress, rule, chance.noise),
        )

    def _count(self, step: Step) -> Array:
        """Say how many are revealed."""
        rule = self.rule
        if rule.remask is not None and rule.remask.counts_itself:
            return rule.remask.counts(step)
        if isinstance(rule.reveal, Independent):
            return rule.reveal(step)
        return step.quota if rule.reveal is None else checked(rule.reveal(step), step)


def checked(count: Array, step: Step) -> Array:
    """Return what a rule said, unless it would reveal nothing: the decoder might never end."""
    count = checks.array("reveal", count)
    masked = step.masked.sum(axis=1)
    if count.dtype.kind not in "iu" or count.shape != masked.shape:
        raise TypeError(
            f"reveal: returned {count!r}, expected integers of shape [{len(masked)}], one a "
            "sequence"
        )
    if ((count < 1) & (masked > 0)).any():
        raise ValueError(
            f"reveal: returned {count!r} in step {step.number}, expected at least 1 wherever "
            "something is masked"
        )
    return count
