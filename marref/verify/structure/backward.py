"""What a gradient would be, had the backward pass one mistake between it and the loss.

The blocks are pushed back again, from golden activations, with one step of the chain rule changed.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import ndtr

from marref import loss, trees
from marref.layers import attention, layer_norm, linear
from marref.trees import Array, Tree
from marref.verify.structure.evidence import Candidates, Case

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


def candidates(case: Case) -> Candidates:
    """List what the gradient would be with one mistake behind it, by what is said of it."""
    leaf = case.name.partition("/")[2]
    model, params = case.vectors.model, case.vectors.params
    logits, cache = model.forward(params, case.vectors.batch["tokens"])
    _, loss_cache = loss.forward(logits, case.vectors.batch["targets"], case.vectors.batch["mask"])
    dhead, _ = linear.backward(params["head"], loss.backward(loss_cache), cache["head"])
    matched = re.match(r"blocks\.(\d+)", leaf)
    index = int(matched[1]) if matched else 0 if leaf.startswith("embedding") else None
    if index is None:
        return
    dy, behind = _before(params, cache, dhead, index)
    of_norm = "final_norm" if index == model.num_layers - 1 else f"blocks.{index + 1}"
    for words, changed in behind:
        yield from _as_seen(f"{words.format(of_norm)}", changed, "", case, params, cache, index)
    for words, wrong in _within():
        yield from _as_seen(
            f"{words.format(f'blocks.{index}')}", dy, wrong, case, params, cache, index
        )


def _as_seen(
    words: str, dy: Array, wrong: str, case: Case, params: Tree, cache: Tree, index: int
) -> Candidates:
    """Yield the array of the case's name from a block pushed back."""
    section, _, leaf = case.name.partition("/")
    dx, grads = _block(params["blocks"][index], dy, cache["blocks"][index], wrong)
    clause = f"is what the backward pass makes {words}"
    if section == "activation_gradients":
        yield clause, dx if leaf == "embedding" else dy
    elif leaf == "embedding.table":
        table = np.zeros_like(case.golden)
        np.add.at(table, case.vectors.batch["tokens"], dx)
        yield clause, table
    else:
        yield clause, trees.flatten(grads)[leaf.split(".", 2)[2]]


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
    for later in reversed(range(index + 1, len(params["blocks"]))):
        push = functools.partial(_block, params["blocks"][later], dy, cache["blocks"][later])
        changed = [(words, push(wrong)[0]) for words, wrong in _within()]
        dy = push("")[0]
    return dy, changed


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
