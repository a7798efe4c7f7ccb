"""Fourth question of a step: what is taken back?

By default nothing: what is revealed stays.  A rule may put [MASK] back where something was
generated, or another id.  No rule touches what was known from the start.

| rule | takes back | source |
| --- | --- | --- |
| ReMDMCap, ReMDMRescale, ReMDMConf, ReMDMLoop | each generated token with probability σ | ReMDM |
| P2 | what is least sure of all that has been generated | arXiv 2502.03540; Open-dLLM's code |
| Edit | a token, for another that is surer than a bound | LLaDA 2.1; SGLang's code |

ReMDM is Wang et al. 2025 (arXiv 2503.00307).  Page: docs/decoding.md.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from marref import checks
from marref.decoding.revealing import Step, count_with_chance
from marref.trees import Array


class Remask:
    """A rule that takes nothing back: what others have in common."""

    order: ClassVar[str | None] = None
    """The order that it is defined with, None for any."""
    counts_itself: ClassVar[bool] = False
    """Whether it also says how many are revealed."""
    looks_again: ClassVar[bool] = False
    """Whether what has been generated is predicted again."""
    needs_rng: ClassVar[bool] = False

    def looked_at(self, held: Array, largest: Array) -> Array:
        """Choose between the id that a position holds and the one of largest logit."""
        raise NotImplementedError

    def counts(self, step: Step) -> Array:
        """Count how many of ``step.masked`` are revealed; see ``counts_itself``."""
        raise NotImplementedError

    def taken_back(self, step: Step, chosen: Array, uniforms: Array | None) -> Array:
        """Mark what becomes [MASK] again, of ``step.generated``."""
        return np.zeros_like(step.generated)

    def replaced(self, step: Step) -> Array:
        """Mark what becomes the predicted id instead, of ``step.generated``."""
        return np.zeros_like(step.generated)

    def goes_on(self, number: int, num_steps: int, idle: Array, changed: Array) -> Array:
        """Mark sequences that take step ``number`` although nothing is masked.

        ``idle`` [batch] counts such steps of theirs so far, ``changed`` [batch] is whether the last
        step changed them.
        """
        return np.zeros_like(changed)


class ReMDM(Remask):
    """Generated tokens are taken back with probability σ, and more are revealed to make up for it.

    At time t a token is unmasked with probability α(t) = 1 - t, which MDLM ensures by revealing
    only.  From t to s, with σ at most σ_max = min(1, (1 - α_s)/α_t),

        to [MASK] with probability σ                                       where generated
        revealed with probability (α_s - (1 - σ) α_t) / (1 - α_t)          where masked

    leave α_s unmasked too: α_t (1 - σ) + (1 - α_t) (α_s - (1 - σ) α_t)/(1 - α_t) = α_s.  Takes all
    K steps, of which some may reveal nothing.  Wang et al. 2025 (arXiv 2503.00307, section 4).
    """

    order = "random"
    counts_itself = True
    needs_rng = True

    def alpha(self, time: float) -> float:
        """Compute the probability of being unmasked."""
        return 1.0 - time

    def sigma(self, time: float, largest: float) -> float:
        """Compute σ, at most ``largest``, for masked positions, and by default for all."""
        raise NotImplementedError

    def sigma_of_generated(self, step: Step) -> Array | float:
        """Compute σ of each generated token."""
        return self.sigma(*self._time(step)[:2])

    def counts(self, step: Step) -> Array:
        """Count what each masked position decides by itself."""
        time, largest, alpha, alpha_after = self._time(step)
        stays = (1.0 - self.sigma(time, largest)) * alpha
        return count_with_chance(step, (alpha_after - stays) / (1.0 - alpha))

    def taken_back(self, step: Step, chosen: Array, uniforms: Array | None) -> Array:
        """Mark what a number uniform in [0, 1) below σ takes back."""
        assert uniforms is not None
        back: Array = step.generated & (uniforms < self.sigma_of_generated(step))
        return back

    def goes_on(self, number: int, num_steps: int, idle: Array, changed: Array) -> Array:
        """Take all steps."""
        return np.full_like(changed, number <= num_steps)

    def _time(self, step: Step) -> tuple[float, float, float, float]:
        """Compute t, σ_max, α_t and α_s."""
        left = step.num_steps - step.number
        # One quotient each: 1 - 38/40 is a little more than the 0.05 where ReMDMLoop ends.
        time = (left + 1) / step.num_steps
        alpha, after = self.alpha(time), self.alpha(left / step.num_steps)
        return time, min(1.0, (1.0 - after) / alpha) if alpha > 0 else 1.0, alpha, after


@dataclasses.dataclass(frozen=True)
class ReMDMCap(ReMDM):
    """σ = min(η, σ_max); η = 0.008 in the published code."""

    eta: float = 0.008

    def __post_init__(self) -> None:
        checks.real("ReMDMCap: eta", self.eta, "[0, 1]")

    def sigma(self, time: float, largest: float) -> float:
        """Cap η."""
        return min(self.eta, largest)


@dataclasses.dataclass(frozen=True)
class ReMDMRescale(ReMDM):
    """σ = η σ_max; η = 0.015 in the published code."""

    eta: float = 0.015

    def __post_init__(self) -> None:
        checks.real("ReMDMRescale: eta", self.eta, "[0, 1]")

    def sigma(self, time: float, largest: float) -> float:
        """Scale σ_max."""
        return self.eta * largest


@dataclasses.dataclass(frozen=True)
class ReMDMConf(ReMDM):
    """σ of each token is σ_max times its share of softmax(-p), p its confidence when revealed.

    The softmax goes over the generated tokens of a sequence; masked positions have σ = 0, as in
    the published code.  Since σ is not the same everywhere, α_s holds on average only roughly.
    """

    def sigma(self, time: float, largest: float) -> float:
        """Masked positions are revealed as in MDLM."""
        return 0.0

    def sigma_of_generated(self, step: Step) -> Array:
        """Share σ_max out."""
        weights = np.where(step.generated, np.exp(-step.confidence.astype(np.float64)), 0.0)
        total = np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        sigma: Array = self._time(step)[1] * weights / total
        return sigma


@dataclasses.dataclass(frozen=True)
class ReMDMLoop(ReMDM):
    """α stays at alpha_on from time t_on to t_off, while tokens are taken back with σ = η.

    Before, α rises to alpha_on as fast as it takes, and after it to 1, without taking back.
    Constants of the published code.  There α overshoots in the one step that crosses t_on, which
    here it does not.
    """

    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self) -> None:
        checks.real("ReMDMLoop: eta", self.eta, "[0, 1]")
        checks.real("ReMDMLoop: t_on", self.t_on, "(0, 1)")
        checks.real("ReMDMLoop: t_off", self.t_off, "(0, 1)")
        checks.real("ReMDMLoop: alpha_on", self.alpha_on, "(0, 1)")
        if self.t_off >= self.t_on:
            raise ValueError(
                f"ReMDMLoop: t_off: received {self.t_off}, expected less than t_on = {self.t_on}"
            )

    def alpha(self, time: float) -> float:
        """Rise, stay, rise."""
        if time > self.t_on:
            return (1.0 - time) * self.alpha_on / (1.0 - self.t_on)
        return 1.0 - (1.0 - self.alpha_on) * min(1.0, time / self.t_off)

    def sigma(self, time: float, largest: float) -> float:
        """Take back between t_on and t_off only."""
        return min(self.eta, largest) if self.t_off < time <= self.t_on else 0.0


@dataclasses.dataclass(frozen=True)
class P2(Remask):
    """All that is not known is scored, and the floor(N (1 - k/K)) lowest are masked after step k.

    A generated token is scored as the token that it is, given all others.  Peng et al. 2025 (path
    planning, arXiv 2502.03540), in the form of Open-dLLM's published code.  K may exceed N: some
    steps then reveal no more than they take back.  Takes as many steps as the count needs to come
    to 0, at most K.
    """

    counts_itself = True
    looks_again = True

    def looked_at(self, held: Array, largest: Array) -> Array:
        """Score what is there."""
        return held

    def counts(self, step: Step) -> Array:
        """Count what stays unmasked, of masked and generated positions together."""
        left = step.num_unknown * (step.num_steps - step.number) // step.num_steps
        kept: Array = step.num_unknown - left
        return kept

    def taken_back(self, step: Step, chosen: Array, uniforms: Array | None) -> Array:
        """Mark what is not among them."""
        back: Array = step.generated & ~chosen
        return back


@dataclasses.dataclass(frozen=True)
class Edit(Remask):
    """A generated token is replaced where the arg max is another id and has p > bound.

    In every step, and in up to 16 further ones once nothing is masked, as long as something
    changes.  LLaDA 2.1 in SGLang's published code (JointThreshold), where ``bound`` is a setting;
    0.9 is that of dllm.
    """

    bound: float = 0.9
    looks_again = True
    max_further_steps: ClassVar[int] = 16

    def __post_init__(self) -> None:
        checks.real("Edit: bound", self.bound, "[0, 1]")

    def looked_at(self, held: Array, largest: Array) -> Array:
        """Score the arg max."""
        return largest

    def replaced(self, step: Step) -> Array:
        """Mark what another id is surer for."""
        surer = step.confidence > self.bound
        replaced: Array = step.generated & (step.predicted != step.tokens) & surer
        return replaced

    def goes_on(self, number: int, num_steps: int, idle: Array, changed: Array) -> Array:
        """Go on while it changes something."""
        further: Array = changed & (idle < self.max_further_steps)
        return further


REMASKS = {
    "remdm-cap": ReMDMCap,
    "remdm-rescale": ReMDMRescale,
    "remdm-conf": ReMDMConf,
    "remdm-loop": ReMDMLoop,
    "p2": P2,
    "edit": Edit,
}
