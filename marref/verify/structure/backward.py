"""What a gradient would be, had the backward pass one mistake between it and the loss.

The blocks are pushed back again, from golden activations, with one step of the chain rule changed.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from marref import loss, trees
from marref.layers import attention, class_embedding, embedding, layer_norm, linear
from marref.trees import Array, Tree
from marref.verify.structure.evidence import Case, Finding

_NORM = {
    "without the part through its mean": "mean",
    "without the part through its variance": "variance",
    "without the parts through mean and variance": "both",
    "without its scale": "scale",
    "not divided by the deviation": "deviation",
}
_ACTIVATION = {
    "with a slope of 1": "one",
    "with its gate as slope, without the density": "gate",
    "with the slope of ReLU": "relu",
}
_ATTENTION = {
    "through the values only": "values",
    "through the weights only": "weights",
    "without the mean of the softmax's gradient": "softmax",
    "not divided by sqrt(head_dim)": "unscaled",
    "with query and key in each other's place": "swapped",
}
_SUM = {
    "without the residual path": "path",
    "without the branch": "branch",
    "with the residual path twice": "twice",
}


class Pushed(NamedTuple):
    """What a mistake makes of the gradients of a block, by name."""

    clause: str
    arrays: dict[str, Array]


def found(case: Case) -> Finding | None:
    """Say which one mistake in the backward pass comes to the gradient.

    Of several that do, those that also come to the other gradients of the block are kept.
    """
    listed = [pushed for pushed in _candidates(case) if case.name in pushed.arrays]
    fitting = [
        pushed
        for pushed in listed
        if case.residual(pushed.arrays[case.name], tried=len(listed)) is not None
    ]
    wide = [pushed for pushed in fitting if _fits_block(case, pushed)]
    return case.fitting(
        ((pushed.clause, pushed.arrays[case.name]) for pushed in wide or fitting), len(listed)
    )


def _fits_block(case: Case, pushed: Pushed) -> bool:
    given = {name: array for name, array in pushed.arrays.items() if name in case.arrays}
    return case.all_are(given)


def _candidates(case: Case) -> Iterator[Pushed]:
    leaf = case.name.partition("/")[2]
    model, params, batch = case.vectors.model, case.vectors.params, case.vectors.batch
    logits, cache = model.forward(params, batch["tokens"], labels=batch.get("labels"))
    dlogits = loss.backward(loss.forward(logits, batch["targets"], batch["mask"])[1])
    dhead, _ = linear.backward(params["head"], dlogits, cache["head"])
    if leaf.startswith(("head", "logits", "final_norm")):
        yield from _of_head(case, logits, cache)
        return
    matched = re.match(r"blocks\.(\d+)", leaf)
    index = int(matched[1]) if matched else 0
    dy, behind = _before(params, cache, dhead, index)
    of_norm = "final_norm" if index == model.num_layers - 1 else f"blocks.{index + 1}"
    push = functools.partial(_seen, case, params, cache, index)
    for words, changed in behind:
        yield push(words.format(of_norm), changed, "")
    for words, wrong in _within():
        yield push(words.format(f"blocks.{index}"), dy, wrong)


def _seen(
    case: Case, params: Tree, cache: Tree, index: int, words: str, dy: Array, wrong: str
) -> Pushed:
    """Push a gradient back through a block, with or without a mistake in it."""
    dx, grads = _block(params["blocks"][index], dy, cache["blocks"][index], wrong)
    arrays = {
        f"gradients/blocks.{index}.{name}": grad for name, grad in trees.flatten(grads).items()
    }
    arrays[f"activation_gradients/blocks.{index}.output"] = dy
    if index == 0:
        arrays["activation_gradients/embedding"] = dx
        of_tables = {"embedding": embedding.backward(params["embedding"], dx, cache["embedding"])}
        if "class_embedding" in cache:
            _, of_tables["class_embedding"] = class_embedding.backward(
                params["class_embedding"], dx, cache["class_embedding"]
            )
        arrays |= {f"gradients/{name}": grad for name, grad in trees.flatten(of_tables).items()}
    return Pushed(f"is what the backward pass makes {words}", arrays)


def _of_head(case: Case, logits: Array, cache: Tree) -> Iterator[Pushed]:
    """List what other gradients of the logits make of the head's and the final norm's."""
    params = case.vectors.params
    for words, dlogits in _of_logits(case, logits):
        dhead, head = linear.backward(params["head"], dlogits, cache["head"])
        _, norm = layer_norm.backward(params["final_norm"], dhead, cache["final_norm"])
        arrays = {"activation_gradients/logits": dlogits}
        arrays |= {f"gradients/head.{name}": grad for name, grad in head.items()}
        arrays |= {f"gradients/final_norm.{name}": grad for name, grad in norm.items()}
        yield Pushed(f"is what the backward pass makes of {words}", arrays)


def _of_logits(case: Case, logits: Array) -> Iterator[tuple[str, Array]]:
    batch = case.vectors.batch
    mask, count = batch["mask"][..., None], batch["mask"].sum()
    probabilities = attention.softmax(logits)
    ids = np.arange(logits.shape[-1])
    targets = (batch["targets"][..., None] == ids).astype(np.float64)
    tokens = (batch["tokens"][..., None] == ids).astype(np.float64)
    rows = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    right = probabilities - targets
    yield "softmax, not less the target", probabilities * mask / count
    yield "minus the target, without softmax", -targets * mask / count
    yield "softmax less the target at all positions, over their number", right / mask.size
    yield "softmax less the target at all positions, over |M|", right / count
    yield "softmax less the target, over the number of all positions", right * mask / mask.size
    yield "softmax less the target, over the batch", right * mask / len(mask)
    yield "softmax less the target, not averaged", right * mask
    yield "softmax less the target, averaged by sequence", right * mask / rows / len(mask)
    yield "softmax less the token in place of the target", (probabilities - tokens) * mask / count
    for shift in (-1, 1):
        rolled = np.roll(targets, shift, axis=1)
        words = "next" if shift < 0 else "previous"
        yield f"softmax less the {words} target", (probabilities - rolled) * mask / count
    for amount in (0.05, 0.1, 0.2):
        smooth = (1 - amount) * targets + amount / len(ids)
        text = f"softmax less the target smoothed by {amount:g}"
        yield text, (probabilities - smooth) * mask / count
    own = (probabilities * targets).sum(axis=-1, keepdims=True)
    yield "the target's probability in place of its logarithm", right * own * mask / count


def _before(
    params: Tree, cache: Tree, dhead: Array, index: int
) -> tuple[Array, list[tuple[str, Array]]]:
    """Return the gradient of a block's output, right and with one mistake after the block."""
    norms = {f"of {{}} {words}": kind for words, kind in _NORM.items()}
    dy = _norm(params["final_norm"], dhead, cache["final_norm"])
    if index == len(params["blocks"]) - 1:
        wrong = [
            (words, _norm(params["final_norm"], dhead, cache["final_norm"], kind))
            for words, kind in norms.items()
        ]
        return dy, wrong
    for later in reversed(range(index + 2, len(params["blocks"]))):
        dy, _ = _block(params["blocks"][later], dy, cache["blocks"][later], "")
    push = functools.partial(_block, params["blocks"][index + 1], dy, cache["blocks"][index + 1])
    return push("")[0], [(words, push(wrong)[0]) for words, wrong in _within()]


def _within() -> Iterator[tuple[str, str]]:
    """List the mistakes within a block: words, with a place for its name, and a key."""
    for norm in ("attention_norm", "feed_forward_norm"):
        for words, kind in _NORM.items():
            yield f"of {{}}.{norm} {words}", f"{norm} {kind}"
    for words, kind in _ACTIVATION.items():
        yield f"of {{}}.feed_forward.activation {words}", f"activation {kind}"
    for words, kind in _ATTENTION.items():
        yield f"of {{}}.attention {words}", f"attention {kind}"
    for branch in ("attention", "feed_forward"):
        for words, kind in _SUM.items():
            yield f"of the sum after {{}}.{branch} {words}", f"sum of {branch} {kind}"
    yield "of {}.attention with square kernels not transposed", "kernels"


def _block(params: Tree, dy: Array, cache: Tree, wrong: str) -> tuple[Array, Tree]:
    """Push back through a block, as `marref.layers.block.backward` does, with one mistake."""
    grads: Tree = {"attention": {}, "feed_forward": {}}
    layers, cached = params["feed_forward"], cache["feed_forward"]
    dactivation, grads["feed_forward"]["down"] = linear.backward(
        layers["down"], dy, cached["activation"]
    )
    dup = dactivation * _slope(cached, wrong)
    dbranch, grads["feed_forward"]["up"] = linear.backward(layers["up"], dup, cached["input"])
    grads["feed_forward_norm"] = layer_norm.backward(
        params["feed_forward_norm"], dbranch, cache["feed_forward_norm"]
    )[1]
    dbranch = _norm(
        params["feed_forward_norm"],
        dbranch,
        cache["feed_forward_norm"],
        wrong.removeprefix("feed_forward_norm "),
    )
    dh = _sum(dy, dbranch, wrong.removeprefix("sum of feed_forward "))
    dbranch, grads["attention"] = _attention(params["attention"], dh, cache["attention"], wrong)
    grads["attention_norm"] = layer_norm.backward(
        params["attention_norm"], dbranch, cache["attention_norm"]
    )[1]
    dbranch = _norm(
        params["attention_norm"],
        dbranch,
        cache["attention_norm"],
        wrong.removeprefix("attention_norm "),
    )
    return _sum(dh, dbranch, wrong.removeprefix("sum of attention ")), grads


def _sum(dpath: Array, dbranch: Array, wrong: str) -> Array:
    parts = {"path": dbranch, "branch": dpath, "twice": 2.0 * dpath + dbranch}
    return parts.get(wrong, dpath + dbranch)


def _norm(params: Tree, dy: Array, cache: Tree, wrong: str = "") -> Array:
    """Push back through a layer norm, as `marref.layers.layer_norm.backward` does."""
    normalised, inverse_std = cache["normalised"], cache["inverse_std"]
    dnormalised = dy if wrong == "scale" else params["scale"] * dy
    dx = dnormalised
    if wrong not in ("mean", "both"):
        dx = dx - dnormalised.mean(axis=-1, keepdims=True)
    if wrong not in ("variance", "both"):
        dx = dx - normalised * (dnormalised * normalised).mean(axis=-1, keepdims=True)
    return np.asarray(dx if wrong == "deviation" else dx * inverse_std)


def _slope(cache: Tree, wrong: str) -> Array:
    slopes: dict[str, Callable[[Array], Array]] = {
        "activation one": np.ones_like,
        "activation gate": ndtr,
        "activation relu": lambda x: (x > 0).astype(x.dtype),
    }
    known = slopes.get(wrong)
    return np.asarray(known(cache["up"]) if known else cache["gelu"]["slope"])


def _attention(params: Tree, dy: Array, cache: Tree, wrong: str) -> tuple[Array, Tree]:
    """Push back through attention, as `marref.layers.attention.backward` does."""
    grads: Tree = {}
    dcontext, grads["output"] = linear.backward(params["output"], dy, cache["context"])
    if wrong == "kernels":
        dcontext = dy @ params["output"]["kernel"]
    query, key, value, weights = (cache[name] for name in ("query", "key", "value", "weights"))
    dheads = attention.split_heads(dcontext, query.shape[1])
    dweights, dvalue = dheads @ value.mT, weights.mT @ dheads
    dscores = attention.softmax_backward(dweights, weights)
    if wrong == "attention softmax":
        dscores = weights * dweights
    root = 1.0 if wrong == "attention unscaled" else math.sqrt(query.shape[-1])
    dquery, dkey = dscores @ key / root, dscores.mT @ query / root
    if wrong == "attention swapped":
        dquery, dkey = dkey, dquery
    if wrong == "attention values":
        dquery, dkey = np.zeros_like(dquery), np.zeros_like(dkey)
    if wrong == "attention weights":
        dvalue = np.zeros_like(dvalue)
    dx = np.zeros_like(cache["input"])
    for name, dhead in {"query": dquery, "key": dkey, "value": dvalue}.items():
        merged = attention.merge_heads(dhead)
        dinput, grads[name] = linear.backward(params[name], merged, cache["input"])
        dx += merged @ params[name]["kernel"] if wrong == "kernels" else dinput
    return dx, grads
