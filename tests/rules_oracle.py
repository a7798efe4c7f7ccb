"""The decoder's rules by the book: all that may happen, each with its probability, in fractions.

Written from the rules as they are published, for one sequence of a few positions and ids, without
arrays and without the package.  Id 0 is [MASK].  A model is a function of a tuple of ids to a
list of p for each position, p a list of the probabilities of all ids with p[0] = 0.  What comes of
decoding is a history: the tuple of the sequences before the first step and after every step, and a
distribution is a dict of outcomes to probabilities.  Where a rule is rational, all is a Fraction,
also a power with a whole exponent; else Python makes it a float.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from fractions import Fraction

MASK = 0


@dataclasses.dataclass(frozen=True)
class Rule:
    """What marref.decoding calls by the same names; ``reveal`` and ``remask`` are name, *numbers.

    ``draws`` False is decoding without rng: tokens are the arg max.
    """

    num_steps: int = 3
    draws: bool = True
    temperature: Fraction = Fraction(1)
    score_temperature: Fraction | None = None
    top_k: int | None = None
    top_p: Fraction | None = None
    min_p: Fraction | None = None
    exclude_ids: tuple = ()
    order: str = "confidence"
    choice_temperature: Fraction = Fraction(0)
    order_temperature: Fraction = Fraction(0)
    reveal: tuple = ("linear",)
    block_length: int | None = None
    remask: tuple = ("none",)


def histories(rule, model, start):
    """The distribution of the histories of decoding."""
    ended, running = defaultdict(Fraction), {(start,): Fraction(1)}
    while running:
        longer = defaultdict(Fraction)
        for history, chance in running.items():
            if not goes_on(rule, history):
                ended[history] += chance
                continue
            for tokens, share in step(rule, model, history).items():
                longer[*history, tokens] += chance * share
        running = longer
    return ended


def results(histories):
    """The distribution of what decoding returns."""
    last = defaultdict(Fraction)
    for history, chance in histories.items():
        last[history[-1]] += chance
    return last


def goes_on(rule, history):
    """ReMDM takes K steps; an edit that changed something is followed by another step, up to 16."""
    if MASK not in history[0]:
        return False
    if rule.remask[0].startswith("remdm"):
        return len(history) <= rule.num_steps
    idle = sum(MASK not in tokens for tokens in history[:-1])
    edits = rule.remask[0] == "edit" and history[-1] != history[-2:][0] and idle < 16
    return MASK in history[-1] or edits


def step(rule, model, history):
    """The distribution of the sequence after the next step."""
    tokens, rows = history[-1], [without(rule.exclude_ids, p) for p in model(history[-1])]
    masked = positions(tokens, lambda token: token == MASK)
    generated = [i for i in positions(history[0], lambda token: token == MASK) if i not in masked]
    if rule.block_length is not None:
        masked = present_block(rule, history)
    scores = [scored(rule, p) for p in rows]
    outcomes = defaultdict(Fraction)
    for ids, chance in product({i: drawn(rule, rows[i]) for i in masked}):
        held = {i: tokens[i] for i in generated} if rule.remask[0] == "p2" else {}
        value = {i: score(rule, scores[i], token) for i, token in (ids | held).items()}
        sure = {i: scores[i][token] for i, token in ids.items()}
        for chosen, share in chosen_sets(rule, history, value, sure).items():
            after = list(tokens)
            for i in masked:
                after[i] = ids[i] if i in chosen else MASK
            for last, rest in taken_back(rule, model, history, generated, chosen, after).items():
                outcomes[last] += chance * share * rest
    return outcomes


# What would each position be?


def drawn(rule, p):
    """The distribution of the token of a position."""
    if not rule.draws or rule.temperature == 0:
        return {arg_max(p): Fraction(1)}
    p = tempered(p, rule.temperature)
    falling = sorted(range(len(p)), key=lambda token: (-p[token], token))
    kept = set(falling)
    if rule.top_k is not None:
        kept &= set(falling[: rule.top_k])
    if rule.top_p is not None:
        sizes = range(1, len(p) + 1)
        smallest = next(n for n in sizes if sum(p[t] for t in falling[:n]) >= rule.top_p)
        kept &= set(falling[:smallest])
    if rule.min_p is not None:
        kept &= {token for token in falling if p[token] >= rule.min_p * max(p)}
    total = sum(p[token] for token in kept)
    return {token: p[token] / total for token in kept if p[token] > 0}


def scored(rule, p):
    """The distribution that says how sure the model is: all of it, whatever may be drawn."""
    return tempered(p, rule.score_temperature or rule.temperature or 1)


def arg_max(p):
    """The most probable id, of equals the lowest."""
    return max(range(len(p)), key=lambda token: (p[token], -token))


def tempered(p, temperature):
    """softmax(log p / T): p^(1/T), divided by its sum."""
    powers = [q ** (1 / Fraction(temperature)) if q > 0 else Fraction(0) for q in p]
    return [power / sum(powers) for power in powers]


def without(excluded, p):
    """p of the other ids, divided by its sum."""
    left = [Fraction(0) if token in excluded else q for token, q in enumerate(p)]
    return [q / sum(left) for q in left]


# Which come first, and how many now?


def score(rule, p, token):
    """The number of which the largest come first."""
    if rule.order == "margin":
        second, first = sorted(p)[-2:]
        return first - second
    if rule.order == "entropy":
        return sum(q * math.log(q) for q in p if q > 0)
    return p[token]


def chosen_sets(rule, history, value, sure):
    """The distribution of the set of positions that are revealed (with P2: that are not masked)."""
    chance = chance_to_be_revealed(rule, len(history))
    if chance is not None:
        return subsets(dict.fromkeys(sure, chance))
    count = min(how_many(rule, history, value, sure), len(value))
    weights = order_weights(rule, history, value)
    if weights is not None:
        return drawn_one_by_one(weights, count)
    if rule.order == "left-to-right":
        value = {i: -i for i in value}
    if rule.order == "halton":
        places = halton(math.isqrt(len(history[0])))
        value = {i: -places.index(i) for i in value}
    first = sorted(value, key=lambda i: (-value[i], i))
    return {frozenset(first[:count]): Fraction(1)}


def order_weights(rule, history, value):
    """Weights by which positions are drawn one by one; None where the largest values come first.

    The largest of log w + Gumbel noise is a draw by the weights w, and so is the next largest
    among the others.  So noise scaled by a = c (1 - k/K) makes w = value^(1/a), or exp(value/a) of
    an entropy.
    """
    if rule.order == "random":
        return dict.fromkeys(value, Fraction(1))
    if rule.order_temperature:
        return {i: math.exp(value[i] / rule.order_temperature) for i in value}
    annealed = rule.choice_temperature * (1 - Fraction(len(history), steps_planned(rule, history)))
    if annealed == 0:
        return None
    if rule.order == "entropy":
        return {i: math.exp(value[i] / annealed) for i in value}
    return {i: value[i] ** (1 / annealed) for i in value}


def how_many(rule, history, value, sure):
    """The number of positions that are revealed."""
    name, *numbers = rule.reveal
    falling = sorted(sure.values(), reverse=True)
    if rule.remask[0] == "p2":
        unknown = history[0].count(MASK)
        return unknown - unknown * (rule.num_steps - len(history)) // rule.num_steps
    if not sure:
        return 0
    if name == "threshold":
        return max(1, sum(p >= numbers[0] for p in falling))
    if name == "quota-or-threshold":
        return max(quota(rule, history), sum(p > numbers[0] for p in falling))
    if name == "factor":
        short = (r for r, p in enumerate(falling, 1) if p < 1 - numbers[0] / Fraction(r + 1))
        return max(1, next(short, len(falling) + 1) - 1)
    if name == "entropy-bounded":
        rising = sorted(-h for h in value.values())
        sizes = range(1, len(rising) + 1)
        return max(k for k in sizes if k == 1 or sum(rising[:k]) - max(rising[:k]) <= numbers[0])
    return quota(rule, history)


def chance_to_be_revealed(rule, number):
    """The probability with which each masked position is revealed by itself; None if they are not.

    MDLM: (t - s)/t.  ReMDM: (α_s - (1 - σ) α_t)/(1 - α_t); its "conf" has σ = 0 here.
    """
    if rule.reveal[0] == "independent":
        left = rule.num_steps - number + 1
        return Fraction(1, left) if left > 0 else Fraction(1)
    if rule.remask[0].startswith("remdm"):
        alpha, after, sigma, _ = remdm(rule, number)
        return (after - (1 - sigma) * alpha) / (1 - alpha)
    return None


def drawn_one_by_one(weights, count):
    """Draw positions without replacement."""
    sets = defaultdict(Fraction)
    for order in itertools.permutations(weights, count):
        chance, left = Fraction(1), dict(weights)
        for i in order:
            chance *= left[i] / sum(left.values())
            del left[i]
        sets[frozenset(order)] += chance
    return sets


# Schedules and blocks


def linear(num_masked, num_steps):
    """round((1 - k/K) N) stay masked, halves away from 0."""
    steps = min(num_masked, num_steps)
    left = [
        math.floor(Fraction(num_masked * (steps - k), steps) + Fraction(1, 2))
        for k in range(steps + 1)
    ]
    return [before - after for before, after in itertools.pairwise(left)]


def plan(rule, start):
    """(block, count) of every step: blocks of so many positions from the first masked one on."""
    blocks = [block_of(rule, start, i) for i in positions(start, lambda token: token == MASK)]
    to_fill = sorted(set(blocks))
    steps = []
    for place, block in enumerate(to_fill):
        share = rule.num_steps // len(to_fill) + (place < rule.num_steps % len(to_fill))
        steps += [(block, count) for count in linear(blocks.count(block), share)]
    return steps


def block_of(rule, start, i):
    return max(i - start.index(MASK), 0) // (rule.block_length or len(start))


def present_block(rule, history):
    """The masked positions of the first block that has any."""
    masked = positions(history[-1], lambda token: token == MASK)
    blocks = {i: block_of(rule, history[0], i) for i in masked}
    return [i for i in masked if blocks[i] == min(blocks.values())]


def quota(rule, history):
    """What the schedule says of this step; what it says of a block that is full is left out."""
    steps, taken = plan(rule, history[0]), 0
    for tokens in history:
        block = block_of(rule, history[0], present_block(rule, (history[0], tokens))[0])
        taken = max(taken, min(i for i, (of, _) in enumerate(steps) if of == block)) + 1
    return steps[taken - 1][1]


def steps_planned(rule, history):
    return rule.num_steps if rule.remask[0] == "p2" else len(plan(rule, history[0]))


def halton(side):
    """The cells of a grid, row by row, in the order of the first visits of (φ₂(i), φ₃(i))."""
    cells, index = [], 0
    while len(cells) < side * side:
        index += 1
        row, column = (math.floor(side * radical_inverse(index, base)) for base in (2, 3))
        if row * side + column not in cells:
            cells.append(row * side + column)
    return cells


def radical_inverse(index, base):
    """Van der Corput: the digits of a number behind the point, the last one first."""
    if index == 0:
        return Fraction(0)
    return Fraction(index % base, base) + radical_inverse(index // base, base) / base


# What is taken back?


def taken_back(rule, model, history, generated, chosen, after):
    """The distribution of the sequence once something is taken back of what was generated before.

    ``after`` is the sequence with what is revealed.
    """
    name, *numbers = rule.remask
    if name == "p2":
        lost = [i for i in generated if i not in chosen]
        return {tuple(MASK if i in lost else token for i, token in enumerate(after)): Fraction(1)}
    if name == "edit":
        for i in generated:
            p = scored(rule, without(rule.exclude_ids, model(history[-1])[i]))
            if p[arg_max(p)] > numbers[0]:
                after[i] = arg_max(p)
    return {
        tuple(MASK if i in lost else token for i, token in enumerate(after)): chance
        for lost, chance in subsets(sigmas(rule, model, history, generated)).items()
    }


def sigmas(rule, model, history, generated):
    """The probability with which each generated token is taken back by itself."""
    if not rule.remask[0].startswith("remdm"):
        return {}
    _, _, sigma, largest = remdm(rule, len(history))
    if rule.remask[0] != "remdm-conf":
        return dict.fromkeys(generated, sigma)
    sure = {i: math.exp(-confidence_when_revealed(rule, model, history, i)) for i in generated}
    return {i: largest * sure[i] / sum(sure.values()) for i in generated}


def remdm(rule, number):
    """α_t, α_s, σ and σ_max of a step from t to s."""
    name, *numbers = rule.remask
    time = 1 - Fraction(number - 1, rule.num_steps)
    alpha, after = (alpha_of(rule, t) for t in (time, time - Fraction(1, rule.num_steps)))
    largest = min(Fraction(1), (1 - after) / alpha) if alpha else Fraction(1)
    if name == "remdm-cap":
        sigma = min(numbers[0], largest)
    elif name == "remdm-rescale":
        sigma = numbers[0] * largest
    elif name == "remdm-conf":
        sigma = Fraction(0)
    else:
        eta, t_on, t_off, _ = numbers
        sigma = min(eta, largest) if t_off < time <= t_on else Fraction(0)
    return alpha, after, sigma, largest


def alpha_of(rule, time):
    """1 - t; in the loop straight lines from (1, 0) to (t_on, α_on), (t_off, α_on) and (0, 1)."""
    if rule.remask[0] != "remdm-loop":
        return 1 - time
    _, _, t_on, t_off, alpha_on = rule.remask
    if time >= t_on:
        return alpha_on * (1 - time) / (1 - t_on)
    return alpha_on if time >= t_off else alpha_on + (1 - alpha_on) * (t_off - time) / t_off


def confidence_when_revealed(rule, model, history, i):
    """p of the token at i, before the step that put it there."""
    before = max(n for n, tokens in enumerate(history) if tokens[i] == MASK)
    p = scored(rule, without(rule.exclude_ids, model(history[before])[i]))
    return p[history[-1][i]]


# Sets


def positions(tokens, condition):
    return [i for i, token in enumerate(tokens) if condition(token)]


def product(distributions):
    """Independent draws, one for each key: pairs of a dict and its probability."""
    for outcome in itertools.product(*(of_key.items() for of_key in distributions.values())):
        values = dict(zip(distributions, (value for value, _ in outcome), strict=True))
        yield values, math.prod((chance for _, chance in outcome), start=Fraction(1))


def subsets(chances):
    """The distribution of a set in which each key is by itself, with its probability."""
    flips = {key: {True: chance, False: 1 - chance} for key, chance in chances.items()}
    return {
        frozenset(key for key, is_in in flip.items() if is_in): chance
        for flip, chance in product(flips)
        if chance > 0
    }
