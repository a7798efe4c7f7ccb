"""Faults of the decoder and its reveal schedules, and of masking for training."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from marref import decoding, schedules
from marref.decoding import PredictAt, Prediction, Rule, predict
from marref.loss import log_softmax
from marref.masking import SCHEDULES, mask_tokens, one_minus_cosine
from marref.trees import Array
from marref.verify.faults.fault import Fault, Stage

fault, mask_fault = Stage(), Stage()


def _masked_after(
    fault: Fault, schedule: Any, masked_after: Callable[..., Array], *, falling: bool = True
) -> None:
    """Let b_k = masked_after(N, K, k) positions be masked after steps k = 1, …, K - 1.

    With ``falling``, every step reveals something: m_k = max(K - k, min(m_{k-1} - 1, b_k)).
    """

    @fault.replaces(schedule)
    def _(num_masked: int, num_steps: int) -> Array:
        num_steps = min(num_steps, num_masked)
        if num_steps == 0:
            return np.zeros(0, np.int64)
        step = np.arange(1, num_steps)
        masked = masked_after(num_masked, num_steps, step).astype(np.int64)
        if falling:
            bounds = np.minimum.accumulate(np.maximum(masked, num_steps - step) + step)
            masked = np.minimum(bounds, num_masked) - step
        counts: Array = -np.diff(masked, prepend=num_masked, append=0)
        return counts


fault("decode-mask-token-emitted").says(
    "[MASK] takes part in softmax and arg max and may be emitted, as in Edifice, in LLaDA, and in "
    "MaskGIT with the mask id inside the vocabulary. Sequences come out with holes, and "
    "confidences are lower throughout."
).wraps(predict)(
    lambda old, logits, rule, *args: old(logits, replace(rule, exclude_mask_token=False), *args)
)


@fault("decode-mask-excluded-after-softmax").wraps(predict)
def _(old: Any, logits: Array, rule: Rule, *args: Any) -> Any:
    """[MASK] is left out of the arg max but not of the softmax. Tokens of a first step are right;
    confidences are lower by the probability of [MASK], and may change the order."""
    predicted = old(logits, rule, *args).tokens
    logits = logits.copy()
    logits[:, list(rule.exclude_ids)] = -np.inf
    log_confidence = log_softmax(logits / rule.temperature)[np.arange(len(logits)), predicted]
    return Prediction(predicted, log_confidence, log_confidence)


fault("decode-temperature-multiplied").says(
    "Logits are multiplied by the temperature instead of divided, as in Halton-MaskGIT. "
    "Temperature 1 hides it; others have confidences the wrong way."
).wraps(decoding.over_temperature)(lambda old, z, temperature: old(z, 1.0 / temperature))


@fault("decode-confidence-unscaled").wraps(predict)
def _(old: Any, logits: Array, rule: Rule, *args: Any) -> Any:
    """Confidence is the softmax of the logits without the temperature. Temperature 1 hides it."""
    predicted = old(logits, rule, *args).tokens
    logits = np.where(np.isin(np.arange(logits.shape[1]), rule.excluded), -np.inf, logits)
    log_confidence = log_softmax(logits)[np.arange(len(logits)), predicted]
    return Prediction(predicted, log_confidence, log_confidence)


fault("decode-least-confident-first").says(
    "The least confident tokens are revealed first: the sort runs the other way. All confidences "
    "of the first step are right, the revealed positions are not."
).wraps(decoding.rank)(
    lambda old, z, masked, *args: np.where(masked, -old(z, masked, *args), -np.inf)
)
fault("decode-left-to-right").says(
    "The leftmost masked positions are revealed first, whatever the confidences: the order of "
    "language models. All confidences of the first step are right."
).wraps(decoding.rank)(
    lambda old, z, masked, *args: np.where(masked, -np.arange(masked.shape[1]), -np.inf)
)
fault("decode-count-off-by-one").says(
    "Each step reveals one token more than the schedule says: the cut-off is the entry at index "
    "count of the sorted confidences, counted from 0. The last step has less to do, or nothing."
).wraps(decoding.choose)(lambda old, priority, count: old(priority, count + 1))
fault("decode-ties-to-higher-position").says(
    "Of equal confidences the higher position is revealed first, as in Edifice. It shows only with "
    "ties: identical logits, or float32 confidences that round to 1."
).wraps(decoding.choose)(lambda old, priority, count: old(priority[:, ::-1], count)[:, ::-1])


@fault("decode-ties-together").wraps(decoding.choose)
def _(old: Any, priority: Array, count: Array) -> Any:
    """Everything as confident as the last token to be revealed is revealed with it, since
    confidence is compared with a cut-off, as in MaskGIT. With uniform logits the first step reveals
    all; without ties it does not show."""
    cut_off = np.where(old(priority, count), priority, np.inf).min(axis=1, keepdims=True)
    return priority >= cut_off


@fault("decode-revealed-predicted-again").wraps(decoding.decode)
def _(old: Any, predict_at: PredictAt, tokens: Array, rule: Rule, rng: Any, dtype: Any) -> Any:
    """What has been revealed is predicted anew in every step. Tokens that were out change, in the
    second step or later."""
    unknown = tokens == rule.mask_token_id
    predictions = [(tokens, np.ones(tokens.shape, dtype))]

    def predict_all(
        tokens: Array, masked: Array, uniforms: Array | None, scale: Array
    ) -> Prediction:
        predicted = np.where(unknown & ~masked, predictions[-1][0], tokens)
        log_confidence = np.zeros(tokens.shape, dtype)
        uniforms = None if rng is None else rng.random(unknown.sum())
        predicted[unknown], log_confidence[unknown], _ = predict_at(
            predicted, unknown, uniforms, scale
        )
        predictions.append((predicted, np.exp(log_confidence)))
        return Prediction(predicted[masked], log_confidence[masked], log_confidence[masked])

    _, steps = old(predict_all, tokens, rule, rng, dtype)
    for index, (predicted, confidence) in enumerate(predictions[1:]):
        steps["tokens"][index] = np.where(steps["mask"][index], rule.mask_token_id, predicted)
        steps["confidence"][index] = confidence
    return predictions[-1][0], steps


@fault("decode-known-tokens-ignored").wraps(decoding.decode)
def _(old: Any, predict_at: PredictAt, tokens: Array, rule: Rule, rng: Any, dtype: Any) -> Any:
    """Decoding starts from all [MASK] whatever is known: inpainting is not honoured. Known tokens
    do not survive."""
    return old(predict_at, np.full_like(tokens, rule.mask_token_id), rule, rng, dtype)


fault("decode-cosine-linear").says(
    "Equally many tokens are revealed in each step where the cosine schedule is asked for, as in "
    "Edifice: 32 in each of 8 steps for 256 tokens, instead of 5 to 49."
).replaces(schedules.cosine)(lambda num_masked, num_steps: schedules.linear(num_masked, num_steps))
fault("decode-cosine-rounded").says(
    "N cos(πk/2K) is rounded to the nearest integer instead of down. Counts are off by one here "
    "and there."
).of(_masked_after, schedules.cosine)(lambda N, K, k: np.rint(N * np.cos(np.pi * k / (2 * K))))
fault("decode-cosine-float32").says(
    "The cosine is computed in float32, where cos(π/3) is 0.49999997, as in MaskGIT: one token "
    "short of a half at two thirds of the steps. 256 tokens in 12 steps show it."
).of(_masked_after, schedules.cosine)(
    lambda N, K, k: np.floor(np.float32(N) * np.cos(np.float32(np.pi / 2) * np.float32(k / K)))
)

early = fault("decode-cosine-early").says(
    "The ratio runs to 1 in K - 1 steps instead of K, t = i/(K - 1), as in Muse: the last step but "
    "one leaves a single token, and some steps may reveal nothing."
)
early.replaces(decoding.check_counts)(lambda counts, num_masked, num_steps: None)
early.of(_masked_after, schedules.cosine, falling=False)(
    lambda N, K, k: np.maximum(1, np.floor(N * np.cos(np.pi / 2 * k / max(K - 1, 1))))
)
without_minimum = fault("decode-cosine-without-minimum")
without_minimum.says(
    "Masked after step k are floor(N cos(πk/2K)), without the rule that every step reveals a token "
    "at least: with few tokens and many steps some reveal nothing. 5 tokens in 5 steps show it."
)
without_minimum.replaces(decoding.check_counts)(lambda counts, num_masked, num_steps: None)
without_minimum.of(_masked_after, schedules.cosine, falling=False)(
    lambda N, K, k: np.floor(N * np.cos(np.pi * k / (2 * K)))
)
fault("decode-cosine-squared").says(
    "Masked after step k are N cos²(πk/2K): the cosine is squared, as for the noise of diffusion "
    "models. More is revealed in the middle, less in the last steps."
).of(_masked_after, schedules.cosine)(
    lambda N, K, k: np.floor(N * np.cos(np.pi * k / (2 * K)) ** 2)
)
fault("decode-linear-floored").says(
    "The linear schedule rounds (1 - k/K)·N down instead of to the nearest integer. Counts differ "
    "where K does not divide N."
).of(_masked_after, schedules.linear)(lambda N, K, k: (K - k) * N // K)
fault("decode-linear-remainder-first").says(
    "The linear schedule reveals floor(N/K) in each step, and the first N mod K steps one more, as "
    "in LLaDA. Counts differ where K does not divide N."
).of(_masked_after, schedules.linear)(lambda N, K, k: N - N // K * k - np.minimum(N % K, k))
mask_fault("mask-ratio-mirrored").says(
    "The mask ratio is cos(πu/2), MaskGIT's, instead of 1 - cos(πu/2): large ratios instead of "
    "small ones, with the mean 0.637 instead of 0.363. It shows in the distribution only."
).replaces(one_minus_cosine)(lambda u: SCHEDULES["cosine"](u))


@mask_fault("mask-count-rounded-up").wraps(mask_tokens)
def _(old: Any, tokens: Array, ratio: Any, rng: Any, mask_token_id: int = 0) -> Any:
    """ceil(ratio·length) positions are masked instead of the nearest integer, as in the MAR paper's
    code: half a position more on average."""
    length = np.shape(tokens)[1]
    return old(tokens, np.ceil(np.asarray(ratio) * length) / length, rng, mask_token_id)


@mask_fault("mask-count-drawn").replaces(mask_tokens)
def _(tokens: Array, ratio: Any, rng: Any, mask_token_id: int = 0) -> tuple[Array, Array]:
    """Each position is masked by itself with the probability of the ratio, as in Halton-MaskGIT and
    LLaDA: the number of masked positions scatters around ratio·length."""
    tokens = np.asarray(tokens)
    mask = rng.random(tokens.shape) < np.asarray(ratio)[..., np.newaxis]
    return np.where(mask, tokens.dtype.type(mask_token_id), tokens), mask


@mask_fault("mask-count-may-be-zero").wraps(mask_tokens)
def _(old: Any, tokens: Array, ratio: Any, rng: Any, mask_token_id: int = 0) -> Any:
    """Small ratios mask nothing, where marref masks one position at least: about 4% of the draws at
    length 256. Such a sequence teaches nothing, and a mean by sequence over it is 0/0."""
    masked, mask = old(tokens, ratio, rng, mask_token_id)
    some = np.rint(np.asarray(ratio) * mask.shape[1])[..., np.newaxis] > 0
    return np.where(some, masked, tokens), mask & some
