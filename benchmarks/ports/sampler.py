"""A sampler in plain Python, written from docs/golden-vectors.md and docs/decoding.md.

It takes the golden numbers and a function to logits, one sequence at a time, in lists and floats:
what a port in any language does.  Nothing of marref's is used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Numbers = Sequence[float]
LogitsAt = Callable[[int, list[int]], Sequence[Numbers]]
"""``(step, tokens)`` to the logits of each position."""

_NOTHING = -math.inf


def cosine(num_masked: int, num_steps: int) -> list[int]:
    """How many each step reveals."""
    num_steps = min(num_steps, num_masked)
    counts, masked = [], num_masked
    for step in range(1, num_steps + 1):
        # The cosine of π/3 is a half, of which floating point may fall short.
        half = 3 * step == 2 * num_steps
        ratio = 0.5 if half else math.cos(math.pi * step / (2 * num_steps))
        left = 0 if step == num_steps else min(masked - 1, math.floor(num_masked * ratio))
        counts.append(masked - left)
        masked = left
    return counts


def softmax(logits: Numbers, temperature: float, excluded: set[int]) -> list[float]:
    """Probabilities; 0 for what is excluded."""
    largest = max(z for i, z in enumerate(logits) if i not in excluded)
    weights = [
        0.0 if i in excluded else math.exp((z - largest) / temperature)
        for i, z in enumerate(logits)
    ]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def kept_ids(p: Numbers, options: Mapping[str, Any]) -> set[int]:
    """The ids that may be drawn."""
    falling = sorted((i for i in range(len(p)) if p[i] > 0), key=lambda i: -p[i])
    kept = set(falling[: options.get("top_k", len(p))])
    if "top_p" in options:
        before = 0.0
        for i in falling:
            if before >= options["top_p"]:
                kept.discard(i)
            before += p[i]
    return {i for i in kept if p[i] >= options.get("min_p", 0.0) * max(p)}


def drawn_id(p: Numbers, kept: set[int], uniform: float) -> int:
    """The first id whose cumulative probability, of what is kept, is above the number."""
    bound = uniform * math.fsum(p[i] for i in kept)
    cumulative = 0.0
    for i in sorted(kept):
        cumulative += p[i]
        if cumulative > bound:
            return i
    return max(kept)


def score_of(p: Numbers, confidence: float, order: str) -> float:
    """What positions are ordered by."""
    if order == "margin":
        second, first = sorted(p)[-2:]
        return math.log(first - second) if first > second else -math.inf
    if order == "entropy":
        return math.fsum(x * math.log(x) for x in p if x > 0)
    return math.log(confidence)


def halton(length: int) -> list[int]:
    """The place of each cell in the order of first visits."""
    side = math.isqrt(length)
    places: dict[int, int] = {}
    index = 0
    while len(places) < length:
        index += 1
        cell = 0
        for base in (2, 3):
            left, part, inverse = index, 1, 0
            while left:
                left, digit = divmod(left, base)
                part, inverse = part * base, inverse * base + digit
            cell = cell * side + side * inverse // part
        places.setdefault(cell, len(places))
    return [places[cell] for cell in range(length)]


class Sampler:
    """One sequence, and the numbers of one sampler for it.

    Parameters
    ----------
    options : dict
        From the metadata's ``samplers``.
    start : list of int
    numbers : dict of str to list [steps] of list [length]
        ``uniforms``, and where they are there ``order_uniforms``, ``noise``, ``remask_uniforms``.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        start: Sequence[int],
        numbers: Mapping[str, Sequence[Numbers]],
    ) -> None:
        self.options, self.numbers = options, numbers
        self.tokens = list(start)
        self.unknown = {i for i, token in enumerate(start) if token == 0}
        self.masked = set(self.unknown)
        self.confidence = [1.0] * len(start)
        self.reveal: dict[str, Any] = options.get("reveal", {})
        self.remask: dict[str, Any] = options.get("remask", {})
        self.order = options.get("order", "confidence")
        self.steps: int = options["num_steps"]
        self.step = 0
        self.blocks, self.counts = self.plan()
        self.planned = 0
        self.edited = True

    def plan(self) -> tuple[list[int], list[list[int]]]:
        """The block of each position, and the counts of each block."""
        first = min(self.unknown, default=0)
        size = self.options.get("block_length", len(self.tokens))
        blocks = [max(i - first, 0) // size for i in range(len(self.tokens))]
        counts: list[list[int]] = [[] for _ in range(max(blocks) + 1)]
        to_fill = sorted({blocks[i] for i in self.unknown})
        for place, block in enumerate(to_fill):
            share = self.steps // len(to_fill) + (place < self.steps % len(to_fill))
            masked = sum(blocks[i] == block for i in self.unknown)
            counts[block] = cosine(masked, share)
        return blocks, counts

    def take(self, logits_at: LogitsAt) -> dict[str, Any]:
        """Take a step; return all that the golden vectors have of it."""
        logits = logits_at(self.step, list(self.tokens))
        self.step += 1
        rule = self.remask.get("rule")
        active = bool(self.masked) or (rule or "").startswith("remdm")
        active |= rule == "edit" and bool(self.unknown) and self.edited
        generated = self.unknown - self.masked if active else set()
        block = min((self.blocks[i] for i in self.masked), default=0)
        masked = {i for i in self.masked if self.blocks[i] == block}
        looks_again = rule in ("p2", "edit")
        wanted = masked | generated if looks_again else masked
        ranked = masked | generated if rule == "p2" else masked

        predicted, confidence, score = self.predict(logits, wanted, generated)
        priority = {i: self.priority(i, score[i], confidence) for i in ranked}
        count = min(self.count(masked, confidence, score, priority), len(ranked))
        chosen = set(sorted(ranked, key=lambda i: (-priority[i], i))[:count])
        revealed = chosen & masked
        back = self.taken_back(generated, chosen, confidence)
        replaced = {
            i
            for i in (generated if rule == "edit" else ())
            if predicted[i] != self.tokens[i] and confidence[i] > self.remask["bound"]
        }
        for i in revealed | replaced:
            self.tokens[i] = predicted[i]
        for i in back:
            self.tokens[i] = 0
        for i in ranked | replaced:
            self.confidence[i] = confidence[i]
        self.masked = self.masked - revealed | back
        self.edited = bool(revealed | replaced)
        positions = range(len(self.tokens))
        return {
            "score": [score.get(i, _NOTHING) for i in positions],
            "count": count,
            "revealed": [i in revealed for i in positions],
            "taken_back": [i in back for i in positions],
            "replaced": [i in replaced for i in positions],
            "tokens": list(self.tokens),
            "mask": [i in self.masked for i in positions],
            "confidence": list(self.confidence),
        }

    def predict(
        self, logits: Sequence[Numbers], wanted: set[int], generated: set[int]
    ) -> tuple[dict[int, int], dict[int, float], dict[int, float]]:
        """Tokens, confidences and scores where they are wanted."""
        excluded = {0, *self.options.get("exclude_ids", ())}
        temperature = self.options.get("temperature", 1.0)
        uniforms = self.numbers["uniforms"][self.step - 1]
        predicted: dict[int, int] = {}
        confidence = {i: self.confidence[i] for i in generated}
        score: dict[int, float] = {}
        for i in wanted:
            p = softmax(logits[i], temperature, excluded)
            if i not in generated:
                predicted[i] = drawn_id(p, kept_ids(p, self.options), uniforms[i])
            elif self.remask["rule"] == "edit":
                predicted[i] = max(range(len(p)), key=p.__getitem__)
            else:
                predicted[i] = self.tokens[i]
            p = softmax(logits[i], self.options.get("score_temperature", temperature), excluded)
            confidence[i] = p[predicted[i]]
            score[i] = score_of(p, confidence[i], self.order)
        return predicted, confidence, score

    def priority(self, i: int, score: float, confidence: Mapping[int, float]) -> float:
        """What positions are sorted by."""
        now = {key: steps[self.step - 1] for key, steps in self.numbers.items()}
        if self.order == "random":
            return now["order_uniforms"][i]
        if self.order == "left-to-right":
            return -float(i)
        if self.order == "halton":
            return -float(halton(len(self.tokens))[i])
        if "choice_temperature" in self.options:
            rounds = sum(map(len, self.counts))
            scale = float(self.options["choice_temperature"]) * (1.0 - min(self.step / rounds, 1.0))
            return score + scale * now["noise"][i]
        if "order_temperature" in self.options:
            shown = score if self.order == "entropy" else math.exp(score)
            return shown / float(self.options["order_temperature"]) + now["noise"][i]
        return score

    def count(
        self,
        masked: set[int],
        confidence: Mapping[int, float],
        score: Mapping[int, float],
        priority: Mapping[int, float],
    ) -> int:
        """How many are revealed."""
        rule = self.remask.get("rule", "")
        if rule == "p2":
            size = len(self.unknown)
            return size - size * (self.steps - self.step) // self.steps
        if rule.startswith("remdm"):
            time, _, alpha, after = self.times()
            stays = (1.0 - self.sigma(time)) * alpha
            return sum(priority[i] >= 1.0 - (after - stays) / (1.0 - alpha) for i in masked)
        if not self.reveal:
            return self.quota(masked)
        if not masked:
            return 0
        sure = sorted((confidence[i] for i in masked), reverse=True)
        rule, threshold = self.reveal["rule"], float(self.reveal.get("probability", 1.0))
        if rule == "threshold":
            return max(sum(p >= threshold for p in sure), 1)
        if rule == "quota-or-threshold":
            return max(sum(p > threshold for p in sure), self.quota(masked))
        if rule == "factor":
            passes = [p >= 1.0 - self.reveal["factor"] / (r + 1) for r, p in enumerate(sure, 1)]
            return max([*passes, False].index(False), 1)
        if rule == "independent":
            chance = 1.0 / (self.steps - self.step + 1)
            return sum(priority[i] >= 1.0 - chance for i in masked)
        rising = sorted(-score[i] for i in masked)
        return sum(math.fsum(rising[:k]) <= self.reveal["bound"] for k in range(len(rising)))

    def quota(self, masked: set[int]) -> int:
        """What the schedule says for the next step of the present block."""
        if not masked:
            return 0
        block = self.blocks[min(masked)]
        before = sum(map(len, self.counts[:block]))
        self.planned = max(self.planned, before) + 1
        return self.counts[block][self.planned - before - 1]

    def times(self) -> tuple[float, float, float, float]:
        """t, σ_max, αₜ and αₛ."""
        time, then = 1.0 - (self.step - 1) / self.steps, 1.0 - self.step / self.steps
        alpha, after = self.alpha(time), self.alpha(then)
        return time, min(1.0, (1.0 - after) / alpha) if alpha > 0 else 1.0, alpha, after

    def alpha(self, time: float) -> float:
        """The probability of not being masked."""
        if self.remask["rule"] != "remdm-loop":
            return 1.0 - time
        on, off, top = (float(self.remask[key]) for key in ("t_on", "t_off", "alpha_on"))
        if time > on:
            return (1.0 - time) * top / (1.0 - on)
        return top if time > off else 1.0 - (1.0 - top) * time / off

    def sigma(self, time: float) -> float:
        """σ where masked, and of all but remdm-conf where generated."""
        largest = self.times()[1]
        rule = self.remask["rule"]
        if rule == "remdm-conf":
            return 0.0
        if rule == "remdm-rescale":
            return float(self.remask["eta"] * largest)
        if rule == "remdm-loop" and not self.remask["t_off"] < time <= self.remask["t_on"]:
            return 0.0
        return min(float(self.remask["eta"]), largest)

    def taken_back(
        self, generated: set[int], chosen: set[int], confidence: Mapping[int, float]
    ) -> set[int]:
        """What becomes [MASK] again."""
        rule = self.remask.get("rule", "")
        if rule == "p2":
            return generated - chosen
        if not rule.startswith("remdm"):
            return set()
        time, largest, *_ = self.times()
        sigma = dict.fromkeys(generated, self.sigma(time))
        if rule == "remdm-conf":
            weights = {i: math.exp(-confidence[i]) for i in generated}
            total = math.fsum(weights.values())
            sigma = {i: largest * weight / total for i, weight in weights.items()}
        uniforms = self.numbers["remask_uniforms"][self.step - 1]
        return {i for i in generated if uniforms[i] < sigma[i]}


def gumbel(uniforms: Sequence[Numbers]) -> list[list[float]]:
    """Make noise for the order of uniform numbers."""
    return [[-math.log(-math.log(u)) for u in row] for row in uniforms]


def sample(
    options: Mapping[str, Any],
    start: Sequence[int],
    numbers: Mapping[str, Sequence[Numbers]],
    logits_at: LogitsAt,
) -> dict[str, list[Any]]:
    """Take all steps of one sequence; the arrays of the golden vectors, [steps, …].

    Gumbel noise is made of ``order_uniforms``.
    """
    noise: dict[str, list[Any]] = {}
    if "choice_temperature" in options or "order_temperature" in options:
        noise["noise"] = gumbel(numbers["order_uniforms"])
    sampler = Sampler(options, start, {**numbers, **noise})
    steps = [sampler.take(logits_at) for _ in numbers["uniforms"]]
    return noise | {key: [step[key] for step in steps] for key in steps[0]}
