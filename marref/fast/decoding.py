"""The iterative decoder, computed where it is needed, in parts that threads take.

Only the positions that are still masked are predicted, so the head and, in the last block, the
queries and the feed-forward layer are computed at these.  Sequences that are complete are left
out; from nothing, where all sequences are the same, the first step is computed for one.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from marref import decoding
from marref.fast import memory, parallel
from marref.fast.forward import Member, Work, encode, head, prepare, split_up
from marref.fast.kernels import has_digits
from marref.model import MAR
from marref.schedules import Schedule
from marref.trees import Array, Tree


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
    tokens: npt.ArrayLike | None = None,
    schedule: str | Schedule = "cosine",
    order: str = "confidence",
    rng: np.random.Generator | None = None,
    choice_temperature: float = 0.0,
    exclude_mask_token: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    labels: npt.ArrayLike | None = None,
    guidance_scale: float = 1.0,
    guidance: str = "constant",
    min_p: float | None = None,
    exclude_ids: Sequence[int] = (),
    score_temperature: float | None = None,
    order_temperature: float = 0.0,
    reveal: decoding.Reveal | None = None,
    block_length: int | None = None,
    remask: decoding.Remask | None = None,
    return_steps: bool = False,
    num_threads: int | None = None,
) -> npt.NDArray[np.int64] | Any:
    """Generate sequences by revealing the most confident tokens first.

    Equal to `marref.decoding.iterative_decode`, its definition, up to rounding; see there for
    what it takes, returns and raises.

    Parameters
    ----------
    num_threads : int, optional
        How many threads share the work: the sequences or, if there are fewer than threads, their
        positions.  By default as many as pay, see docs/performance.md.  The same number gives the
        same bits, another one the same result up to rounding.
    """
    tokens = decoding.start(model, seq_len, vocab_size, batch_size, mask_token_id, tokens, labels)
    decoding.check_params(model, params, tokens)
    rule = decoding.Rule(
        num_steps=num_steps,
        mask_token_id=mask_token_id,
        temperature=temperature,
        schedule=schedule,
        order=order,
        choice_temperature=choice_temperature,
        exclude_mask_token=exclude_mask_token,
        top_k=top_k,
        top_p=top_p,
        guidance_scale=guidance_scale,
        guidance=guidance,
        min_p=min_p,
        exclude_ids=exclude_ids,
        score_temperature=score_temperature,
        order_temperature=order_temperature,
        reveal=reveal,
        block_length=block_length,
        remask=remask,
    )
    rule.check(model, tokens.shape[1])
    labels = rule.check_labels(model, labels, len(tokens))
    num_threads = parallel.choose(
        num_threads, tokens.size * model.embed_dim, parallel.FEATURES_WORTH_A_THREAD
    )
    memory.keep_by_default()
    with parallel.threads(num_threads) as run:
        work = prepare(run, model, params, tokens.shape[1])
        predict_at = functools.partial(_predict_at, run, work, rule, labels)
        tokens, steps = decoding.decode(predict_at, tokens, rule, rng, work.table.dtype)
    return (tokens, steps) if return_steps else tokens


def _predict_at(
    run: parallel.Run,
    work: Work,
    rule: decoding.Rule,
    labels: Array | None,
    tokens: Array,
    wanted: Array,
    uniforms: Array | None,
    scale: Array,
) -> decoding.Prediction:
    """Predict where it is wanted: what `marref.decoding.decode` asks for in every step."""
    if not wanted.any():
        return decoding.Prediction(*[np.empty(0)] * 3)
    batch = len(tokens)
    from_nothing = bool((tokens == rule.mask_token_id).all()) and bool((wanted == wanted[0]).all())
    from_nothing &= labels is None or bool((labels == labels[0]).all())
    todo = slice(1) if from_nothing else wanted.any(axis=1)
    if uniforms is not None:
        uniforms = uniforms.reshape(batch if from_nothing else 1, -1)
    split = functools.partial(split_up, run, work, tokens[todo], wanted=wanted[todo])
    members = split(labels=None if labels is None else labels[todo])
    ends = np.cumsum([np.count_nonzero(member.rows.wanted) for member in members])[:-1]
    held = np.split(tokens[todo][wanted[todo]], ends)
    parts: list[Array | None] = [None] * len(members)
    if uniforms is not None:
        parts = list(np.split(uniforms, ends, axis=1))
    guides: list[_Guide | None] = [None] * len(members)
    if labels is not None and rule.guides:
        without = split(labels=np.full(len(tokens[todo]), work.model.num_classes))
        scales = np.split(np.repeat(scale[todo], wanted[todo].sum(axis=1)), ends)
        guides = list(map(_Guide, without, scales))
    results = run(functools.partial(_of_member, work, rule), members, held, parts, guides)
    prediction = _joined(results)
    if from_nothing and uniforms is None:
        return decoding.Prediction(*(np.tile(array, batch) for array in prediction))
    return prediction


def _joined(parts: Sequence[decoding.Prediction]) -> decoding.Prediction:
    """Join predictions of arrays [copies, positions] into one of arrays [copies * positions]."""
    return decoding.Prediction(
        *(np.concatenate(arrays, axis=1).ravel() for arrays in zip(*parts, strict=True))
    )


class _Guide(NamedTuple):
    """A member with the same positions and no class, and the guidance scale of each of them."""

    member: Member
    scale: Array


def _of_member(
    work: Work,
    rule: decoding.Rule,
    member: Member,
    held: Array,
    uniforms: Array | None,
    guide: _Guide | None,
) -> decoding.Prediction:
    """Predict a member's part of the positions; see `_predict` for what is returned."""

    def use(logits: Array, part: slice) -> decoding.Prediction:
        of_part = None if uniforms is None else uniforms[:, part]
        return _predict(logits, rule, of_part, held[part])

    normal = _guided(work, member, guide)
    if normal is None:
        return decoding.Prediction(*[np.empty((1, 0))] * 3)
    parts = zip(*head(work, normal, use), strict=True)
    return decoding.Prediction(*(np.concatenate(arrays, axis=1) for arrays in parts))


def _guided(work: Work, member: Member, guide: _Guide | None) -> Array | None:
    """Do as `encode`, and guide before the head instead of behind it.

    The head is x W + b, and u + s (c - u) the sum of c and u with weights that add up to 1.  So the
    logits that are guided are those of what is guided.
    """
    if guide is None:
        return encode(work, member)
    try:
        normal = encode(work, member)
    except BaseException:
        # Others may be waiting there already.
        guide.member.team.give_up()
        raise
    without = None if normal is None else encode(work, guide.member)
    if normal is None or without is None:
        return None
    return decoding.guide(normal, without, guide.scale)


def _predict(
    logits: Array, rule: decoding.Rule, uniforms: Array | None, held: Array
) -> decoding.Prediction:
    """Do as `marref.decoding.predict`; logits are written over.

    Parameters
    ----------
    logits : array [rows, vocab_size]
    rule : Rule
    uniforms : array [copies, rows] or None
        For several sequences that have the same logits.
    held : integer array [rows]

    Returns
    -------
    Prediction
        Arrays [copies, rows].
    """
    if uniforms is not None:
        copies = [decoding.predict(logits, rule, of_copy, held) for of_copy in uniforms]
        return decoding.Prediction(*(np.array(arrays) for arrays in zip(*copies, strict=True)))
    looks_again = rule.remask is not None and rule.remask.looks_again
    if looks_again or not has_digits(logits):
        prediction = decoding.predict(logits, rule, None, held)
    else:
        prediction = _arg_max(logits, rule)
    return decoding.Prediction(*(array[np.newaxis] for array in prediction))


def _arg_max(logits: Array, rule: decoding.Rule) -> decoding.Prediction:
    """Predict the arg max; logits are written over.

    With o = exp(z) of an id over exp(z) of the arg max, at the temperature of scores, sums and
    maxima going over the other ids:

        log p₁ = -log1p(Σ o)        log (p₁ - p₂) = log p₁ + log1p(-max o)
        Σ p log p = log p₁ + Σ o log o / (1 + Σ o)
    """
    logits[:, rule.excluded] = -np.inf
    rows, tokens = np.arange(len(logits)), logits.argmax(axis=1)
    by_entropy = rule.order == "entropy"
    if by_entropy or rule.temperature != 1.0 or rule.score_temperature is not None:
        logits -= logits[rows, tokens][:, np.newaxis]
        temperature = rule.score_temperature or rule.temperature or 1.0
        logits = decoding.over_temperature(logits, temperature)
    odds = np.exp(logits, out=None if by_entropy else logits)
    of_best = odds[rows, tokens]
    odds[rows, tokens] = 0.0
    total = odds.sum(axis=1) / of_best
    score = log_confidence = -np.log1p(total)
    if rule.order == "margin":
        with np.errstate(divide="ignore"):
            score = log_confidence + np.log1p(-odds.max(axis=1) / of_best)
    elif by_entropy:
        odds *= np.maximum(logits, np.finfo(logits.dtype).min)
        score = log_confidence + odds.sum(axis=1) / (1.0 + total)
    return decoding.Prediction(tokens, log_confidence, score)
