"""Third question of a step: how many are revealed now?

Either the schedule says so, before anything is predicted (`marref.schedules`), or a rule that looks
at the predictions.  A rule is called with a `Step` and returns a number for each sequence; as many
are revealed, those of highest priority.  The rules below:

| rule | reveals | source |
| --- | --- | --- |
| Threshold | all with p >= t, at least one | Fast-dLLM (arXiv 2505.22618) |
| QuotaOrThreshold | all with p > t, at least as many as the schedule says | diffusers' code |
| Factor | the longest run of falling p with pᵣ >= 1 - f/(r + 1), at least one | Fast-dLLM |
| EntropyBounded | of rising entropies the most with ΣH - max H <= γ | arXiv 2505.24857 |
| Independent | each by itself, with probability (t - s)/t | MDLM (arXiv 2406.07524), Dream |

Page: docs/decoding.md.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import numpy as np

from marref import checks
from marref.trees import Array


@dataclasses.dataclass(frozen=True)
class Step:
    """What a rule sees of a step."""

    number: int
    """k, from 1."""
    num_steps: int
    """K, as `iterative_decode` was told."""
    quota: Array
    """[batch]; how many the schedule reveals, 0 where it is not asked or has come to its end."""
    masked: Array
    """[batch, length]; where something may be revealed: masked, and in the present block."""
    generated: Array
    """[batch, length]; where something has been revealed, of sequences that still change."""
    num_unknown: Array
    """[batch]; N, how many were masked at the start."""
    tokens: Array
    """[batch, length]; before the step."""
    predicted: Array
    """[batch, length]; the predicted ids, where there is a prediction."""
    confidence: Array
    """[batch, length]; p of the predicted id; where nothing is predicted, that with which the id
    that is there was revealed, and 1 where it was known."""
    score: Array
    """[batch, length]; see `marref.decoding.ordering.score`."""
    priority: Array
    """[batch, length]; see `marref.decoding.ordering.rank`."""


Reveal: TypeAlias = Callable[[Step], Array]


def _falling(values: Array, masked: Array) -> Array:
    """Sort each row from the largest to the smallest, -inf where nothing is masked."""
    falling: Array = -np.sort(np.where(masked, -values, np.inf), axis=1)
    return falling


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Reveal all that the model is sure of, and the surest if there is none: p >= t.

    Wu et al. 2025 (Fast-dLLM, arXiv 2505.22618, published code, where t = 0.9); the default of
    engines that serve such models.  N masked positions take at most N steps.
    """

    probability: float = 0.9
    order: ClassVar[str] = "confidence"
    asks_schedule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.real("Threshold: probability", self.probability, "[0, 1]")

    def __call__(self, step: Step) -> Array:
        """Count, at least 1."""
        sure = step.masked & (step.confidence >= self.probability)
        count: Array = np.maximum(sure.sum(axis=1), 1)
        return count


@dataclasses.dataclass(frozen=True)
class QuotaOrThreshold:
    """Reveal all with p > t if these are at least as many as the schedule says, else so many.

    The BlockRefinementScheduler of diffusers, where t = 0.95.  At most as many steps as the
    schedule's.
    """

    probability: float = 0.95
    order: ClassVar[str] = "confidence"
    asks_schedule: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.real("QuotaOrThreshold: probability", self.probability, "[0, 1]")

    def __call__(self, step: Step) -> Array:
        """Count, at least the quota."""
        sure = step.masked & (step.confidence > self.probability)
        count: Array = np.maximum(sure.sum(axis=1), step.quota)
        return count


@dataclasses.dataclass(frozen=True)
class Factor:
    """Reveal the longest run of falling p₁ >= p₂ >= … with pᵣ >= 1 - f/(r + 1); p₁ always.

    Wu et al. 2025 (Fast-dLLM, arXiv 2505.22618, published code, where f = 1): the more are revealed
    together, the surer each must be.  The published code also reveals the last masked position
    where it alone falls short.
    """

    factor: float = 1.0
    order: ClassVar[str] = "confidence"
    asks_schedule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.real("Factor: factor", self.factor, "(0, inf)")

    def __call__(self, step: Step) -> Array:
        """Count, at least 1."""
        falling = _falling(step.confidence, step.masked)
        bounds = 1.0 - self.factor / (np.arange(falling.shape[1]) + 2.0)
        # Bounds rise while p falls: what comes behind the first that fails, fails.
        count: Array = np.maximum((falling >= bounds).sum(axis=1), 1)
        return count


@dataclasses.dataclass(frozen=True)
class EntropyBounded:
    """Reveal the k positions of lowest entropy, k the largest with H₁ + … + H_k - max H <= γ.

    Ben-Hamu et al. 2025 (arXiv 2505.24857); γ = 0.1 in the EntropyBoundScheduler of diffusers.  In
    nats.  The bound is on the mutual information of what is revealed together.  In rising order
    H_k is the largest: the sum of those before it must not exceed γ, which for k = 1 is always so.
    """

    bound: float = 0.1
    order: ClassVar[str] = "entropy"
    asks_schedule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.real("EntropyBounded: bound", self.bound, "[0, inf)")

    def __call__(self, step: Step) -> Array:
        """Count, at least 1."""
        rising = -_falling(step.score, step.masked)
        before = np.zeros_like(rising)
        before[:, 1:] = np.cumsum(rising[:, :-1], axis=1)
        count: Array = (before <= self.bound).sum(axis=1)
        return count


@dataclasses.dataclass(frozen=True)
class Independent:
    """Reveal each masked position with probability (t - s)/t, whatever the others do.

    From t = 1 - (k - 1)/K to s = 1 - k/K that is 1/(K - k + 1), and in the last step 1.  Sahoo et
    al. 2024 (MDLM, arXiv 2406.07524), whose published code goes down to t = 1e-5 and then reveals
    the rest; Dream's "origin" goes to 1e-3.  A step may reveal nothing.
    """

    order: ClassVar[str] = "random"
    asks_schedule: ClassVar[bool] = False

    def __call__(self, step: Step) -> Array:
        """Count the masked positions whose number, uniform in [0, 1), is among the largest."""
        left = max(step.num_steps - step.number + 1, 1)  # Edit may add steps with nothing masked.
        return count_with_chance(step, 1.0 / left)


def count_with_chance(step: Step, chance: float) -> Array:
    """Count the masked positions of which each is revealed with this probability."""
    count: Array = (step.masked & (step.priority >= 1.0 - chance)).sum(axis=1)
    return count


REVEALS = {
    "threshold": Threshold,
    "quota-or-threshold": QuotaOrThreshold,
    "factor": Factor,
    "entropy-bounded": EntropyBounded,
    "independent": Independent,
}
