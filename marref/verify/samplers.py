"""Samplers of the golden vectors: decoders with the numbers that chance gave them.

A port is held to every rule of `marref.decoding` without sharing a random generator: the file says
which numbers were drawn, one for every position of every step, whether or not the rule asks for it
there.  What a step does with them is a function, and all that it comes to is in the file.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from marref import decoding
from marref.model import MAR
from marref.trees import Array

FURTHER_STEPS = 2
"""So many steps of `Edit` are recorded after those of the schedule."""

_SEED = 11
"""With which every fault of a sampler shows in the tiny golden vectors, and float32 decides all."""

_RARE = (2.0**-40, 1.0 - 2.0**-40)
"""Numbers at two positions of the first step, that programs cut off or float32 rounds to 1."""


def settings(model: MAR) -> dict[str, dict[str, Any]]:
    """List the samplers of a model's golden vectors, as JSON says them.

    Parameters
    ----------
    model : MAR

    Returns
    -------
    dict of str to dict
        Arguments of `marref.iterative_decode`, by the sampler's name; ``reveal`` and ``remask`` are
        dicts, see `rule_of`.
    """
    three, four = {"num_steps": 3}, {"num_steps": 4, "temperature": 0.5}
    chosen: dict[str, dict[str, Any]] = {
        "confidence": {**three, "temperature": 0.5},
        "untempered": {**three, "temperature": 0.5, "score_temperature": 1.0},
        "top-k": {**three, "top_k": 3},
        "top-p": {**three, "temperature": 2.0, "top_p": 0.7},
        "top-k-top-p": {**three, "temperature": 2.0, "top_k": 4, "top_p": 0.8},
        "min-p": {**three, "temperature": 2.0, "min_p": 0.3},
        "excluded": {**three, "exclude_ids": list(range(3, model.vocab_size, 2))},
        "gumbel": {"num_steps": 4, "choice_temperature": 2.0},
        "drawn-order": {**three, "order_temperature": 0.25},
        "margin": {**three, "order": "margin"},
        "entropy": {**three, "order": "entropy"},
        "random": {**three, "order": "random"},
        "left-to-right": {**three, "order": "left-to-right"},
        "halton": {**three, "order": "halton"},
        "blocks": {"num_steps": 4, "block_length": math.ceil(model.seq_len / 3)},
        "threshold": {**four, "reveal": {"rule": "threshold", "probability": 0.6}},
        "certain": {"num_steps": 2, "reveal": {"rule": "threshold", "probability": 1.0}},
        "quota": {
            **three,
            "temperature": 0.5,
            "reveal": {"rule": "quota-or-threshold", "probability": 0.6},
        },
        "factor": {**four, "reveal": {"rule": "factor", "factor": 1.0}},
        "entropy-bounded": {**four, "reveal": {"rule": "entropy-bounded", "bound": 1.5}},
        "independent": {**three, "order": "random", "reveal": {"rule": "independent"}},
        "remdm-cap": {"remask": {"rule": "remdm-cap", "eta": 0.5}},
        "remdm-rescale": {"remask": {"rule": "remdm-rescale", "eta": 0.7}},
        "remdm-conf": {"remask": {"rule": "remdm-conf"}},
        "remdm-loop": {
            "remask": {"rule": "remdm-loop", "eta": 0.5, "t_on": 0.7, "t_off": 0.1, "alpha_on": 0.6}
        },
        "p2": {**four, "remask": {"rule": "p2"}},
        "edit": {**three, "order": "random", "remask": {"rule": "edit", "bound": 0.4}},
    }
    chosen["entropy-bounded"]["order"] = "entropy"
    for name, options in chosen.items():
        if name.startswith("remdm-"):
            options |= {"num_steps": 4, "order": "random"}
    if math.isqrt(model.seq_len) ** 2 != model.seq_len:
        del chosen["halton"]
    return chosen


def rule_of(options: Mapping[str, Any]) -> decoding.Rule:
    """Build the rule that a sampler's settings say.

    ``{"rule": "threshold", "probability": 0.9}`` is ``Threshold(probability=0.9)``, by the names of
    `marref.decoding.REVEALS` and `marref.decoding.REMASKS`.
    """
    built: dict[str, Any] = {
        "mask_token_id": 0,
        "temperature": 1.0,
        "schedule": "cosine",
        "order": "confidence",
        "choice_temperature": 0.0,
        "exclude_mask_token": True,
        **options,
    }
    for key, rules in (("reveal", decoding.REVEALS), ("remask", decoding.REMASKS)):
        if key in options:
            said = dict(options[key])
            built[key] = rules[said.pop("rule")](**said)
    return decoding.Rule(**built)


def draw(name: str, rule: decoding.Rule, shape: tuple[int, int]) -> dict[str, Array]:
    """Draw the numbers of a sampler, uniform in [0, 1).

    Parameters
    ----------
    name : str
        The sampler's; it is the seed.
    rule : Rule
    shape : tuple of int
        [rows, length]

    Returns
    -------
    dict of str to float64 array [steps, rows, length]
        ``uniforms``, for tokens; if the order is one of chance ``order_uniforms``, and Gumbel
        ``noise`` made of them unless it is random; if tokens are taken back by chance
        ``remask_uniforms``.
    """
    rng = np.random.default_rng([_SEED, *name.encode()])
    steps = rule.num_steps + FURTHER_STEPS * isinstance(rule.remask, decoding.Edit)
    drawn = {"uniforms": rng.random((steps, *shape))}
    if rule.needs_rng:
        uniforms = rng.random((steps, *shape))
        uniforms[0, 0, : len(_RARE)] = _RARE[: shape[1]]
        drawn["order_uniforms"] = uniforms
        if rule.order != "random":
            drawn["noise"] = gumbel(uniforms)
    if rule.remask is not None and rule.remask.needs_rng:
        drawn["remask_uniforms"] = rng.random((steps, *shape))
    return drawn


def gumbel(uniforms: Array) -> Array:
    """Turn numbers uniform in (0, 1) into Gumbel noise, -log(-log u), in float64."""
    noise: Array = -np.log(-np.log(uniforms))
    return noise


def run(
    rule: decoding.Rule,
    start: Array,
    drawn: Mapping[str, Array],
    logits_at: Callable[[int, Array], Array],
) -> dict[str, Array]:
    """Take the steps for which there are numbers; a sequence that is complete stays as it is.

    Parameters
    ----------
    rule : Rule
    start : int64 array [rows, length]
    drawn : dict of str to array
        From `draw`.
    logits_at : callable
        ``(step, tokens)`` to the logits [rows, length, vocab_size].

    Returns
    -------
    dict of str to array [steps, …]
        ``logits``, and what `marref.iterative_decode` returns with ``return_steps``.
    """
    steps: list[dict[str, Array]] = []
    logits = logits_at(0, start)
    state = decoding.State.start(start, rule, logits.dtype)
    for step, uniforms in enumerate(drawn["uniforms"]):
        if step > 0:
            logits = logits_at(step, state.tokens)
        view = state.look()
        at = view.wanted
        prediction = decoding.predict(logits[at], rule, uniforms[at], state.tokens[at])
        drawn_now = {key: array[step] for key, array in drawn.items()}
        noise = drawn_now.get("noise", drawn_now.get("order_uniforms"))
        chance = decoding.Chance(uniforms, noise, drawn_now.get("remask_uniforms"))
        steps.append({"logits": logits, **state.advance(view, prediction, chance)})
    return {key: np.array([step[key] for step in steps]) for key in steps[0]}
