"""Golden vectors: everything that it takes to check an implementation, as named arrays.

`make` draws a model and a batch from a seed and computes, with marref itself:

    params/<name>                      the parameters
    input/tokens, targets, mask        the batch: [MASK] where masked, the true ids, 1 where masked
    input/labels                       the classes of its sequences, where the model has classes
    activations/<name>                 the forward pass, see `marref.verify.trace`
    loss                               scalar, nats
    gradients/<name>                   of the parameters, the last layer first, and between them
    activation_gradients/<name>        of the residual stream: logits, blocks.<i>.output, embedding
    adam/<step>/<name>                 parameters after steps 1, 2 and 10 on this batch
    adamw/<step>/<name>                the same with decoupled weight decay
    clipped/<step>/<name>              the same as adam, with the gradients clipped
    schedule/<name>/<masked>/<steps>   reveal counts
    decode/<setting>/start             what the decoder starts from,
    decode/<setting>/steps/<name>      confidence, tokens and mask after every step,
    decode/<setting>/tokens            and its result
    ties/<setting>/…                   the same where all confidences are 1
    guidance/<setting>/…               the same with labels, where the model has classes
    samplers/<rule>/…                  with numbers for chance, see `marref.verify.samplers`

Parameters are drawn so that nothing hides: biases are not 0, scales not 1, activations of order
one, and one token nearly cancels the position that it stands at, so that the variance there is
so small that the epsilon of a layer norm shows.  All parameters are bfloat16 numbers: an
implementation in any precision starts from exactly the same model.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import marref
from marref import checks, decoding, loss, optim, schedules, trees
from marref.layers import block, dropout
from marref.model import MAR, head_backward
from marref.positions import sinusoidal_table
from marref.trees import Array, Tree
from marref.verify import samplers, trace
from marref.verify.rounding import round_to

PRESETS = {
    "tiny": MAR(vocab_size=7, embed_dim=6, num_layers=2, num_heads=2, seq_len=5, dropout=0.0),
    "small": MAR(vocab_size=18, embed_dim=64, num_layers=2, num_heads=4, seq_len=64, dropout=0.0),
}
"""Models for `make`, by name: one to look at, and one of the size of the demo's."""

_ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}

OPTIMISERS: dict[str, dict[str, float]] = {
    "adam": {**_ADAM, "weight_decay": 0.0},
    "adamw": {**_ADAM, "weight_decay": 0.1},
    "clipped": {**_ADAM, "weight_decay": 0.0, "max_norm": 0.1},
}
"""Arguments of `marref.optim.step`, and of the clipping before it."""
OPTIMISER_STEPS = (1, 2, 10)

DECODINGS: dict[str, dict[str, Any]] = {
    "one-step": {"num_steps": 1},
    "cosine-3": {"num_steps": 3},
    "cosine-8": {"num_steps": 8},
    "linear-3": {"num_steps": 3, "schedule": "linear"},
    "cold": {"num_steps": 3, "temperature": 0.5},
    "hot": {"num_steps": 3, "temperature": 2.0},
    "known": {"num_steps": 3},
    "plain": {"num_steps": 3, "exclude_mask_token": False},
}
"""Arguments of `marref.iterative_decode`; "known" starts from tokens, the others from [MASK]."""

TIES: dict[str, dict[str, Any]] = {
    "default": {"num_steps": 3},
    "plain": {"num_steps": 3, "exclude_mask_token": False},
}
"""The same, for a head that gives every position the same logits; see `_saturated`."""

GUIDANCE: dict[str, dict[str, Any]] = {
    "class": {"num_steps": 3},
    "constant": {"num_steps": 3, "guidance_scale": 3.0},
    "linear": {"num_steps": 3, "guidance_scale": 3.0, "guidance": "linear"},
    "known": {"num_steps": 3, "guidance_scale": 3.0, "guidance": "linear"},
}
"""The same of a model with classes, with the labels of the sequences that it starts from."""

CONVENTIONS = {
    "layout": "row-major; kernels are [in, out], y = x kernel + bias",
    "heads": "head h reads features h * head_dim to (h + 1) * head_dim - 1",
    "mask": "1 where a position is masked; id 0 is [MASK]",
    "loss": "mean over all masked positions of the batch, in nats",
    "key bias": "its gradient, which is 0, is set to 0 before every optimiser step",
    "ties": "in ties/ the head's kernel is 0, and its bias 0 but for 200 at id 1, 400 at [MASK]",
    "samplers": "a token is the first id whose cumulative probability is above its uniform number",
}

CLASS_CONVENTIONS = {
    "classes": "the last row of class_embedding.table is no class, which decode/ and ties/ have",
    "guidance": "logits u + s (c - u); linear: s = 1 + (guidance_scale - 1) known after the step",
}
"""The same, of a model with classes."""

# In (10, 4) the linear schedule comes to halves.
COUNTS = (*((masked, steps) for masked in (5, 16, 64, 256) for steps in (1, 3, 8, 12)), (10, 4))
FEW_COUNTS = ((5, 3), (10, 4), (64, 8), (256, 12))
"""Masked positions and steps of the schedules; the few are those of all but MAR's own two."""

BATCH = 4

MOST_SAMPLER_LOGITS = 2**17
"""Of a large model, a file would hold little else than the logits of each step of each sampler."""


def draw(model: MAR, seed: int) -> tuple[Tree, dict[str, Array]]:
    """Draw parameters and a batch in which nothing hides.

    Parameters
    ----------
    model : MAR
    seed : int

    Returns
    -------
    params : dict
        float64; every number is a bfloat16.
    batch : dict
        ``tokens``, ``targets`` and ``mask``, int64 [4, seq_len]: the first sequence has all
        positions masked but one, the second about half, the third one, the fourth none.  With
        classes ``labels``, int64 [4]: the first two are equal, the third is no class, the fourth
        another.
    """
    rng = np.random.default_rng(seed)
    leaves = {name: draw_leaf(name, shape, rng) for name, shape in model.parameter_shapes.items()}
    targets = rng.integers(1, model.vocab_size, (BATCH, model.seq_len))
    # A token that stands at position 0 of the last sequence, unmasked, and nearly cancels it.
    cancelling = targets[-1, 0]
    waves = sinusoidal_table(model.seq_len, model.embed_dim, model.positions)
    table = leaves["embedding.table"]
    others = waves[0]
    mask = draw_mask(targets.shape, rng)
    labels = None
    if model.num_classes is not None:
        labels = draw_labels(BATCH, model.num_classes, rng)
        others = others + leaves["class_embedding.table"][labels[-1]]
    table[cancelling] = 0.05 * table[cancelling] - others

    params = trees.unflatten({name: round_to(leaf, "bfloat16") for name, leaf in leaves.items()})
    batch = {"tokens": np.where(mask == 1, 0, targets), "targets": targets, "mask": mask}
    if labels is not None:
        batch["labels"] = labels
    return params, batch


def draw_leaf(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Draw a parameter of a name, of which nothing is 0, and no scale 1."""
    noise: Array = rng.normal(size=shape)
    if name.endswith(("table", "vector")):
        return noise
    scaled: Array = (shape[0] ** -0.5 if name.endswith("kernel") else 0.3) * noise
    return 1.0 + scaled if name.endswith("scale") else scaled


def draw_mask(shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Draw a mask: all positions of a sequence but one, about half, one, none, and so on.

    Parameters
    ----------
    shape : tuple of int
        [batch, length]
    rng : numpy.random.Generator

    Returns
    -------
    int64 array [batch, length]
        1 where a position is masked.
    """
    mask = np.zeros(shape, np.int64)
    counts = (shape[1] - 1, shape[1] // 2, 1, 0)
    for row in range(shape[0]):
        mask[row, rng.permutation(shape[1])[: counts[row % len(counts)]]] = 1
    return mask


def draw_labels(count: int, num_classes: int, rng: np.random.Generator) -> Array:
    """Draw a class: of every three sequences two have it, one no class; then the next: [count]."""
    sequences = np.arange(count)
    labels: Array = (rng.integers(num_classes) + sequences // 3) % num_classes
    labels[2::3] = num_classes
    return labels


def compute(model: MAR, params: Tree, batch: dict[str, Array]) -> dict[str, Array]:
    """Compute everything that follows from parameters and a batch, in the parameters' dtype.

    Parameters
    ----------
    model : MAR
        Without dropout.
    params : dict
    batch : dict
        From `draw`.

    Returns
    -------
    dict of str to array
        In the order of computation; see the head of this module.
    """
    arrays: dict[str, Array] = {}
    for stage in stages(model, params, batch).values():
        arrays |= stage()
    return arrays


def stages(
    model: MAR,
    params: Tree,
    batch: dict[str, Array],
    nudge: Callable[[Tree], Tree] = lambda grads: grads,
) -> dict[str | tuple[str, ...], Callable[[], dict[str, Array]]]:
    """Split `compute` into stages, each to be run only if something of it is asked for.

    Parameters
    ----------
    model, params, batch
        As `compute` has them.
    nudge : callable
        What is done to the gradients before every step of an optimiser.

    Returns
    -------
    dict of str, or tuple of str, to callable
        By the prefix, or prefixes, of the names that the stage computes, in the order of
        computation.
    """

    @functools.cache
    def passes() -> _Passes:
        return _passes(model, params, batch)

    return {
        "activations/": lambda: _forward(model, params, batch),
        "loss": lambda: {"loss": np.asarray(passes().loss)},
        ("gradients/", "activation_gradients/"): lambda: _last_layer_first(model, params, passes()),
        **{
            f"{name}/": functools.partial(_optimise, model, params, batch, nudge, name, options)
            for name, options in OPTIMISERS.items()
        },
        "schedule/": _schedules,
        **{
            f"{section}/{name}/": functools.partial(
                _decode, model, params, batch, f"{section}/{name}", options
            )
            for section, settings in decoder_sections(model).items()
            for name, options in settings.items()
        },
        **{
            f"samplers/{name}/": functools.partial(_sample, model, params, batch, name, options)
            for name, options in samplers.settings(model).items()
        },
    }


def decoder_sections(model: MAR) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the sections of decodings that golden vectors of a model have, and their settings."""
    of_classes = {} if model.num_classes is None else {"guidance": GUIDANCE}
    return {"decode": DECODINGS, "ties": TIES, **of_classes}


def inputs(model: MAR) -> list[str]:
    """Name the inputs, as `draw` returns them."""
    return ["tokens", "targets", "mask", *(["labels"] if model.num_classes is not None else [])]


def make(
    model: MAR, seed: int = 0, dtype: npt.DTypeLike = np.float64
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Make golden vectors.

    Parameters
    ----------
    model : MAR
        Its dropout is ignored: golden vectors are about what can be repeated.
    seed : int
    dtype : float64 or float32
        In which the results are *stored*; they are computed in float64 always.

    Returns
    -------
    arrays : dict of str to array
        In the order in which an implementation would compute them.
    metadata : dict
        ``format``, ``config`` (the hyper-parameters), ``seed``, ``versions``, ``conventions``,
        ``optimisers``, ``decodings``, ``ties``, ``samplers`` and, with classes, ``guidance`` (the
        arguments of each), ``order`` (the names of the arrays).
    """
    check_asked(seed, dtype)
    model = dataclasses.replace(model, dropout=0.0)
    return make_from(model, *draw(model, seed), seed=seed, dtype=dtype)


def check_asked(seed: int, dtype: npt.DTypeLike) -> None:
    """Raise unless golden vectors can be drawn from a seed, and stored in a dtype."""
    checks.integer("seed", seed, 0)
    if trees.check_dtype("dtype", dtype).kind == "c":
        raise TypeError(f"dtype: received {dtype}, expected float64 or float32")


def make_from(
    model: MAR,
    params: Tree,
    batch: dict[str, Array],
    *,
    seed: int | None = None,
    dtype: npt.DTypeLike = np.float64,
    activations: Collection[str] = ("*",),
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Make golden vectors of given parameters and a given batch.

    Parameters
    ----------
    model : MAR
        Its dropout is ignored.
    params : dict
    batch : dict
        ``tokens``, ``targets`` and ``mask``, integers [batch, length], and of a model with classes
        ``labels`` [batch], as `draw` makes them.
    seed : int, optional
        For the metadata.
    dtype : float64 or float32
        As in `make`.
    activations : collection of str
        Patterns (see `fnmatch`) of the activations, and gradients of activations, to be kept:
        ``"blocks.0.*"``.

    Returns
    -------
    arrays, metadata : dict
        As `make` returns them.
    """
    model = dataclasses.replace(model, dropout=0.0)
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float64), params)
    model.check_inputs(params, batch["tokens"])
    checks.token_ids("targets", batch["targets"], model.vocab_size)
    model.check_labels(batch.get("labels"), len(batch["tokens"]))
    arrays = {
        **_named("params", params),
        **{f"input/{name}": array for name, array in batch.items()},
        **compute(model, params, batch),
    }
    arrays = {
        name: array.astype(dtype) if array.dtype.kind == "f" and not is_drawn(name) else array
        for name, array in arrays.items()
        if _is_kept(name, array, activations)
    }
    if not any(name.startswith("activations/") for name in arrays):
        raise ValueError(f"activations: none is called {' or '.join(activations)}")
    of_classes = model.num_classes is not None
    metadata = described(
        model.as_dict(),
        seed,
        arrays,
        conventions=CONVENTIONS | (CLASS_CONVENTIONS if of_classes else {}),
        optimisers=OPTIMISERS,
        decodings=DECODINGS,
        ties=TIES,
        samplers=samplers.settings(model),
        **({"guidance": GUIDANCE} if of_classes else {}),
    )
    return arrays, metadata


def described(
    config: dict[str, Any], seed: int | None, arrays: dict[str, Array], **own: Any
) -> dict[str, Any]:
    """Write the metadata of golden vectors, of either model: what all have, and their own."""
    return {
        "format": "marref golden vectors 1",
        "config": config,
        "seed": seed,
        "versions": {"marref": marref.__version__, "numpy": np.__version__},
        **own,
        "order": list(arrays),
    }


def _is_kept(name: str, array: Array, activations: Collection[str]) -> bool:
    """Whether a file holds an array: what a pattern keeps, and few logits of a sampler."""
    if name.startswith("samplers/") and name.endswith("/logits"):
        return array.size <= MOST_SAMPLER_LOGITS
    if not name.startswith(("activations/", "activation_gradients/")):
        return True
    return any(fnmatch.fnmatchcase(name.split("/")[1], pattern) for pattern in activations)


def is_drawn(name: str) -> bool:
    """Whether an array is one of chance's numbers, which stay float64 in a float32 file."""
    return name.startswith("samplers/") and name.endswith(("uniforms", "/noise"))


def shipped(name: str) -> Path:
    """Return where a golden file that ships with the package is.

    Parameters
    ----------
    name : {"tiny"}
    """
    checks.choice("golden", name, ("tiny",))
    return Path(__file__).parent.parent / "datasets" / "golden-tiny.npz"


def _named(section: str, tree: Tree) -> dict[str, Array]:
    return {f"{section}/{name}": leaf for name, leaf in trees.flatten(tree).items()}


def _forward(model: MAR, params: Tree, batch: dict[str, Array]) -> dict[str, Array]:
    named = trace.activations(model, params, batch["tokens"], batch.get("labels"))
    return {f"activations/{name}": array for name, array in named.items()}


class _Passes(NamedTuple):
    """What the forward and the backward pass compute of a batch."""

    loss: np.inexact
    cache: Tree
    dlogits: Array
    grads: Tree


def _passes(model: MAR, params: Tree, batch: dict[str, Array]) -> _Passes:
    logits, cache = model.forward(params, batch["tokens"], labels=batch.get("labels"))
    value, loss_cache = loss.forward(logits, batch["targets"], batch["mask"])
    dlogits = loss.backward(loss_cache)
    return _Passes(value, cache, dlogits, model.backward(params, dlogits, cache))


def _last_layer_first(model: MAR, params: Tree, passes: _Passes) -> dict[str, Array]:
    """Name gradients, between them those of the residual stream, as the backward pass has them."""
    _, cache, dlogits, grads = passes
    leaves = dict(reversed(trees.flatten(grads).items()))

    def after(activation: str, dx: Array, *parts: str) -> dict[str, Array]:
        of_parts = {name: leaf for name, leaf in leaves.items() if name.startswith(parts)}
        named = {f"gradients/{name}": leaf for name, leaf in of_parts.items()}
        return {f"activation_gradients/{activation}": dx, **named}

    arrays = after("logits", dlogits, "head.", "final_norm.")
    dx, _ = head_backward(params, dlogits, cache)
    for index in reversed(range(model.num_layers)):
        arrays |= after(f"blocks.{index}.output", dx, f"blocks.{index}.")
        dx, _ = block.backward(params["blocks"][index], dx, cache["blocks"][index])
    dx = dropout.backward(dx, cache["embedding_dropout"])
    return arrays | after("embedding", dx, "class_embedding.", "embedding.")


def _schedules() -> dict[str, Array]:
    return {
        f"schedule/{name}/{masked}/{steps}": schedule(masked, steps)
        for name, schedule in schedules.SCHEDULES.items()
        for masked, steps in (COUNTS if name in ("cosine", "linear") else FEW_COUNTS)
    }


def _optimise(
    model: MAR,
    params: Tree,
    batch: dict[str, Array],
    nudge: Callable[[Tree], Tree],
    name: str,
    options: dict[str, Any],
) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    state = optim.init(params)
    options = dict(options)
    max_norm = options.pop("max_norm", None)
    for step in range(1, max(OPTIMISER_STEPS) + 1):
        grads = nudge(_passes(model, params, batch).grads)
        for block_grads in grads["blocks"]:
            # Its true gradient is 0: Adam would turn the rounding noise into steps.
            bias = block_grads["attention"]["key"]["bias"]
            block_grads["attention"]["key"]["bias"] = np.zeros_like(bias)
        if max_norm is not None:
            grads, _ = optim.clip_by_global_norm(grads, max_norm)
        params, state = optim.step(params, grads, state, **options)
        if step in OPTIMISER_STEPS:
            arrays |= _named(f"{name}/{step}", params)
    return arrays


def _decode(
    model: MAR, params: Tree, batch: dict[str, Array], name: str, options: dict[str, Any]
) -> dict[str, Array]:
    known = name.endswith("/known")
    start = batch["tokens"][:2] if known else np.zeros((1, model.seq_len), np.int64)
    labels = batch["labels"][: len(start)] if name.startswith("guidance/") else None
    if name.startswith("ties/"):
        params = {**params, "head": _saturated(params["head"], 200.0)}
    tokens, steps = decoding.iterative_decode(
        model, params, tokens=start, labels=labels, return_steps=True, **options
    )
    return {
        f"{name}/start": start,
        **({} if labels is None else {f"{name}/labels": labels}),
        **{f"{name}/steps/{key}": steps[key] for key in ("confidence", "tokens", "mask")},
        f"{name}/tokens": tokens,
    }


def _sample(
    model: MAR, params: Tree, batch: dict[str, Array], name: str, options: dict[str, Any]
) -> dict[str, Array]:
    known = batch["tokens"][:1].astype(np.int64)
    start = np.concatenate([np.zeros_like(known), known])
    if name == "certain":
        params = {**params, "head": _saturated(params["head"], 1000.0)}
    rule = samplers.rule_of(options)
    drawn = samplers.draw(name, rule, start.shape)
    # Plain arrays: a sure token has p = 1 exactly in every program, however it rounds.
    steps = samplers.run(rule, start, drawn, lambda _, x: np.asarray(model(params, x)))
    steps = {**drawn, **steps}
    return {
        f"samplers/{name}/start": start,
        **{f"samplers/{name}/steps/{key}": array for key, array in steps.items()},
        f"samplers/{name}/tokens": steps["tokens"][-1],
    }


def _saturated(head: Tree, apart: float) -> Tree:
    """Give every position the same logits, so far apart that all confidences are exactly 1.

    Id 1 is predicted, or [MASK] where it may be.  All the decoder has to go by is the order of
    positions.  200 apart, the other ids have the probability 1e-87, 1000 apart 0.
    """
    bias = np.zeros_like(head["bias"])
    bias[:2] = 2.0 * apart, apart
    return {"kernel": np.zeros_like(head["kernel"]), "bias": bias}
