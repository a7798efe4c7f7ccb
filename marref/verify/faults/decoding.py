"""Faults of the decoder and its reveal schedules, and of masking for training."""

from typing import Any

import numpy as np

from marref import decoding, loss, masking, schedules
from marref.model import MAR
from marref.schedules import Schedule
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Patch, replace, wrap


def _decoder(
    *,
    mask_after_softmax: bool = False,
    least_first: bool = False,
    higher_first: bool = False,
    ties_together: bool = False,
    again: bool = False,
) -> tuple[Patch]:
    """Put another decoder in the place of marref's, for calls without an rng.

    ``mask_after_softmax``: [MASK] is left out of the arg max only.  ``least_first``: the least
    confident are revealed first.  ``higher_first``: of equals, the higher position is.
    ``ties_together``: all that equal the last one to be revealed are revealed with it.
    ``again``: what has been revealed is predicted again in every step.
    """

    def wrapped(old: Any) -> Any:
        def iterative_decode(
            model: MAR,
            params: Tree,
            *,
            seq_len: int | None = None,
            vocab_size: int | None = None,
            num_steps: int = 8,
            mask_token_id: int = 0,
            temperature: float = 1.0,
            batch_size: int | None = None,
            tokens: Any = None,
            schedule: str | Schedule = "cosine",
            exclude_mask_token: bool = True,
            return_steps: bool = False,
            **options: Any,
        ) -> Any:
            tokens = decoding._start(model, seq_len, vocab_size, batch_size, mask_token_id, tokens)
            if not callable(schedule):
                schedule = schedules.SCHEDULES[schedule]
            unknown = tokens == mask_token_id
            masked = unknown.copy()
            counts, _ = decoding._reveal_counts(schedule, masked.sum(axis=1), num_steps)
            confidence = np.ones(tokens.shape, params["head"]["bias"].dtype)
            steps: dict[str, list[Array]] = {"tokens": [], "mask": [], "confidence": []}
            for count in counts.T:
                logits = model(params, tokens).reshape(-1, model.vocab_size)
                allowed = logits.copy()
                if exclude_mask_token:
                    allowed[:, mask_token_id] = -np.inf
                predicted, log_confidence = decoding._predict(allowed, temperature, None)
                if mask_after_softmax:
                    rows = np.arange(len(logits))
                    log_confidence = loss.log_softmax(logits / temperature)[rows, predicted]
                predicted = predicted.reshape(tokens.shape)
                log_confidence = log_confidence.reshape(tokens.shape)
                changing = unknown if again else masked
                confidence[changing] = np.exp(log_confidence[changing])

                priority = -log_confidence if least_first else log_confidence
                priority = np.where(masked, priority, -np.inf)
                reveal = _chosen(priority, count, higher_first, ties_together) & masked
                masked = masked & ~reveal
                changing = unknown & ~masked if again else reveal
                tokens[changing] = predicted[changing]
                for name, array in (
                    ("tokens", tokens),
                    ("mask", masked),
                    ("confidence", confidence),
                ):
                    steps[name].append(array.copy())
            shape = (len(counts.T), *tokens.shape)
            stacked = {name: np.array(arrays).reshape(shape) for name, arrays in steps.items()}
            return (tokens, stacked) if return_steps else tokens

        return lambda *args, **options: (
            iterative_decode(*args, **options)
            if options.get("rng") is None
            else old(*args, **options)
        )

    return (wrap(decoding, "iterative_decode", wrapped),)


def _chosen(priority: Array, count: Array, higher_first: bool, ties_together: bool) -> Array:
    """Mark the ``count`` entries of highest priority in each row."""
    if higher_first:
        return _chosen(priority[:, ::-1], count, False, ties_together)[:, ::-1]
    order = np.argsort(-priority, axis=1, kind="stable")
    chosen: Array = np.argsort(order, axis=1) < count[:, np.newaxis]
    if ties_together:
        cut_off = np.where(chosen, priority, np.inf).min(axis=1, keepdims=True)
        chosen = priority >= cut_off
    return chosen


def _schedule(name: str, make: Any) -> tuple[Patch]:
    """Put make(old) in the place of the schedule of that name."""
    return (
        wrap(
            schedules,
            "SCHEDULES",
            lambda old: {**old, name: make(old)},
        ),
    )


def _from_masked(num_masked: int, masked: Array) -> schedules.Counts:
    """Turn the numbers masked after steps 1 to K - 1 into counts."""
    if num_masked == 0:
        return np.zeros(0, np.int64)
    after = np.concatenate([[num_masked], masked, [0]]).astype(np.int64)
    counts: schedules.Counts = after[:-1] - after[1:]
    return counts


def _linear_floored(num_masked: int, num_steps: int) -> schedules.Counts:
    """m_k = floor((1 - k/K) N)."""
    num_steps = min(num_steps, num_masked)
    left = num_steps - np.arange(1, num_steps)
    return _from_masked(num_masked, left * num_masked // max(num_steps, 1))


def _linear_remainder_first(num_masked: int, num_steps: int) -> schedules.Counts:
    """floor(N/K) in each step, and one more in each of the first N mod K."""
    num_steps = min(num_steps, num_masked)
    share, rest = divmod(num_masked, max(num_steps, 1))
    counts: schedules.Counts = share + (np.arange(num_steps) < rest).astype(np.int64)
    return counts


def _cosine_float32(num_masked: int, num_steps: int) -> schedules.Counts:
    """m_k = max(1, min(m_{k-1} - 1, floor(N cos(πk/2K)))) in float32."""
    num_steps = min(num_steps, num_masked)
    ratio = np.arange(1, num_steps, dtype=np.float32) / np.float32(max(num_steps, 1))
    bounds = np.floor(np.float32(num_masked) * np.cos(np.float32(np.pi / 2) * ratio))
    left = num_steps - np.arange(1, num_steps)
    return _from_masked(num_masked, _falling(num_masked, np.maximum(bounds, left)))


def _cosine_rounded(num_masked: int, num_steps: int) -> schedules.Counts:
    """m_k = max(1, min(m_{k-1} - 1, round(N cos(πk/2K))))."""
    num_steps = min(num_steps, num_masked)
    step = np.arange(1, num_steps)
    bounds = np.rint(num_masked * np.cos(np.pi * step / (2 * max(num_steps, 1))))
    return _from_masked(num_masked, _falling(num_masked, np.maximum(bounds, num_steps - step)))


def _falling(num_masked: int, bounds: Array) -> Array:
    """m_k = min(m_{k-1} - 1, bound_k)."""
    step = np.arange(1, len(bounds) + 1)
    return np.minimum(np.minimum.accumulate(bounds + step), num_masked) - step


def _cosine_early(num_masked: int, num_steps: int) -> schedules.Counts:
    """m_k = max(1, floor(N cos(πk/2(K - 1))))."""
    num_steps = min(num_steps, num_masked)
    cosines = np.cos(np.pi / 2 * np.arange(1, num_steps) / max(num_steps - 1, 1))
    return _from_masked(num_masked, np.maximum(1, np.floor(num_masked * cosines)))


def _any_counts(schedule: Schedule, num_masked: Array, num_steps: int) -> tuple[Array, Array]:
    """Do as the decoder does, without its check that every step reveals something."""
    rows = [schedule(int(masked), num_steps) for masked in num_masked]
    num_rounds = np.array([len(row) for row in rows])
    counts = np.zeros((len(rows), num_rounds.max()), np.int64)
    for padded, row in zip(counts, rows, strict=True):
        padded[: len(row)] = row
    return counts, num_rounds


def _temperature_multiplied(old: Any) -> Any:
    """Compute p = softmax(z T)."""
    return lambda logits, temperature, rng: old(logits, 1.0 / temperature, rng)


def _unscaled_confidence(old: Any) -> Any:
    """Compute confidence = softmax(z)[token]."""

    def predict(logits: Array, temperature: float, rng: Any) -> tuple[Array, Array]:
        predicted, _ = old(logits, temperature, rng)
        return predicted, loss.log_softmax(logits)[np.arange(len(logits)), predicted]

    return predict


def _decode_option(**changed: Any) -> tuple[Patch]:
    """Override arguments of the decoder, whatever the caller says."""
    return (
        wrap(
            decoding,
            "iterative_decode",
            lambda old: lambda *args, **options: old(*args, **(options | changed)),
        ),
    )


def _known_ignored(old: Any) -> Any:
    """Start from all [MASK]."""

    def iterative_decode(*args: Any, **options: Any) -> Any:
        if options.get("tokens") is not None:
            known = np.asarray(options["tokens"])
            options["tokens"] = np.full_like(known, options.get("mask_token_id", 0))
        return old(*args, **options)

    return iterative_decode


DECODING = (
    Fault(
        "decode-mask-token-emitted",
        "[MASK] takes part in softmax and arg max and may be emitted, as in Edifice, in LLaDA, "
        "and in MaskGIT with the mask id inside the vocabulary. Sequences come out with holes, "
        "and confidences are lower throughout.",
        _decode_option(exclude_mask_token=False),
    ),
    Fault(
        "decode-mask-excluded-after-softmax",
        "[MASK] is left out of the arg max but not of the softmax. Tokens of a first step are "
        "right; confidences are lower by the probability of [MASK], and may change the order.",
        _decoder(mask_after_softmax=True),
    ),
    Fault(
        "decode-temperature-multiplied",
        "Logits are multiplied by the temperature instead of divided, as in Halton-MaskGIT. "
        "Temperature 1 hides it; others have confidences the wrong way.",
        (wrap(decoding, "_predict", _temperature_multiplied),),
    ),
    Fault(
        "decode-confidence-unscaled",
        "Confidence is the softmax of the logits without the temperature. Temperature 1 hides it.",
        (wrap(decoding, "_predict", _unscaled_confidence),),
    ),
    Fault(
        "decode-least-confident-first",
        "The least confident tokens are revealed first: the sort runs the other way. All "
        "confidences of the first step are right, the revealed positions are not.",
        _decoder(least_first=True),
    ),
    Fault(
        "decode-ties-to-higher-position",
        "Of equal confidences the higher position is revealed first, as in Edifice. It shows "
        "only with ties: identical logits, or float32 confidences that round to 1.",
        _decoder(higher_first=True),
    ),
    Fault(
        "decode-ties-together",
        "Everything as confident as the last token to be revealed is revealed with it, since "
        "confidence is compared with a cut-off, as in MaskGIT. With uniform logits the first "
        "step reveals all; without ties it does not show.",
        _decoder(ties_together=True),
    ),
    Fault(
        "decode-revealed-predicted-again",
        "What has been revealed is predicted anew in every step. Tokens that were out change, "
        "in the second step or later.",
        _decoder(again=True),
    ),
    Fault(
        "decode-known-tokens-ignored",
        "Decoding starts from all [MASK] whatever is known: inpainting is not honoured. Known "
        "tokens do not survive.",
        (wrap(decoding, "iterative_decode", _known_ignored),),
    ),
    Fault(
        "decode-cosine-linear",
        "Equally many tokens are revealed in each step where the cosine schedule is asked for, "
        "as in Edifice: 32 in each of 8 steps for 256 tokens, instead of 5 to 49.",
        _schedule("cosine", lambda old: old["linear"]),
    ),
    Fault(
        "decode-cosine-rounded",
        "N cos(πk/2K) is rounded to the nearest integer instead of down. Counts are off by one "
        "here and there.",
        _schedule("cosine", lambda old: _cosine_rounded),
    ),
    Fault(
        "decode-cosine-float32",
        "The cosine is computed in float32, where cos(π/3) is 0.49999997, as in MaskGIT: one "
        "token short of a half at two thirds of the steps. 256 tokens in 12 steps show it.",
        _schedule("cosine", lambda old: _cosine_float32),
    ),
    Fault(
        "decode-cosine-early",
        "The ratio runs to 1 in K - 1 steps instead of K, t = i/(K - 1), as in Muse: the last "
        "step but one leaves a single token, and some steps may reveal nothing.",
        (
            *_schedule("cosine", lambda old: _cosine_early),
            replace(decoding, "_reveal_counts", _any_counts),
        ),
    ),
    Fault(
        "decode-linear-floored",
        "The linear schedule rounds (1 - k/K)·N down instead of to the nearest integer. Counts "
        "differ where K does not divide N.",
        _schedule("linear", lambda old: _linear_floored),
    ),
    Fault(
        "decode-linear-remainder-first",
        "The linear schedule reveals floor(N/K) in each step, and the first N mod K steps one "
        "more, as in LLaDA. Counts differ where K does not divide N.",
        _schedule("linear", lambda old: _linear_remainder_first),
    ),
)


def _mirrored(old: Any) -> Any:
    """Compute r = cos(πu/2)."""
    return {**old, "one-minus-cosine": old["cosine"]}


def _counts_rounded_up(old: Any) -> Any:
    """ceil(ratio·length) positions."""

    def mask_tokens(tokens: Any, ratio: Any, rng: Any, mask_token_id: int = 0) -> Any:
        length = np.shape(tokens)[1]
        return old(tokens, np.ceil(np.asarray(ratio) * length) / length, rng, mask_token_id)

    return mask_tokens


def _counts_drawn(old: Any) -> Any:
    """Each position by itself, with the probability ratio."""

    def mask_tokens(tokens: Any, ratio: Any, rng: Any, mask_token_id: int = 0) -> Any:
        tokens = np.asarray(tokens)
        mask = rng.random(tokens.shape) < np.asarray(ratio)[..., np.newaxis]
        return np.where(mask, tokens.dtype.type(mask_token_id), tokens), mask

    return mask_tokens


def _maybe_none(old: Any) -> Any:
    """round(ratio·length) positions, which may be 0."""

    def mask_tokens(tokens: Any, ratio: Any, rng: Any, mask_token_id: int = 0) -> Any:
        masked, mask = old(tokens, ratio, rng, mask_token_id)
        some = np.rint(np.asarray(ratio) * mask.shape[1])[..., np.newaxis] > 0
        return np.where(some, masked, tokens), mask & some

    return mask_tokens


MASKING = (
    Fault(
        "mask-ratio-mirrored",
        "The mask ratio is cos(πu/2), MaskGIT's, instead of 1 - cos(πu/2): large ratios instead "
        "of small ones, with the mean 0.637 instead of 0.363. It shows in the distribution "
        "only.",
        (wrap(masking, "SCHEDULES", _mirrored),),
    ),
    Fault(
        "mask-count-rounded-up",
        "ceil(ratio·length) positions are masked instead of the nearest integer, as in the MAR "
        "paper's code: half a position more on average.",
        (wrap(masking, "mask_tokens", _counts_rounded_up),),
    ),
    Fault(
        "mask-count-drawn",
        "Each position is masked by itself with the probability of the ratio, as in "
        "Halton-MaskGIT and LLaDA: the number of masked positions scatters around ratio·length.",
        (wrap(masking, "mask_tokens", _counts_drawn),),
    ),
    Fault(
        "mask-count-may-be-zero",
        "Small ratios mask nothing, where marref masks one position at least: about 4% of the "
        "draws at length 256. Such a sequence teaches nothing, and a mean by sequence over it "
        "is 0/0.",
        (wrap(masking, "mask_tokens", _maybe_none),),
    ),
)
