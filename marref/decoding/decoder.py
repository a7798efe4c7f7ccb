"""The iterative decoder: from all [MASK] to a full sequence in K steps.

In every step the model predicts all masked positions at once; the most confident predictions are
revealed and stay, the others are predicted again.  With z the logits of a position and T the
temperature,

    p = softmax(z / T)         the id of [MASK] left out: its logit is -inf
    token = arg max z          or, with an rng, drawn from p, or from the part of p that
                               top_k and top_p keep
    confidence = p[token]

`marref.schedules` says how many are revealed in a step.  Chang et al.
2022 (MaskGIT, arXiv 2202.04200, section 3.2) introduced the scheme.

With a model of classes, z may be guided (classifier-free guidance, Ho & Salimans 2022, arXiv
2207.12598): with c the logits of the class, u those of no class and s the scale,

    z = u + s (c - u)

This is the definition, written to be read; `marref.fast` computes the same sooner.  Page:
docs/decoding.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.decoding.predicting import Prediction, guide, predict, scale_at
from marref.decoding.remasking import Remask
from marref.decoding.revealing import Reveal
from marref.decoding.rule import Rule
from marref.decoding.state import Chance, State
from marref.model import MAR, check_model
from marref.schedules import Schedule
from marref.trees import Array, Tree

PredictAt = Callable[[Array, Array, Array | None, Array], Prediction]
"""``(tokens, wanted, uniforms, scale)`` to what is predicted where ``wanted`` [batch, length], see
`marref.decoding.predicting.predict`; ``uniforms`` has a number for each such position, and
``scale`` [batch] is that of the guidance."""


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
    reveal: Reveal | None = None,
    block_length: int | None = None,
    remask: Remask | None = None,
    return_steps: bool = False,
) -> npt.NDArray[np.int64] | Any:
    """Generate sequences by revealing the most confident tokens first.

    Parameters
    ----------
    model : MAR
    params : dict
    seq_len : int, optional
        Length of the result, at most ``model.seq_len``, which is the default (256 in MAR's
        specification, for the model as for the decoder).
    vocab_size : int, optional
        For symmetry with MAR's specification; must be ``model.vocab_size``, the default.
    num_steps : int
        K, the number of steps; a sequence with fewer masked positions takes one step for each.
    mask_token_id : int
    temperature : float
        T >= 0.  Scales the confidence, and the distribution that tokens are drawn from; arg max
        does not depend on it.  0: tokens are the arg max also with ``rng``, with the confidence
        of temperature 1, since in the limit all confidences are 1 and say nothing.
    batch_size : int, optional
        Number of sequences, 1 unless ``tokens`` or ``labels`` say otherwise.
    tokens : integer array [batch_size, seq_len], optional
        What is known: only positions that hold [MASK] are filled (inpainting).
    schedule : str or callable
        Reveal counts: ``(num_masked, num_steps) -> counts``, integers >= 1 with the sum
        num_masked, at most num_steps of them; `marref.schedules` names them.  Asked once for
        sequences with as many masked positions.
    order : {"confidence", "margin", "entropy", "random", "left-to-right", "halton"}
        What is revealed first: the most confident tokens, positions at random (needs ``rng``), …;
        see `marref.decoding.ordering`.
    rng : numpy.random.Generator, optional
        Given, tokens are drawn from softmax(logits / temperature).  Absent, they are the arg max,
        and the result is deterministic.
    choice_temperature : float
        Gumbel noise of this scale, times (1 - k/K) in step k, is added to the log-confidence (or
        log-margin, or negative entropy) before positions are chosen (MaskGIT's published code,
        where it is 4.5); needs ``rng``.
    exclude_mask_token : bool
        False computes softmax and arg max over all ids, as some implementations do.  [MASK] may
        then be emitted; its position counts as revealed.
    top_k : int, optional
        Draw only from the so many largest logits, of equals those of lower ids.  Arg max does not
        depend on it, as it does not on ``top_p``; nor does the confidence, see Notes.
    top_p : float, optional
        In (0, 1].  Draw only from the smallest set of most probable ids whose probabilities sum
        to at least this, the id that gets there among them: the nucleus of Holtzman et al. 2020
        (arXiv 1904.09751, section 3.1).  With ``top_k`` too, an id must be in both sets, each
        taken from p = softmax(z / T).
    labels : integer array [batch_size], optional
        The class of every sequence, see `marref.model.MAR.forward`; without it, no class.
    guidance_scale : float
        s >= 0; needs ``labels`` unless it is 1, which is the class's own distribution.  0 is that
        of no class, and more than 1 goes beyond the class.
    guidance : {"constant", "linear"}
        Whether all steps have the scale s, or 1 + (s - 1) r, with r the fraction of the sequence
        that is known after the step: as in MAR (Li et al. 2024, arXiv 2406.11838, published code),
        which follows Muse (Chang et al. 2023, arXiv 2301.00704, section 2.7).
    min_p : float, optional
        In (0, 1].  Draw only from ids at least so many times as probable as the most probable one
        (Nguyen et al. 2024, arXiv 2407.01082).
    exclude_ids : sequence of int
        Ids that are never emitted, as [MASK] is not: their logits are -inf.  Known tokens may be
        among them.
    score_temperature : float, optional
        Temperature of the distribution that confidence, margin and entropy are taken from; without
        it ``temperature``.  LLaDA's published code has 1.
    order_temperature : float
        T >= 0.  More than 0: positions are drawn, without replacement, from softmax(score / T), the
        score being p, p₁ - p₂ or Σ p log p (``alg_temp`` in Dream's published code); needs ``rng``.
    reveal : callable, optional
        How many are revealed, instead of the schedule's counts: `Threshold`, `QuotaOrThreshold`,
        `Factor`, `EntropyBounded` or `Independent` of `marref.decoding`, or any function of a
        `Step` to an integer >= 1 for each sequence.  All but QuotaOrThreshold and Independent take
        as many steps as they need, at most one a masked position, whatever ``num_steps`` is.
    block_length : int, optional
        Fill blocks of so many positions from left to right (LLaDA), counted from the first masked
        position of each sequence; the last may be shorter.  The steps are shared out evenly, the
        first blocks getting one more where they do not divide.
    remask : Remask, optional
        What is taken back: `ReMDMCap`, `ReMDMRescale`, `ReMDMConf`, `ReMDMLoop`, `P2` or `Edit` of
        `marref.decoding`.  All but Edit say themselves how many are revealed.
    return_steps : bool

    Returns
    -------
    tokens : int64 array [batch_size, seq_len]
    steps : dict
        With ``return_steps``, the state after every step that was taken (at most num_steps unless
        ``reveal`` or `Edit` says otherwise): ``tokens`` and ``mask`` (True where still masked)
        [steps, batch_size, seq_len], and ``confidence`` of the same shape and the model's dtype:
        where still masked, that of the latest prediction; where revealed, that with which it was
        (with P2, of the latest prediction too); 1 where known from the start.  And what led to
        it: ``score``, -inf where nothing was predicted, ``count`` [steps, batch_size], and True
        where something was ``revealed``, ``taken_back`` or ``replaced``; with ``rng`` the numbers
        that were drawn, NaN where none was: ``uniforms`` for tokens, ``noise`` for the order,
        ``remask_uniforms``.

    Raises
    ------
    TypeError, ValueError
        An argument is of another type or outside its range, two contradict each other, the
        schedule's counts do not add up, or the model's logits are not finite.

    Notes
    -----
    Equal confidences: the lower position is revealed first.  Equal logits: the lower id wins.
    Gumbel noise is drawn in float64: in float32 its tails are cut off (arXiv 2409.02908).

    Confidence is the probability of the token in the whole of p, whatever ``top_k`` and ``top_p``
    keep of it: they say what may be drawn, not how sure the model is.  Dream's published code
    takes that in the part that is left, which is 1 wherever one id is left: ties, which go to the
    lower position, so that decoding silently runs from left to right.  Muse's code (lucidrains)
    takes the whole distribution, at temperature 1.
    """
    tokens = start(model, seq_len, vocab_size, batch_size, mask_token_id, tokens, labels)
    check_params(model, params, tokens)
    rule = Rule(
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

    def predict_at(
        tokens: Array, wanted: Array, uniforms: Array | None, scale: Array
    ) -> Prediction:
        logits = model(params, tokens, labels)[wanted]
        if rule.guides:
            of_rows = np.repeat(scale, wanted.sum(axis=1))
            logits = guide(logits, model(params, tokens)[wanted], of_rows)
        return predict(logits, rule, uniforms, tokens[wanted])

    tokens, steps = decode(predict_at, tokens, rule, rng, params["head"]["bias"].dtype)
    return (tokens, steps) if return_steps else tokens


def decode(
    predict_at: PredictAt,
    tokens: Array,
    rule: Rule,
    rng: np.random.Generator | None,
    dtype: np.dtype[Any],
) -> tuple[Array, dict[str, Array]]:
    """Run the steps of a decoder over what predicts the masked positions.

    Parameters
    ----------
    predict_at : callable
        The model's part, see `PredictAt`: in `iterative_decode` the definition's, in `marref.fast`
        one that computes less.
    tokens : int64 array [batch, length]
        [MASK] where a token is wanted.
    rule : Rule
    rng : numpy.random.Generator or None
    dtype : dtype
        Of the confidences.

    Returns
    -------
    tokens : int64 array [batch, length]
    steps : dict
        As `iterative_decode` returns them.
    """
    rule.check_rng(rng)
    state = State.start(tokens, rule, dtype)
    steps = []
    while state.busy().any():
        view = state.look()
        chance = Chance.draw(rule, view, rng)
        uniforms = None if chance.uniforms is None else chance.uniforms[view.wanted]
        scale = scale_at(1.0 - (state.masked.sum(axis=1) - view.quota) / tokens.shape[1], rule)
        prediction = predict_at(state.tokens, view.wanted, uniforms, scale)
        steps.append(state.advance(view, prediction, chance))
    return state.tokens, _stacked(steps, tokens.shape, dtype)


def check_params(model: MAR, params: Tree, tokens: Array) -> None:
    """Raise unless parameters and tokens fit the model, and the parameters are real."""
    model.check_inputs(params, tokens)
    dtype = params["head"]["bias"].dtype
    if dtype.kind == "c":
        raise TypeError(f"params: dtype {dtype}, expected float32 or float64")


def start(
    model: MAR,
    seq_len: int | None,
    vocab_size: int | None,
    batch_size: int | None,
    mask_token_id: int,
    tokens: npt.ArrayLike | None,
    labels: npt.ArrayLike | None,
) -> npt.NDArray[np.int64]:
    """Check the arguments that say where decoding starts; return the tokens it starts from."""
    check_model(model)
    if vocab_size is not None and checks.integer("vocab_size", vocab_size, 2) != model.vocab_size:
        raise ValueError(
            f"vocab_size: received {vocab_size}, expected the model's {model.vocab_size}"
        )
    checks.integer("mask_token_id", mask_token_id, 0, model.vocab_size - 1)
    if batch_size is not None:
        checks.integer("batch_size", batch_size, 1)
    if seq_len is not None:
        checks.integer("seq_len", seq_len, 1, model.seq_len)
    if tokens is None:
        count = 1
        if labels is not None and model.num_classes is not None:
            count = len(checks.labels("labels", labels, model.num_classes))
        shape = (batch_size or count, seq_len or model.seq_len)
        return np.full(shape, mask_token_id, np.int64)
    known = checks.token_ids("tokens", tokens, model.vocab_size).astype(np.int64)
    checks.shape("tokens", known, (batch_size or known.shape[0], seq_len or known.shape[1]))
    return known


def _stacked(
    steps: list[dict[str, Array]], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> dict[str, Array]:
    """Stack what every step returned; without a step, all but what is drawn, with none in it."""
    if steps:
        return {name: np.array([step[name] for step in steps]) for name in steps[0]}
    kinds: dict[str, Any] = {"tokens": np.int64, "confidence": dtype, "score": dtype}
    kinds |= dict.fromkeys(("mask", "revealed", "taken_back", "replaced"), np.bool_)
    none = {name: np.zeros((0, *shape), kind) for name, kind in kinds.items()}
    return {**none, "count": np.zeros((0, shape[0]), np.int64)}
