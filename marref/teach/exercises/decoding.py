"""Exercises on decoding: reveal counts, and one step."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from marref import decoding, schedules
from marref.decoding import ordering
from marref.teach.exercise import Exercise, Part, Point, Rng
from marref.trees import Array


def _counts_points(rng: Rng) -> Sequence[Point]:
    return [
        {"num_masked": num_masked, "num_steps": num_steps}
        for num_masked, num_steps in (
            (256, 8),
            (64, 12),
            (100, 7),
            (5, 5),
            (6, 9),
            (17, 1),
            (100, 39),
            (39, 36),
        )
    ]


def _counts_of(masked_after: Any) -> Any:
    def cosine(num_masked: int, num_steps: int) -> Array:
        steps = min(num_steps, num_masked)
        masked = [num_masked]
        for k in range(1, steps):
            masked.append(int(masked_after(num_masked, k, steps, masked[-1])))
        return -np.diff([*masked, 0])

    return cosine


def _exact(n: int, k: int, steps: int) -> int:
    """Compute floor(n cos(πk/2K)), exactly where the cosine is 1/2."""
    return n // 2 if 3 * k == 2 * steps else math.floor(n * math.cos(math.pi * k / (2 * steps)))


def _cosine_at(angle: Any, above: float = 1e-9) -> Any:
    """Compute the counts with the cosine of another angle than πk/2K, a function of k and K.

    above: what is added before the floor, so that a whole number stays one; 0: left to rounding.
    """
    return _counts_of(
        lambda n, k, steps, m: max(1, min(m - 1, math.floor(n * math.cos(angle(k, steps)) + above)))
    )


def _not_shortened(num_masked: int, num_steps: int) -> Array:
    counts = schedules.cosine(num_masked, num_steps)
    return np.concatenate([counts, np.zeros(num_steps - len(counts), np.int64)])


REVEAL_COUNTS = Exercise(
    "reveal-counts",
    "how many tokens each step reveals, by the cosine, in exact arithmetic",
    "decoding.md",
    (
        Part(
            "cosine",
            schedules.cosine,
            ("counts",),
            _counts_points,
            {"counts": "masked after step k: max(1, min(m_{k-1} - 1, floor(N cos(πk/2K))))"},
            {
                "floor of floating point: at k = 2K/3 the cosine is 1/2 exactly, and rounding may "
                "lose a token there": _cosine_at(
                    lambda k, steps: math.pi * k / (2 * steps), above=0.0
                ),
                "K - 1 stands where K belongs, as if the last step's k were K - 1": _cosine_at(
                    lambda k, steps: math.pi / 2 * k / (steps - 1)
                ),
                "the ½ is missing: cos(πk/K) falls to 0 in half of the steps": _cosine_at(
                    lambda k, steps: math.pi * k / steps
                ),
                "the ½ is missing, and rounding loses a token besides: cos(πk/K) falls to 0 in "
                "half of the steps": _cosine_at(lambda k, steps: math.pi * k / steps, above=0.0),
                "steps are counted from 0, and rounding loses a token besides: what is masked "
                "after step k has cos(π(k - 1)/2K)": _cosine_at(
                    lambda k, steps: math.pi * (k - 1) / (2 * steps), above=0.0
                ),
                "steps are counted from 0: what is masked after step k has cos(π(k - 1)/2K)": (
                    _cosine_at(lambda k, steps: math.pi / 2 * (k - 1) / steps)
                ),
                "what is still masked is rounded up, and so what is revealed down; it is the other "
                "way round": _counts_of(
                    lambda n, k, steps, m: max(
                        1,
                        min(m - 1, math.ceil(n * math.cos(math.pi * k / (2 * steps)) - 1e-9)),
                    )
                ),
                "the same number in every step: there is no cosine": _counts_of(
                    lambda n, k, steps, m: n - n * k // steps
                ),
                "steps may reveal nothing: at least one token less must be masked after each": (
                    _counts_of(lambda n, k, steps, m: max(1, _exact(n, k, steps)))
                ),
                "the sine stands where the cosine belongs: many tokens first, few last": _counts_of(
                    lambda n, k, steps, m: max(
                        steps - k,
                        min(m - 1, math.floor(n * (1 - math.sin(math.pi * k / (2 * steps))))),
                    )
                ),
                "what is still masked is returned, where what each step reveals is asked for": (
                    lambda num_masked, num_steps: (
                        num_masked - np.cumsum(schedules.cosine(num_masked, num_steps))
                    )
                ),
                "with more steps than tokens some reveal nothing: K is min(num_steps, N)": (
                    _not_shortened
                ),
            },
        ),
    ),
    (
        "Compute how many are masked after each step first; counts are the differences.",
        "K = min(num_steps, N); after step k < K there are max(1, min(m - 1, floor(N cos(πk/2K)))) "
        "and after the last 0.",
        "cos(πk/2K) is rational only where it is 0, 1/2 or 1: 1/2 at 3k = 2K. Set it there, "
        "since floating point may come out below.",
    ),
)


def decoding_step(
    logits: Array, tokens: Array, mask_token_id: int, count: int, temperature: float
) -> Array:
    """Take one step of the default decoder: confidence first, arg max of the logits.

    Parameters
    ----------
    logits : array [length, vocab_size]
    tokens : integer array [length]
        With ``mask_token_id`` where something is masked.
    mask_token_id : int
        Never emitted.
    count : int
        How many masked positions are revealed; of equal confidence the lower position.
    temperature : float

    Returns
    -------
    integer array [length]
        The tokens after the step.
    """
    rule = decoding.Rule(
        num_steps=1,
        mask_token_id=mask_token_id,
        temperature=temperature,
        schedule="cosine",
        order="confidence",
        choice_temperature=0.0,
        exclude_mask_token=True,
    )
    masked = tokens == mask_token_id
    predicted, _, score = decoding.predict(logits, rule, None)
    masked_rows = masked[np.newaxis]
    priority = ordering.rank(
        np.where(masked, score, -np.inf)[np.newaxis], masked_rows, np.ones(1), rule, None
    )
    chosen = ordering.choose(priority, np.array([count]))[0] & masked
    return np.where(chosen, predicted, tokens)


def _step_points(rng: Rng) -> Sequence[Point]:
    tokens = np.array([0, 3, 0, 0, 0, 5, 0])
    sure = rng.normal(0.0, 2.0, (7, 6))
    sure[3, 0] = sure[3].max() + 1.0  # [MASK] is the most probable here.
    sure[1, 2] = 9.0  # The surest is known already.
    sure[6] += 50.0  # Large logits are no confidence.
    ties = rng.normal(size=(7, 6))
    ties[4] = ties[2]
    ties[[2, 4], 5] = 6.0
    return [
        {"logits": sure, "tokens": tokens, "mask_token_id": 0, "count": 2, "temperature": 1.0},
        {"logits": ties, "tokens": tokens, "mask_token_id": 0, "count": 1, "temperature": 0.7},
        {
            # The first has the lower entropy and the larger logits, the second the surer arg max.
            "logits": np.array([[200.0, 115, 115, 55, 55, 55], [90, 15, 3, 2, 2, 3], [7] * 6]),
            "tokens": np.array([0, 0, 4]),
            "mask_token_id": 0,
            "count": 1,
            "temperature": 5.0,
        },
        {
            # The last id is [MASK].  One, two and four rivals: the first is the surest at T = 2,
            # the second at T = 1, the third at T = 1/2.
            "logits": np.array(
                [
                    [9.0, 7, -9, -9, -9, 0],
                    [4, 7, 4, -9, -9, 0],
                    [3.5, 3.5, 7, 3.5, 3.5, 0],
                    [0, 9, 0, 0, 0, 0],
                ]
            ),
            "tokens": np.array([5, 5, 5, 0]),
            "mask_token_id": 5,
            "count": 1,
            "temperature": 0.5,
        },
        {
            # The first has the wider margin to its next rival, the second the surer arg max.
            "logits": np.log(
                [[0.40, 0.15, 0.15, 0.15, 0.15, 1], [0.50, 0.46, 0.02, 0.01, 0.01, 1]]
            ),
            "tokens": np.array([5, 5]),
            "mask_token_id": 5,
            "count": 1,
            "temperature": 1.0,
        },
    ]


def _step_with(
    *,
    logits_of: Any = lambda logits, mask_id: np.where(
        np.arange(logits.shape[1]) == mask_id, -np.inf, logits
    ),
    among: Any = lambda masked: masked,
    confidence_of: Any = None,
    known_kept: bool = True,
) -> Any:
    """Take a step with one decision made otherwise."""

    def step(
        logits: Array, tokens: Array, mask_token_id: int, count: int, temperature: float
    ) -> Array:
        masked = tokens == mask_token_id
        z = logits_of(logits, mask_token_id)
        exponentials = np.exp((z - z.max(axis=1, keepdims=True)) / temperature)
        p = exponentials / exponentials.sum(axis=1, keepdims=True)
        confidence = p.max(axis=1) if confidence_of is None else confidence_of(z, p)
        priority = np.where(among(masked), confidence, -np.inf)
        chosen = np.zeros_like(masked)
        chosen[np.argsort(-priority, kind="stable")[:count]] = True
        if known_kept:
            chosen &= masked
        return np.where(chosen, z.argmax(axis=1), tokens)

    return step


def _counted_among_masked(logits: Array, tokens: Array, mask_token_id: int, **how: Any) -> Array:
    masked = tokens == mask_token_id
    revealed = decoding_step(logits[masked], tokens[masked], mask_token_id, **how)
    places = np.flatnonzero(revealed != mask_token_id)
    new = tokens.copy()
    new[places] = revealed[places]
    return new


def _all_revealed(logits: Array, tokens: Array, mask_token_id: int, **_: Any) -> Array:
    return decoding_step(logits, tokens, mask_token_id, len(tokens), 1.0)


DECODING_STEP = Exercise(
    "decoding-step",
    "one step of the decoder: predict, rank by confidence, reveal",
    "decoding.md",
    (
        Part(
            "decoding_step",
            decoding_step,
            ("tokens",),
            _step_points,
            {"tokens": "which positions, by confidence among the masked; and which id there"},
            {
                "known tokens are ranked too, and take the places of masked ones": _step_with(
                    among=lambda masked: np.ones_like(masked)
                ),
                "known tokens are ranked too, and predicted anew": _step_with(
                    among=lambda masked: np.ones_like(masked), known_kept=False
                ),
                "positions are counted among the masked ones, and written as if among all": (
                    _counted_among_masked
                ),
                "id 0 is taken for [MASK]; it is mask_token_id": lambda **point: decoding_step(
                    **{**point, "mask_token_id": 0}
                ),
                "masked positions are revealed from left to right; or all confidences are equal, "
                "as the largest logit of each row less itself is": _step_with(
                    confidence_of=lambda z, p: z.max(axis=1) - z.max(axis=1)
                ),
                "the largest logit is taken for the confidence, without softmax": _step_with(
                    confidence_of=lambda z, p: z.max(axis=1)
                ),
                "all masked positions are revealed at once": _all_revealed,
                "positions are ranked by the margin between the two largest probabilities, not by "
                "the largest alone": _step_with(
                    confidence_of=lambda z, p: -np.diff(np.sort(p, axis=1)[:, :-3:-1], axis=1)[:, 0]
                ),
                "positions are ranked by entropy, not by the confidence of the arg max": _step_with(
                    confidence_of=lambda z, p: (p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
                ),
            },
        ),
    ),
    (
        "Three questions: what would each masked position be, which of them come first, and what "
        "stays as it is?",
        "Put the logit of [MASK] to -inf before softmax(z / T); the confidence is the probability "
        "of the arg max; known positions are never ranked.",
        "order = np.argsort(-confidence, kind='stable') with -inf confidence at known positions; "
        "reveal the first count of it.",
    ),
)
