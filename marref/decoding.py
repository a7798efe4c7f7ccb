"""The iterative decoder: from all [MASK] to a full sequence in K steps.

In every step the model predicts all masked positions at once; the most confident predictions are
revealed and stay, the others are predicted again.  With z the logits of a position and T the
temperature,

    p = softmax(z / T)         the id of [MASK] left out: its logit is -inf
    token = arg max z          or, with an rng, drawn from p
    confidence = p[token]

How many are revealed in a step is the reveal schedule's word (`marref.schedules`).  Chang et al.
2022 (MaskGIT, arXiv 2202.04200, section 3.2) introduced the scheme.
"""

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, parallel
from marref.loss import log_softmax
from marref.model import MAR, check_model, head_forward
from marref.schedules import SCHEDULES, Schedule
from marref.shares import encode_masked
from marref.trees import Array, Tree

ORDERS = ("confidence", "random")

_LOGITS_AT_ONCE = 2**20


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
    return_steps: bool = False,
    num_threads: int = 1,
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
        T > 0.  Scales the confidence, and the distribution that tokens are drawn from; arg max
        does not depend on it.
    batch_size : int, optional
        Number of sequences, 1 unless ``tokens`` say otherwise.
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
    return_steps : bool
    num_threads : int
        How many threads share the work, see `marref.parallel.threads`: the sequences or, if there
        are fewer than threads, the heads and the positions of each block.  The result is the same
        up to rounding.

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
    """
    tokens = _start(model, seq_len, vocab_size, batch_size, mask_token_id, tokens)
    model.check_inputs(params, tokens)
    dtype = params["head"]["bias"].dtype
    if dtype.kind == "c":
        raise TypeError(f"params: dtype {dtype}, expected float32 or float64")
    checks.integer("num_steps", num_steps, 1)
    num_threads = checks.integer("num_threads", num_threads, 1)
    temperature = checks.real("temperature", temperature, "(0, inf)")
    choice_temperature = checks.real("choice_temperature", choice_temperature, "[0, inf)")
    checks.choice("order", order, ORDERS)
    if not callable(schedule):
        schedule = SCHEDULES[checks.choice("schedule", schedule, SCHEDULES)]
    if rng is not None:
        checks.generator("rng", rng)
    elif order == "random" or choice_temperature > 0:
        raise ValueError('rng: received None, but order="random" and choice_temperature need one')
    if order == "random" and choice_temperature > 0:
        raise ValueError(
            f"choice_temperature: received {choice_temperature}, "
            'expected 0 with order="random", which does not look at confidence'
        )

    masked = tokens == mask_token_id
    counts, num_rounds = _reveal_counts(schedule, masked.sum(axis=1), num_steps)
    confidence = np.ones(tokens.shape, dtype)
    trace_shape = (counts.shape[1], *tokens.shape)
    steps = {
        "tokens": np.empty(trace_shape, np.int64),
        "mask": np.empty(trace_shape, np.bool_),
        "confidence": np.empty(trace_shape, dtype),
    }

    def predict(hidden: Array, uniforms: Array | None) -> tuple[Array, Array]:
        """Predict a token at each of the positions, a few at a time: logits are large."""

        def share(part: slice) -> tuple[Array, Array]:
            logits, _ = head_forward(model, params, hidden[part])
            checks.finite("logits", logits)
            if exclude_mask_token:
                logits[:, mask_token_id] = -np.inf
            return _predict(logits, temperature, None if uniforms is None else uniforms[part])

        num_parts = math.ceil(len(hidden) * model.vocab_size / _LOGITS_AT_ONCE)
        parts = run(share, parallel.split(len(hidden), num_parts))
        predicted, log_confidence = map(np.concatenate, zip(*parts, strict=True))
        return predicted, log_confidence

    with parallel.threads(num_threads) as run:
        for step in range(counts.shape[1]):
            # From nothing, all sequences are the same in the first step.
            from_nothing = step == 0 and masked.all()
            todo = slice(1) if from_nothing else masked.any(axis=1)
            hidden = encode_masked(model, params, tokens[todo], masked[todo], run, num_threads)
            if from_nothing:
                hidden = np.tile(hidden, (len(tokens), 1))
            uniforms = None if rng is None else rng.random(len(hidden))
            predicted, log_confidence = predict(hidden, uniforms)
            confidence[masked] = np.exp(log_confidence)

            priority = np.full(tokens.shape, -np.inf)
            priority[masked] = log_confidence
            if rng is not None and order == "random":
                priority[masked] = rng.random(len(predicted))
            elif rng is not None and choice_temperature > 0:
                annealed = choice_temperature * (1.0 - (step + 1) / np.maximum(num_rounds, 1))
                priority += annealed[:, np.newaxis] * rng.gumbel(size=tokens.shape)

            # Stable, so that of equal priorities the lower position comes first.
            rank = np.argsort(np.argsort(-priority, axis=1, kind="stable"), axis=1)
            reveal = masked & (rank < counts[:, step, np.newaxis])
            tokens[reveal] = predicted[reveal[masked]]
            masked &= ~reveal
            steps["tokens"][step] = tokens
            steps["mask"][step] = masked
            steps["confidence"][step] = confidence
    return (tokens, steps) if return_steps else tokens


def _start(
    model: MAR,
    seq_len: int | None,
    vocab_size: int | None,
    batch_size: int | None,
    mask_token_id: int,
    tokens: npt.ArrayLike | None,
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
        shape = (batch_size or 1, seq_len or model.seq_len)
        return np.full(shape, mask_token_id, np.int64)
    known = checks.token_ids("tokens", tokens, model.vocab_size).astype(np.int64)
    checks.shape("tokens", known, (batch_size or known.shape[0], seq_len or known.shape[1]))
    return known


def _reveal_counts(
    schedule: Schedule, num_masked: Array, num_steps: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Reveal counts [batch, steps], and the number of steps of each sequence [batch].

    Sequences with fewer steps than others get zeros at the end.
    """
    rows = []
    schedule = functools.cache(schedule)
    for masked in map(int, num_masked):
        row = np.asarray(schedule(masked, num_steps)) if masked else np.zeros(0, np.int64)
        integers = row.ndim == 1 and row.dtype.kind in "iu" and len(row) <= num_steps
        if not integers or (row < 1).any() or row.sum() != masked:
            raise ValueError(
                f"schedule: returned {row!r} for {masked} masked positions, "
                f"expected at most {num_steps} integers >= 1 with the sum {masked}"
            )
        rows.append(row)
    num_rounds = np.array([len(row) for row in rows])
    counts = np.zeros((len(rows), num_rounds.max()), np.int64)
    for padded, row in zip(counts, rows, strict=True):
        padded[: len(row)] = row
    return counts, num_rounds


def _predict(
    logits: Array, temperature: float, uniforms: Array | None
) -> tuple[npt.NDArray[np.intp], Array]:
    """Predict a token from each row of logits, with the logarithm of its confidence.

    The token is the arg max or, given a number u uniform in [0, 1) for each row, the first id
    whose cumulative probability is above u.  The confidence of the arg max is 1/(1 + Σ odds), the
    odds of the others being exp((z - z_max)/T); its logarithm tells sure tokens apart that a
    float32 probability rounds to 1.
    """
    largest = np.arange(len(logits)), logits.argmax(axis=1)
    odds = logits - logits[largest][:, np.newaxis]
    # The nearest temperature that the dtype has: 0 or infinity would give 0/0.
    limits = np.finfo(logits.dtype)
    with np.errstate(over="ignore"):
        odds /= float(np.clip(temperature, limits.tiny, limits.max))
    if uniforms is not None:
        log_probabilities = log_softmax(odds)
        cumulative = np.cumsum(np.exp(log_probabilities), axis=1, dtype=np.float64)
        bound = uniforms * cumulative[:, -1]
        predicted = (cumulative <= bound[:, np.newaxis]).sum(axis=1)
        return predicted, log_probabilities[largest[0], predicted]
    np.exp(odds, out=odds)
    odds[largest] = 0.0
    return largest[1], -np.log1p(odds.sum(axis=1))
