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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.loss import log_softmax
from marref.model import MAR, check_model
from marref.schedules import SCHEDULES, Schedule
from marref.trees import Array, Tree

ORDERS = ("confidence", "random")
GUIDANCES = ("constant", "linear")

PredictAt = Callable[[Array, Array, Array | None, Array], tuple[Array, Array]]
"""``(tokens, masked, uniforms, scale)`` to token and log-confidence at the masked positions, see
`predict`; ``scale`` [batch] is that of the guidance."""


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
    schedule : {"cosine", "linear"} or callable
        Reveal counts: ``(num_masked, num_steps) -> counts``, integers >= 1 with the sum
        num_masked, at most num_steps of them; see `marref.schedules`.  Asked once for sequences
        with as many masked positions.
    order : {"confidence", "random"}
        What is revealed first: the most confident tokens, or positions at random (needs ``rng``).
    rng : numpy.random.Generator, optional
        Given, tokens are drawn from softmax(logits / temperature).  Absent, they are the arg max,
        and the result is deterministic.
    choice_temperature : float
        Gumbel noise of this scale, times (1 - k/K) in step k, is added to the log-confidence
        before positions are chosen (MaskGIT's published code, where it is 4.5); needs ``rng``.
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
    return_steps : bool

    Returns
    -------
    tokens : int64 array [batch_size, seq_len]
    steps : dict
        With ``return_steps``, the state after every step that was taken (at most num_steps):
        ``tokens`` and ``mask`` (True where still masked) [steps, batch_size, seq_len], and
        ``confidence`` of the same shape and the model's dtype: where still masked, that of the
        latest prediction; where revealed, that with which it was; 1 where known from the start.

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
    )
    labels = rule.check_labels(model, labels, len(tokens))

    def predict_at(
        tokens: Array, masked: Array, uniforms: Array | None, scale: Array
    ) -> tuple[Array, Array]:
        logits = model(params, tokens, labels)[masked]
        if rule.guides:
            of_rows = np.repeat(scale, masked.sum(axis=1))
            logits = guide(logits, model(params, tokens)[masked], of_rows)
        return predict(logits, rule, uniforms)

    tokens, steps = decode(predict_at, tokens, rule, rng, params["head"]["bias"].dtype)
    return (tokens, steps) if return_steps else tokens


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a decoder does in its steps: arguments of `iterative_decode`, checked when built."""

    num_steps: int
    mask_token_id: int
    temperature: float
    schedule: str | Schedule
    order: str
    choice_temperature: float
    exclude_mask_token: bool
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    guidance: str = "constant"

    def __post_init__(self) -> None:
        checks.integer("num_steps", self.num_steps, 1)
        checks.real("temperature", self.temperature, "[0, inf)")
        checks.real("choice_temperature", self.choice_temperature, "[0, inf)")
        if self.top_k is not None:
            checks.integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            checks.real("top_p", self.top_p, "(0, 1]")
        checks.choice("order", self.order, ORDERS)
        checks.real("guidance_scale", self.guidance_scale, "[0, inf)")
        checks.choice("guidance", self.guidance, GUIDANCES)
        if not callable(self.schedule):
            checks.choice("schedule", self.schedule, SCHEDULES)
        if self.order == "random" and self.choice_temperature > 0:
            raise ValueError(
                f"choice_temperature: received {self.choice_temperature}, "
                'expected 0 with order="random", which does not look at confidence'
            )

    def check_rng(self, rng: np.random.Generator | None) -> None:
        """Raise unless there is a generator where one is needed."""
        if rng is not None:
            checks.generator("rng", rng)
        elif self.order == "random" or self.choice_temperature > 0:
            raise ValueError(
                'rng: received None, but order="random" and choice_temperature need one'
            )

    @property
    def guides(self) -> bool:
        """Whether the logits of no class are needed."""
        return self.guidance_scale != 1.0

    def check_labels(
        self, model: MAR, labels: npt.ArrayLike | None, batch_size: int
    ) -> Array | None:
        """Raise unless labels fit the model, and are there if they are to guide."""
        if self.guides and labels is None:
            raise ValueError(
                f"labels: received None, but guidance_scale={self.guidance_scale} needs them"
            )
        return model.check_labels(labels, batch_size)


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
    masked = tokens == rule.mask_token_id
    counts, num_rounds = reveal_counts(rule, masked.sum(axis=1))
    confidence = np.ones(tokens.shape, dtype)
    steps = []
    for step in range(counts.shape[1]):
        uniforms = None if rng is None else rng.random(masked.sum())
        predicted = tokens.copy()
        log_confidence = np.full(tokens.shape, -np.inf, dtype)
        known = 1.0 - (masked.sum(axis=1) - counts[:, step]) / tokens.shape[1]
        scale = scale_at(known, rule)
        predicted[masked], log_confidence[masked] = predict_at(tokens, masked, uniforms, scale)
        confidence = np.where(masked, np.exp(log_confidence), confidence)

        progress = (step + 1) / np.maximum(num_rounds, 1)
        priority = rank(log_confidence, masked, progress, rule, rng)
        reveal = choose(priority, counts[:, step]) & masked
        tokens = np.where(reveal, predicted, tokens)
        masked = masked & ~reveal
        steps.append({"tokens": tokens, "mask": masked, "confidence": confidence})
    return tokens, _stacked(steps, tokens.shape, dtype)


def scale_at(known: Array, rule: Rule) -> Array:
    """Compute the guidance scale of a step.

    Parameters
    ----------
    known : array [batch]
        The fraction of each sequence that is known after the step.
    rule : Rule

    Returns
    -------
    array [batch]
        s, or with linear guidance 1 + (s - 1) r.
    """
    if rule.guidance == "constant":
        return np.full_like(known, rule.guidance_scale)
    scale: Array = 1.0 + (rule.guidance_scale - 1.0) * known
    return scale


def guide(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """Compute u + s (c - u): from no class towards the class, and beyond it with s > 1.

    Softmax of it is proportional to p(token) (p(token | class) / p(token))^s: since the ratio is
    p(class | token) up to a factor, by Bayes, this sharpens how sure a classifier would be.

    Parameters
    ----------
    conditional, unconditional : arrays [masked, vocab_size]
        Logits c and u.
    scale : array [masked]

    Returns
    -------
    array [masked, vocab_size]
    """
    scale = scale.astype(conditional.dtype)[:, np.newaxis]
    guided: Array = unconditional + scale * (conditional - unconditional)
    return guided


def predict(logits: Array, rule: Rule, uniforms: Array | None) -> tuple[Array, Array]:
    """Predict a token from each row of logits, with the logarithm of its confidence.

    The token is the arg max or, given a number u uniform in [0, 1) for each row, the first id
    whose cumulative probability, of what `keep` keeps, is above u.  Two tokens that are so sure
    that both confidences round to 1 still differ in the logarithm.

    Parameters
    ----------
    logits : array [masked, vocab_size]
    rule : Rule
    uniforms : float64 array [masked] or None

    Returns
    -------
    tokens : integer array [masked]
    log_confidence : array [masked]
    """
    checks.finite("logits", logits)
    if rule.exclude_mask_token:
        logits = logits.copy()
        logits[:, rule.mask_token_id] = -np.inf
    # Less the maximum first, so that a division by a small temperature overflows downwards only.
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = log_softmax(over_temperature(shifted, rule.temperature or 1.0))
    tokens = logits.argmax(axis=1)
    if uniforms is not None and rule.temperature > 0:
        kept = keep(logits, np.exp(log_probabilities), rule)
        cumulative = np.cumsum(kept, axis=1, dtype=np.float64)
        bound = uniforms * cumulative[:, -1]
        tokens = (cumulative <= bound[:, np.newaxis]).sum(axis=1)
    return tokens, log_probabilities[np.arange(len(tokens)), tokens]


def keep(logits: Array, probabilities: Array, rule: Rule) -> Array:
    """Set to 0 the probabilities of the ids that top_k or top_p does not keep.

    Both look at the ids in order of falling logits, the lower of equals first, and keep the first
    of them: top_k so many, top_p those before which the sum is not yet p.

    Parameters
    ----------
    logits, probabilities : arrays [masked, vocab_size]
    rule : Rule

    Returns
    -------
    array [masked, vocab_size]
        Not normalised: what is drawn from it is, by its sum.
    """
    if rule.top_k is None and rule.top_p is None:
        return probabilities
    order = np.argsort(-logits, axis=1, kind="stable")
    falling = np.take_along_axis(probabilities, order, axis=1)
    if rule.top_p is not None:
        sums = np.cumsum(falling, axis=1, dtype=np.float64)
        # In float32 the sum of all is not 1 exactly.
        falling[:, 1:][sums[:, :-1] >= rule.top_p * sums[:, -1:]] = 0.0
    if rule.top_k is not None:
        falling[:, rule.top_k :] = 0.0
    kept = np.empty_like(falling)
    np.put_along_axis(kept, order, falling, axis=1)
    return kept


def over_temperature(z: Array, temperature: float) -> Array:
    """Compute z/T, with the nearest T that the dtype has: 0 and infinity would give NaN."""
    limits = np.finfo(z.dtype)
    with np.errstate(over="ignore"):
        scaled: Array = z / float(np.clip(temperature, limits.tiny, limits.max))
    return scaled


def rank(
    log_confidence: Array,
    masked: Array,
    progress: Array,
    rule: Rule,
    rng: np.random.Generator | None,
) -> Array:
    """Give every position the number by which it is revealed, the largest first.

    Parameters
    ----------
    log_confidence : array [batch, length]
        -inf where nothing is masked.
    masked : bool array [batch, length]
    progress : array [batch]
        k/K in step k of K.
    rule : Rule
    rng : numpy.random.Generator or None

    Returns
    -------
    float64 array [batch, length]
        The log-confidence; with a choice temperature c, c (1 - k/K) Gumbel noise more; in random
        order, uniform numbers where masked.
    """
    priority = log_confidence.astype(np.float64)
    if rng is not None and rule.order == "random":
        priority[masked] = rng.random(masked.sum())
    elif rng is not None and rule.choice_temperature > 0:
        annealed = rule.choice_temperature * (1.0 - progress)
        priority += annealed[:, np.newaxis] * rng.gumbel(size=priority.shape)
    return priority


def choose(priority: Array, count: Array) -> Array:
    """Mark the ``count`` entries of highest priority in each row, of equals the lower position.

    Sorting gives the positions in order of priority; sorting these gives each position its place
    in that order: 0 for the first to be revealed.

    Parameters
    ----------
    priority : array [batch, length]
    count : integer array [batch]

    Returns
    -------
    bool array [batch, length]
    """
    order = np.argsort(-priority, axis=1, kind="stable")
    place = np.argsort(order, axis=1)
    chosen: Array = place < count[:, np.newaxis]
    return chosen


def reveal_counts(rule: Rule, num_masked: Array) -> tuple[Array, Array]:
    """Ask the schedule how many tokens each sequence reveals in each step.

    Parameters
    ----------
    rule : Rule
    num_masked : integer array [batch]

    Returns
    -------
    counts : int64 array [batch, steps]
        Sequences with fewer steps than others have zeros at the end.
    num_rounds : int64 array [batch]
        The steps of each sequence.

    Raises
    ------
    ValueError
        The schedule's counts are not as `iterative_decode` says.
    """
    schedule = rule.schedule if callable(rule.schedule) else SCHEDULES[rule.schedule]
    ask = functools.cache(schedule)
    rows = []
    for masked in map(int, num_masked):
        row = np.asarray(ask(masked, rule.num_steps)) if masked else np.zeros(0, np.int64)
        check_counts(row, masked, rule.num_steps)
        rows.append(row)
    num_rounds = np.array([len(row) for row in rows])
    counts = np.zeros((len(rows), num_rounds.max()), np.int64)
    for padded, row in zip(counts, rows, strict=True):
        padded[: len(row)] = row
    return counts, num_rounds


def check_counts(counts: Array, num_masked: int, num_steps: int) -> None:
    """Raise unless every step reveals something, and all is revealed in time."""
    integers = counts.ndim == 1 and counts.dtype.kind in "iu" and len(counts) <= num_steps
    if not integers or (counts < 1).any() or counts.sum() != num_masked:
        raise ValueError(
            f"schedule: returned {counts!r} for {num_masked} masked positions, "
            f"expected at most {num_steps} integers >= 1 with the sum {num_masked}"
        )


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
    """Stack the states after every step: [steps, batch, length], also where there was no step."""
    dtypes = {"tokens": np.dtype(np.int64), "mask": np.dtype(np.bool_), "confidence": dtype}
    return {
        name: np.array([step[name] for step in steps], kind).reshape(len(steps), *shape)
        for name, kind in dtypes.items()
    }
