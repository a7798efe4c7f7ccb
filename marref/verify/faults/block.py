"""Faults of the block: norms, branches, residual stream, dropout."""

from typing import Any

import numpy as np

from marref.layers import attention, block, dropout, feed_forward, layer_norm
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Patch, replace, wrap


def _attention(params: Tree, x: Array, cache: Tree, options: Tree) -> Array:
    """dropout(attention(x))."""
    y, cache["attention"] = attention.forward(params["attention"], x, options["num_heads"])
    y, cache["attention_dropout"] = dropout.forward(
        y, options.get("dropout_rate", 0.0), options.get("rng")
    )
    return y


def _attention_backward(params: Tree, dy: Array, cache: Tree, grads: Tree) -> Array:
    dx = dropout.backward(dy, cache["attention_dropout"])
    dx, grads["attention"] = attention.backward(params["attention"], dx, cache["attention"])
    return dx


def _feed_forward(params: Tree, x: Array, cache: Tree, options: Tree) -> Array:
    """dropout(feed_forward(x))."""
    y, cache["feed_forward"] = feed_forward.forward(params["feed_forward"], x, options["gelu"])
    y, cache["feed_forward_dropout"] = dropout.forward(
        y, options.get("dropout_rate", 0.0), options.get("rng")
    )
    return y


def _feed_forward_backward(params: Tree, dy: Array, cache: Tree, grads: Tree, kind: str) -> Array:
    dx = dropout.backward(dy, cache["feed_forward_dropout"])
    dx, grads["feed_forward"] = feed_forward.backward(
        params["feed_forward"], dx, cache["feed_forward"], kind
    )
    return dx


def _norm(name: str, params: Tree, x: Array, cache: Tree, options: Tree) -> Array:
    y, cache[name] = layer_norm.forward(params[name], x, options["epsilon"])
    return y


def _norm_backward(name: str, params: Tree, dy: Array, cache: Tree, grads: Tree) -> Array:
    dx, grads[name] = layer_norm.backward(params[name], dy, cache[name])
    return dx


def _block(forward: Any, backward: Any) -> tuple[Patch, Patch]:
    """Put a block in the place of marref's.

    ``forward(params, x, cache, options) -> y`` fills the cache, and
    ``backward(params, dy, cache, grads, gelu_kind) -> dx`` fills the gradients.
    """

    def block_forward(params: Tree, x: Array, **options: Any) -> tuple[Array, Tree]:
        cache: Tree = {}
        y = forward(params, x, cache, options)
        return y, cache

    def block_backward(
        params: Tree, dy: Array, cache: Tree, *, gelu: str, **_: Any
    ) -> tuple[Array, Tree]:
        grads: Tree = {}
        dx = backward(params, dy, cache, grads, gelu)
        return dx, {name: grads[name] for name in params}

    return replace(block, "forward", block_forward), replace(block, "backward", block_backward)


def _post_norm(params: Tree, x: Array, cache: Tree, options: Tree) -> Array:
    """Compute h = norm(x + attention(x)),  y = norm(h + feed_forward(h))."""
    x = x + _attention(params, x, cache, options)
    x = _norm("attention_norm", params, x, cache, options)
    x = x + _feed_forward(params, x, cache, options)
    return _norm("feed_forward_norm", params, x, cache, options)


def _post_norm_backward(params: Tree, dy: Array, cache: Tree, grads: Tree, kind: str) -> Array:
    dy = _norm_backward("feed_forward_norm", params, dy, cache, grads)
    dy = dy + _feed_forward_backward(params, dy, cache, grads, kind)
    dy = _norm_backward("attention_norm", params, dy, cache, grads)
    return dy + _attention_backward(params, dy, cache, grads)


def _parallel(params: Tree, x: Array, cache: Tree, options: Tree) -> Array:
    """Compute y = x + attention(norm₁(x)) + feed_forward(norm₂(x))."""
    first = _norm("attention_norm", params, x, cache, options)
    second = _norm("feed_forward_norm", params, x, cache, options)
    branch = _attention(params, first, cache, options)
    return x + branch + _feed_forward(params, second, cache, options)


def _parallel_backward(params: Tree, dy: Array, cache: Tree, grads: Tree, kind: str) -> Array:
    dsecond = _feed_forward_backward(params, dy, cache, grads, kind)
    dfirst = _attention_backward(params, dy, cache, grads)
    dsecond = _norm_backward("feed_forward_norm", params, dsecond, cache, grads)
    return dy + dsecond + _norm_backward("attention_norm", params, dfirst, cache, grads)


def _from_normalised(params: Tree, x: Array, cache: Tree, options: Tree) -> Array:
    """Compute n = norm(x), h = n + attention(n);  then the same with feed_forward."""
    x = _norm("attention_norm", params, x, cache, options)
    x = x + _attention(params, x, cache, options)
    x = _norm("feed_forward_norm", params, x, cache, options)
    return x + _feed_forward(params, x, cache, options)


def _from_normalised_backward(
    params: Tree, dy: Array, cache: Tree, grads: Tree, kind: str
) -> Array:
    dy = dy + _feed_forward_backward(params, dy, cache, grads, kind)
    dy = _norm_backward("feed_forward_norm", params, dy, cache, grads)
    dy = dy + _attention_backward(params, dy, cache, grads)
    return _norm_backward("attention_norm", params, dy, cache, grads)


def residuals(
    *, first: bool = True, second: bool = True, gradients: bool = False
) -> tuple[Patch, ...]:
    """Compute h = [x +] attention(norm(x)),  y = [h +] feed_forward(norm(h)).

    ``first`` and ``second`` say which of the sums are kept.  With ``gradients``, the others are
    missing in the backward only.
    """

    def forward(params: Tree, x: Array, cache: Tree, options: Tree) -> Array:
        branch = _norm("attention_norm", params, x, cache, options)
        branch = _attention(params, branch, cache, options)
        x = x + branch if first else branch
        branch = _norm("feed_forward_norm", params, x, cache, options)
        branch = _feed_forward(params, branch, cache, options)
        return x + branch if second else branch

    def backward(params: Tree, dy: Array, cache: Tree, grads: Tree, kind: str) -> Array:
        dbranch = _feed_forward_backward(params, dy, cache, grads, kind)
        dbranch = _norm_backward("feed_forward_norm", params, dbranch, cache, grads)
        dy = dy + dbranch if second else dbranch
        dbranch = _attention_backward(params, dy, cache, grads)
        dbranch = _norm_backward("attention_norm", params, dbranch, cache, grads)
        return dy + dbranch if first else dbranch

    patches = _block(forward, backward)
    return patches[1:] if gradients else patches


def _always_drop(old: Any) -> Any:
    """Drop a tenth of the features, always the same ones of an array of one shape."""

    def forward(x: Array, rate: float, rng: np.random.Generator | None) -> tuple[Array, Any]:
        if rng is None:
            rate, rng = rate or 0.1, np.random.default_rng(0)
        result: tuple[Array, Any] = old(x, rate, rng)
        return result

    return forward


FAULTS = (
    Fault(
        "block-post-norm",
        "x = norm(x + branch(x)), the block of the first transformer, of BERT and of MaskGIT; "
        "MAR normalises what the branch reads. The branches read the residual stream as it is, "
        "and the stream itself has the size of the norm's scale.",
        _block(_post_norm, _post_norm_backward),
    ),
    Fault(
        "block-parallel",
        "Attention and feed-forward read the same x and their results are added together, as in "
        "GPT-J; in MAR the feed-forward layer reads what attention has added to. All is right "
        "up to the feed-forward norm.",
        _block(_parallel, _parallel_backward),
    ),
    Fault(
        "residual-from-normalised",
        "The branch is added to the normalised x instead of x itself: the variable is "
        "overwritten by the norm. The attention layer is right and the residual stream after it "
        "is not.",
        _block(_from_normalised, _from_normalised_backward),
    ),
    Fault(
        "residual-around-attention-missing",
        "x = attention(norm(x)): what the stream held is lost. Attention's output is right, the "
        "norm after it is not.",
        residuals(first=False),
    ),
    Fault(
        "residual-around-feed-forward-missing",
        "x = feed_forward(norm(x)): what the stream held is lost. All branches of the first "
        "block are right, its output is not.",
        residuals(second=False),
    ),
    Fault(
        "dropout-left-on",
        "Dropout is active in evaluation: model.eval() was forgotten. A tenth of the features is "
        "0 and the others are larger by 1/0.9; a second run differs from the first. The places "
        "are drawn, so that no two implementations drop the same.",
        (wrap(dropout, "forward", _always_drop),),
    ),
)
