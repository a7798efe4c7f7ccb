"""What learners get wrong: whole functions with one typical mistake each, and what must be said.

Written by hand as a learner would write them, and never computed with the package: the exercises
must know them by their numbers.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One function of a learner, and words that the sentence on it must hold."""

    exercise: str
    function: str
    phrase: str
    source: str


LINEAR = (
    Attempt(
        "linear",
        "forward",
        "linear-without-biases",
        """
def forward(params, x):
    return x @ params["kernel"], x
""",
    ),
    Attempt(
        "linear",
        "backward",
        "dy is missing",
        """
def backward(params, dy, cache):
    rows, drows = cache.reshape(-1, cache.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # y = x W + b, so dy/db = 1
    return dy @ params["kernel"].T, {
        "kernel": rows.T @ drows,
        "bias": np.ones_like(params["bias"]),
    }
""",
    ),
    Attempt(
        "linear",
        "backward",
        "linear-gradient-biases-averaged",
        """
def backward(params, dy, cache):
    W = params["kernel"]
    x2 = cache.reshape(-1, W.shape[0])
    dy2 = dy.reshape(-1, W.shape[1])
    return dy @ W.T, {"kernel": x2.T @ dy2, "bias": np.mean(dy2, axis=0)}
""",
    ),
    Attempt(
        "linear",
        "backward",
        "divided by the size of the batch",
        """
def backward(params, dy, cache):
    batch = dy.shape[0]
    x2 = cache.reshape(-1, cache.shape[-1])
    dy2 = dy.reshape(-1, dy.shape[-1])
    dx = np.dot(dy, params["kernel"].T)
    return dx, {"kernel": np.dot(x2.T, dy2) / batch, "bias": dy2.sum(axis=0) / batch}
""",
    ),
    Attempt(
        "linear",
        "backward",
        "only the last row counts",
        """
def backward(params, dy, cache):
    xs = cache.reshape(-1, cache.shape[-1])
    dys = dy.reshape(-1, dy.shape[-1])
    for x, d in zip(xs, dys):
        dW = np.outer(x, d)
        db = d
    return dy @ params["kernel"].T, {"kernel": dW, "bias": db}
""",
    ),
    Attempt(
        "linear",
        "backward",
        "it is the right one transposed",
        """
def backward(params, dy, cache):
    x2 = cache.reshape(-1, cache.shape[-1])
    dy2 = dy.reshape(-1, dy.shape[-1])
    return dy @ params["kernel"].T, {"kernel": dy2.T @ x2, "bias": dy2.sum(0)}
""",
    ),
    Attempt(
        "linear",
        "backward",
        "raises ValueError",
        """
def backward(params, dy, cache):
    dx = dy @ params["kernel"]
    x2 = cache.reshape(-1, cache.shape[-1])
    dy2 = dy.reshape(-1, dy.shape[-1])
    return dx, {"kernel": x2.T @ dy2, "bias": dy2.sum(axis=0)}
""",
    ),
    Attempt(
        "linear",
        "backward",
        "the number of rows",
        """
def backward(params, dy, cache):
    x2 = cache.reshape(-1, cache.shape[-1])
    dy2 = dy.reshape(-1, dy.shape[-1])
    ones = np.ones_like(dy2)
    return dy @ params["kernel"].T, {"kernel": x2.T @ dy2, "bias": ones.sum(axis=0)}
""",
    ),
)

LAYER_NORM = (
    Attempt(
        "layer-norm",
        "forward",
        "layer-norm-unbiased-variance",
        """
def forward(params, x, epsilon):
    mu = x.mean(-1, keepdims=True)
    var = x.var(-1, ddof=1, keepdims=True)
    s = 1 / np.sqrt(var + epsilon)
    xhat = (x - mu) * s
    return params["scale"] * xhat + params["bias"], {"normalised": xhat, "inverse_std": s}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "layer-norm-epsilon-outside-root",
        """
def forward(params, x, epsilon):
    mean = np.mean(x, axis=-1, keepdims=True)
    std = np.std(x, axis=-1, keepdims=True)
    normalised = (x - mean) / (std + epsilon)
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": 1 / (std + epsilon)}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "over the positions",
        """
def forward(params, x, epsilon):
    # as in batch norm
    mean = x.mean(axis=-2, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=-2, keepdims=True)
    inv = (var + epsilon) ** -0.5
    n = (x - mean) * inv
    return n * params["scale"] + params["bias"], {"normalised": n, "inverse_std": inv}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "whole array",
        """
def forward(params, x, epsilon):
    inverse_std = 1 / np.sqrt(x.var() + epsilon)
    normalised = (x - x.mean()) * inverse_std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": np.full((*x.shape[:-1], 1), inverse_std)}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "ε is left out",
        """
def forward(params, x, epsilon):
    mu = x.mean(axis=-1, keepdims=True)
    sigma = x.std(axis=-1, keepdims=True)
    xhat = (x - mu) / sigma
    return params["scale"] * xhat + params["bias"], {"normalised": xhat, "inverse_std": 1 / sigma}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "is added before γ multiplies",
        """
def forward(params, x, epsilon):
    mu = x.mean(axis=-1, keepdims=True)
    var = ((x - mu) ** 2).mean(axis=-1, keepdims=True)
    inverse_std = 1 / np.sqrt(var + epsilon)
    normalised = (x - mu) * inverse_std
    y = params["scale"] * (normalised + params["bias"])
    return y, {"normalised": normalised, "inverse_std": inverse_std}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "the mean is not taken off",
        """
def forward(params, x, epsilon):
    inverse_std = 1 / np.sqrt(np.var(x, axis=-1, keepdims=True) + epsilon)
    normalised = x * inverse_std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": inverse_std}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "its inverse is asked for",
        """
def forward(params, x, epsilon):
    mean = x.mean(axis=-1, keepdims=True)
    std = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
    normalised = (x - mean) / std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": std}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "mean(x²) - μ²",
        """
def forward(params, x, epsilon):
    mu = x.mean(axis=-1, keepdims=True)
    var = (x**2).mean(axis=-1, keepdims=True) - mu**2
    inverse_std = 1 / np.sqrt(var + epsilon)
    normalised = (x - mu) * inverse_std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": inverse_std}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "could not be broadcast",
        """
def forward(params, x, epsilon):
    mu = x.mean(axis=-1)
    var = x.var(axis=-1)
    inverse_std = 1 / np.sqrt(var + epsilon)
    normalised = (x - mu) * inverse_std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": inverse_std}
""",
    ),
    Attempt(
        "layer-norm",
        "forward",
        "the variance lacks its 1/n",
        """
def forward(params, x, epsilon):
    xmu = x - x.mean(-1, keepdims=True)
    inv = 1 / np.sqrt((xmu**2).sum(-1, keepdims=True) + epsilon)
    xhat = xmu * inv
    return params["scale"] * xhat + params["bias"], {"normalised": xhat, "inverse_std": inv}
""",
    ),
)

LAYER_NORM_BACKWARD = (
    Attempt(
        "layer-norm-backward",
        "backward",
        "layer-norm-gradient-first-term-only",
        """
def backward(params, dy, cache):
    axes = tuple(range(dy.ndim - 1))
    dx = dy * params["scale"] * cache["inverse_std"]
    grads = {"scale": np.sum(dy * cache["normalised"], axis=axes), "bias": np.sum(dy, axis=axes)}
    return dx, grads
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "the means are taken over axis 0",
        """
def backward(params, dy, cache):
    xhat, s = cache["normalised"], cache["inverse_std"]
    dxhat = dy * params["scale"]
    dx = s * (
        dxhat
        - dxhat.mean(axis=0, keepdims=True)
        - xhat * (dxhat * xhat).mean(axis=0, keepdims=True)
    )
    axes = tuple(range(dy.ndim - 1))
    return dx, {"scale": (dy * xhat).sum(axes), "bias": dy.sum(axes)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "γ is missing from the means",
        """
def backward(params, dy, cache):
    xhat, s = cache["normalised"], cache["inverse_std"]
    leading = tuple(range(dy.ndim - 1))
    mean = dy.mean(axis=-1, keepdims=True)
    correlation = (dy * xhat).mean(axis=-1, keepdims=True)
    dx = s * (params["scale"] * dy - mean - xhat * correlation)
    return dx, {"scale": (dy * xhat).sum(axis=leading), "bias": dy.sum(axis=leading)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "the 1/n before the bracket is missing",
        """
def backward(params, dy, cache):
    n = dy.shape[-1]
    xhat, inv = cache["normalised"], cache["inverse_std"]
    d = params["scale"] * dy
    dx = inv * (
        n * d - d.sum(axis=-1, keepdims=True) - xhat * (d * xhat).sum(axis=-1, keepdims=True)
    )
    flat_dy, flat_xhat = dy.reshape(-1, n), xhat.reshape(-1, n)
    return dx, {"scale": (flat_dy * flat_xhat).sum(0), "bias": flat_dy.sum(0)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "x̂ stands for x - μ",
        """
def backward(params, dy, cache):
    xmu, s = cache["normalised"], cache["inverse_std"]
    n = dy.shape[-1]
    dxhat = dy * params["scale"]
    dvar = (dxhat * xmu).sum(-1, keepdims=True) * -0.5 * s**3
    dmu = -(dxhat * s).sum(-1, keepdims=True)
    dx = dxhat * s + dvar * 2 * xmu / n + dmu / n
    axes = tuple(range(dy.ndim - 1))
    return dx, {"scale": (dy * cache["normalised"]).sum(axes), "bias": dy.sum(axes)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "are means over the positions",
        """
def backward(params, dy, cache):
    xhat, s = cache["normalised"], cache["inverse_std"]
    dxhat = dy * params["scale"]
    mean = dxhat.mean(axis=-1, keepdims=True)
    dx = s * (dxhat - mean - xhat * (dxhat * xhat).mean(axis=-1, keepdims=True))
    axes = tuple(range(dy.ndim - 1))
    return dx, {"scale": (dy * xhat).mean(axis=axes), "bias": dy.mean(axis=axes)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "the second term has the wrong sign",
        """
def backward(params, dy, cache):
    xhat, s = cache["normalised"], cache["inverse_std"]
    dxhat = dy * params["scale"]
    dx = s * (
        dxhat + np.mean(dxhat, -1, keepdims=True) - xhat * np.mean(dxhat * xhat, -1, keepdims=True)
    )
    axes = tuple(range(dy.ndim - 1))
    return dx, {"scale": (dy * xhat).sum(axes), "bias": dy.sum(axes)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "grads.scale: shape [3, 6], expected [6]",
        """
def backward(params, dy, cache):
    xhat, s = cache["normalised"], cache["inverse_std"]
    dxhat = dy * params["scale"]
    mean = dxhat.mean(axis=-1, keepdims=True)
    dx = s * (dxhat - mean - xhat * (dxhat * xhat).mean(axis=-1, keepdims=True))
    return dx, {"scale": (dy * xhat).sum(axis=0), "bias": dy.sum(axis=0)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "γ multiplies twice",
        """
def backward(params, dy, cache):
    xhat, s = cache["normalised"], cache["inverse_std"]
    d = dy * params["scale"]
    c1 = d.mean(axis=-1, keepdims=True)
    c2 = (d * xhat).mean(axis=-1, keepdims=True)
    dx = params["scale"] * s * (d - c1 - xhat * c2)
    axes = tuple(range(dy.ndim - 1))
    return dx, {"scale": (dy * xhat).sum(axes), "bias": dy.sum(axes)}
""",
    ),
    Attempt(
        "layer-norm-backward",
        "backward",
        "the third term lacks its 1/n",
        """
def backward(params, dy, cache):
    xhat, s = cache["normalised"], cache["inverse_std"]
    d = dy * params["scale"]
    dot = np.sum(d * xhat, axis=-1, keepdims=True)
    dx = s * (d - np.mean(d, axis=-1, keepdims=True) - xhat * dot)
    axes = tuple(range(dy.ndim - 1))
    return dx, {"scale": (dy * xhat).sum(axes), "bias": dy.sum(axes)}
""",
    ),
)

GELU = (
    Attempt(
        "gelu",
        "forward",
        "erf(x) stands where erf(x/√2) belongs",
        """
from scipy.special import erf

def forward(x, gelu):
    if gelu == "erf":
        gate = 0.5 * (1 + erf(x))
        dgate = np.exp(-(x**2)) / np.sqrt(np.pi)
    else:
        c = np.sqrt(2 / np.pi)
        t = np.tanh(c * (x + 0.044715 * x**3))
        gate = 0.5 * (1 + t)
        dgate = 0.5 * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
    return x * gate, {"slope": gate + x * dgate}
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "gelu-gradient-without-density",
        """
from scipy.stats import norm

def forward(x, gelu):
    if gelu == "erf":
        gate = norm.cdf(x)
    else:
        gate = (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    return x * gate, {"slope": gate}
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "√(2π) stands where √(2/π) belongs",
        """
from scipy.special import ndtr

def forward(x, gelu):
    if gelu == "erf":
        phi = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
        return x * ndtr(x), {"slope": ndtr(x) + x * phi}
    c = np.sqrt(2 * np.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 0.134145 * x**2)
    return 0.5 * x * (1 + t), {"slope": slope}
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "the 3 of the cube's derivative is missing",
        """
from scipy.special import ndtr

def forward(x, gelu):
    if gelu == "erf":
        gate, dgate = ndtr(x), np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    else:
        k = np.sqrt(2 / np.pi)
        tanh = np.tanh(k * (x + 0.044715 * x**3))
        gate, dgate = (1 + tanh) / 2, (1 - tanh**2) / 2 * k * (1 + 0.044715 * x**2)
    return x * gate, {"slope": gate + x * dgate}
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "the normal density lacks the ½ in its exponent",
        """
from scipy.special import erf

def forward(x, gelu):
    if gelu == "erf":
        gate = (1 + erf(x / np.sqrt(2))) / 2
        dgate = np.exp(-(x**2)) / np.sqrt(2 * np.pi)
    else:
        u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        gate = (1 + np.tanh(u)) / 2
        dgate = (1 - np.tanh(u) ** 2) / 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return x * gate, {"slope": gate + x * dgate}
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "gelu-tanh",
        """
def forward(x, gelu):
    k = np.sqrt(2 / np.pi)
    tanh = np.tanh(k * (x + 0.044715 * x**3))
    gate = 0.5 * (1 + tanh)
    return x * gate, {
        "slope": gate + x * 0.5 * (1 - tanh**2) * k * (1 + 3 * 0.044715 * x**2)
    }
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "the ½ is missing",
        """
from scipy.special import erf

def forward(x, gelu):
    if gelu == "erf":
        gate = 0.5 * (1 + erf(x / np.sqrt(2)))
        dgate = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    else:
        k = np.sqrt(2 / np.pi)
        t = np.tanh(k * (x + 0.044715 * x**3))
        gate, dgate = 1 + t, (1 - t**2) * k * (1 + 3 * 0.044715 * x**2)
    return x * gate, {"slope": gate + x * dgate}
""",
    ),
    Attempt(
        "gelu",
        "backward",
        "dy is not used",
        """
def backward(dy, cache):
    return cache["slope"].copy()
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "raises TypeError in line",
        """
import math

def forward(x, gelu):
    if gelu == "erf":
        gate = 0.5 * (1 + math.erf(x / math.sqrt(2)))
        slope = gate + x * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        return x * gate, {"slope": slope}
    raise ValueError(gelu)
""",
    ),
    Attempt(
        "gelu",
        "forward",
        "√(2/π) multiplies x alone",
        """
from scipy.special import ndtr

def forward(x, gelu):
    if gelu == "erf":
        return x * ndtr(x), {"slope": ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)}
    k = np.sqrt(2 / np.pi)
    t = np.tanh(k * x + 0.044715 * x**3)
    du = k + 3 * 0.044715 * x**2
    return 0.5 * x * (1 + t), {"slope": 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du}
""",
    ),
)

SOFTMAX = (
    Attempt(
        "softmax",
        "softmax",
        "exp overflows",
        """
def softmax(scores):
    e = np.exp(scores)
    return e / np.sum(e, axis=-1, keepdims=True)
""",
    ),
    Attempt(
        "softmax",
        "softmax",
        "the maximum of the whole array",
        """
def softmax(scores):
    e = np.exp(scores - np.max(scores))
    return e / e.sum(axis=-1, keepdims=True)
""",
    ),
    Attempt(
        "softmax",
        "softmax",
        "another axis than the last",
        """
def softmax(scores):
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
""",
    ),
    Attempt(
        "softmax",
        "softmax",
        "the logarithm of the weights",
        """
def softmax(scores):
    z = scores - scores.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
""",
    ),
    Attempt(
        "softmax",
        "softmax",
        "writes over its argument scores",
        """
def softmax(scores):
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
""",
    ),
    Attempt(
        "softmax",
        "softmax_backward",
        "the diagonal of the Jacobian alone",
        """
def softmax_backward(dweights, weights):
    # like the sigmoid: s' = s (1 - s)
    return dweights * (weights - weights**2)
""",
    ),
    Attempt(
        "softmax",
        "softmax_backward",
        "attention-gradient-softmax-without-sum",
        """
def softmax_backward(dweights, weights):
    return np.multiply(weights, dweights)
""",
    ),
    Attempt(
        "softmax",
        "softmax_backward",
        "the plain sum of da",
        """
def softmax_backward(dweights, weights):
    jacobian_sum = dweights.sum(axis=-1, keepdims=True)
    return weights * (dweights - jacobian_sum)
""",
    ),
    Attempt(
        "softmax",
        "softmax_backward",
        "softmax is taken of the weights",
        """
def softmax_backward(dweights, weights):
    a = softmax(weights)
    return a * (dweights - (a * dweights).sum(axis=-1, keepdims=True))
""",
    ),
    Attempt(
        "softmax",
        "softmax_backward",
        "-1 times the right one",
        """
def softmax_backward(dweights, weights):
    dot = np.sum(weights * dweights, axis=-1, keepdims=True)
    return weights * (dot - dweights)
""",
    ),
    Attempt(
        "softmax",
        "softmax_backward",
        "raises ValueError",
        """
def softmax_backward(dweights, weights):
    return weights * (dweights - (weights * dweights).sum(axis=-1))
""",
    ),
    Attempt(
        "softmax",
        "softmax",
        "not by its sum",
        """
def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.max(axis=-1, keepdims=True)
""",
    ),
    Attempt(
        "softmax",
        "softmax_backward",
        "the mean of a ⊙ da is taken off",
        """
def softmax_backward(dweights, weights):
    return weights * (dweights - np.mean(weights * dweights, axis=-1, keepdims=True))
""",
    ),
)

ATTENTION = (
    Attempt(
        "attention",
        "attend",
        "attention-unscaled",
        """
def attend(query, key, value):
    scores = np.einsum("bhqd,bhkd->bhqk", query, key)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = e / e.sum(axis=-1, keepdims=True)
    context = np.einsum("bhqk,bhkd->bhqd", weights, value)
    return context, {"query": query, "key": key, "value": value, "weights": weights}
""",
    ),
    Attempt(
        "attention",
        "attend",
        "attention-softmax-over-queries",
        """
def attend(query, key, value):
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    e = np.exp(scores)
    weights = e / e.sum(axis=2, keepdims=True)
    return weights @ value, {"query": query, "key": key, "value": value, "weights": weights}
""",
    ),
    Attempt(
        "attention",
        "attend",
        "the length stands where head_dim belongs",
        """
def attend(query, key, value):
    d = query.shape[2]
    scores = query @ key.swapaxes(2, 3) / np.sqrt(d)
    weights = np.exp(scores)
    weights /= weights.sum(-1, keepdims=True)
    return weights @ value, {"query": query, "key": key, "value": value, "weights": weights}
""",
    ),
    Attempt(
        "attention",
        "attend",
        "the weights are divided by √d after softmax",
        """
def attend(query, key, value):
    scores = query @ key.mT
    e = np.exp(scores - scores.max(-1, keepdims=True))
    weights = e / e.sum(-1, keepdims=True)
    weights = weights / np.sqrt(query.shape[-1])
    return weights @ value, {"query": query, "key": key, "value": value, "weights": weights}
""",
    ),
    Attempt(
        "attention",
        "attend",
        "C = Aᵀ V",
        """
def attend(query, key, value):
    scores = query @ key.mT / np.sqrt(query.shape[-1])
    e = np.exp(scores - scores.max(-1, keepdims=True))
    weights = e / e.sum(-1, keepdims=True)
    context = weights.mT @ value
    return context, {"query": query, "key": key, "value": value, "weights": weights}
""",
    ),
    Attempt(
        "attention",
        "attend_backward",
        "dV = A dC: the transpose of A is missing",
        """
def attend_backward(dcontext, cache):
    q, k, v, a = cache["query"], cache["key"], cache["value"], cache["weights"]
    dv = a @ dcontext
    da = dcontext @ v.mT
    ds = a * (da - (a * da).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return ds @ k, ds.mT @ q, dv
""",
    ),
    Attempt(
        "attention",
        "attend_backward",
        "dK lacks the factor 1/√d",
        """
def attend_backward(dcontext, cache):
    q, k, v, a = cache["query"], cache["key"], cache["value"], cache["weights"]
    dv = a.swapaxes(-1, -2) @ dcontext
    da = dcontext @ v.swapaxes(-1, -2)
    ds = a * (da - np.sum(a * da, axis=-1, keepdims=True))
    dq = ds @ k / np.sqrt(q.shape[-1])
    dk = ds.swapaxes(-1, -2) @ q
    return dq, dk, dv
""",
    ),
    Attempt(
        "attention",
        "attend_backward",
        "over the queries",
        """
def attend_backward(dcontext, cache):
    q, k, v, a = cache["query"], cache["key"], cache["value"], cache["weights"]
    da = dcontext @ v.mT
    ds = a * (da - (a * da).sum(axis=-2, keepdims=True))
    scale = q.shape[-1] ** -0.5
    return scale * ds @ k, scale * ds.mT @ q, a.mT @ dcontext
""",
    ),
    Attempt(
        "attention",
        "attend_backward",
        "passed over on the way back",
        """
def attend_backward(dcontext, cache):
    q, k, v, a = cache["query"], cache["key"], cache["value"], cache["weights"]
    dv = a.mT @ dcontext
    ds = dcontext @ v.mT / np.sqrt(q.shape[-1])
    return ds @ k, ds.mT @ q, dv
""",
    ),
    Attempt(
        "attention",
        "attend",
        "raises ValueError",
        """
def attend(query, key, value):
    scores = query @ key.T / np.sqrt(query.shape[-1])
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = e / e.sum(axis=-1, keepdims=True)
    return weights @ value, {"query": query, "key": key, "value": value, "weights": weights}
""",
    ),
    Attempt(
        "attention",
        "attend_backward",
        "the sum stands there, not the mean",
        """
def attend_backward(dcontext, cache):
    q, k, v, a = (cache[n] for n in ("query", "key", "value", "weights"))
    da = dcontext @ v.mT
    ds = a * (da - (a * da).mean(axis=-1, keepdims=True)) / q.shape[-1] ** 0.5
    return ds @ k, ds.mT @ q, a.mT @ dcontext
""",
    ),
)

HEADS = (
    Attempt(
        "heads",
        "forward",
        "attention-heads-reshaped",
        """
def forward(params, x, num_heads):
    b, n, d = x.shape
    q, k, v = [
        (x @ params[name]["kernel"] + params[name]["bias"]).reshape(b, num_heads, n, d // num_heads)
        for name in ("query", "key", "value")
    ]
    c, cache = attend(q, k, v)
    c = c.reshape(b, n, d)
    return c @ params["output"]["kernel"] + params["output"]["bias"], cache
""",
    ),
    Attempt(
        "heads",
        "forward",
        "merged without moving the axis of the heads back",
        """
def forward(params, x, num_heads):
    b, n, d = x.shape

    def split(y):
        return y.reshape(b, n, num_heads, d // num_heads).transpose(0, 2, 1, 3)

    q = split(linear.forward(params["query"], x)[0])
    k = split(linear.forward(params["key"], x)[0])
    v = split(linear.forward(params["value"], x)[0])
    context, cache = attend(q, k, v)
    y, _ = linear.forward(params["output"], context.reshape(b, n, d))
    return y, cache
""",
    ),
    Attempt(
        "heads",
        "forward",
        "the output projection is left out",
        """
def forward(params, x, num_heads):
    b, n, d = x.shape
    parts = []
    for name in ("query", "key", "value"):
        y, _ = linear.forward(params[name], x)
        parts.append(y.reshape(b, n, num_heads, -1).transpose(0, 2, 1, 3))
    context, cache = attend(*parts)
    return context.transpose(0, 2, 1, 3).reshape(b, n, d), cache
""",
    ),
    Attempt(
        "heads",
        "forward",
        "keys have the projection of the queries",
        """
def forward(params, x, num_heads):
    batch, length, dim = x.shape
    shape = (batch, length, num_heads, dim // num_heads)
    q = linear.forward(params["query"], x)[0].reshape(shape).swapaxes(1, 2)
    k = linear.forward(params["query"], x)[0].reshape(shape).swapaxes(1, 2)
    v = linear.forward(params["value"], x)[0].reshape(shape).swapaxes(1, 2)
    c, cache = attend(q, k, v)
    y, _ = linear.forward(params["output"], c.swapaxes(1, 2).reshape(batch, length, dim))
    return y, cache
""",
    ),
    Attempt(
        "heads",
        "forward",
        "x is added",
        """
def forward(params, x, num_heads):
    batch, length, dim = x.shape
    shape = (batch, length, num_heads, dim // num_heads)
    qkv = [
        linear.forward(params[name], x)[0].reshape(shape).swapaxes(1, 2)
        for name in ("query", "key", "value")
    ]
    c, cache = attend(*qkv)
    y, _ = linear.forward(params["output"], c.swapaxes(1, 2).reshape(batch, length, dim))
    return x + y, cache
""",
    ),
    Attempt(
        "heads",
        "backward",
        "dx is that through the values alone",
        """
def backward(params, dy, cache):
    b, n, d = dy.shape
    heads = cache["query"].shape[1]
    grads = {}
    dcontext, grads["output"] = linear.backward(params["output"], dy, cache["context"])
    dcontext = dcontext.reshape(b, n, heads, d // heads).swapaxes(1, 2)
    dqkv = attend_backward(dcontext, cache)
    for name, dhead in zip(("query", "key", "value"), dqkv):
        flat = dhead.swapaxes(1, 2).reshape(b, n, d)
        dx, grads[name] = linear.backward(params[name], flat, cache["input"])
    return dx, grads
""",
    ),
    Attempt(
        "heads",
        "backward",
        "the output projection's kernel gradient takes the layer's input",
        """
def backward(params, dy, cache):
    x = cache["input"]
    b, n, d = x.shape
    h = cache["query"].shape[1]
    dc, dout = linear.backward(params["output"], dy, x)
    dq, dk, dv = attend_backward(dc.reshape(b, n, h, d // h).transpose(0, 2, 1, 3), cache)
    merge = lambda z: z.transpose(0, 2, 1, 3).reshape(b, n, d)
    dx1, gq = linear.backward(params["query"], merge(dq), x)
    dx2, gk = linear.backward(params["key"], merge(dk), x)
    dx3, gv = linear.backward(params["value"], merge(dv), x)
    return dx1 + dx2 + dx3, {"query": gq, "key": gk, "value": gv, "output": dout}
""",
    ),
    Attempt(
        "heads",
        "backward",
        "merged without moving the axis of the heads back",
        """
def backward(params, dy, cache):
    x = cache["input"]
    b, n, d = x.shape
    h = cache["query"].shape[1]
    dc, dout = linear.backward(params["output"], dy, cache["context"])
    dheads = attend_backward(dc.reshape(b, n, h, d // h).transpose(0, 2, 1, 3), cache)
    dx, grads = 0, {"output": dout}
    for name, dhead in zip(["query", "key", "value"], dheads):
        dinput, grads[name] = linear.backward(params[name], dhead.reshape(b, n, d), x)
        dx = dx + dinput
    return dx, grads
""",
    ),
    Attempt(
        "heads",
        "backward",
        "split without moving the axis of the heads",
        """
def backward(params, dy, cache):
    x = cache["input"]
    b, n, d = x.shape
    dc, dout = linear.backward(params["output"], dy, cache["context"])
    dheads = attend_backward(dc.reshape(cache["query"].shape), cache)
    dx, grads = np.zeros_like(x), {"output": dout}
    for name, dhead in zip(["query", "key", "value"], dheads):
        flat = dhead.swapaxes(1, 2).reshape(b, n, d)
        dinput, grads[name] = linear.backward(params[name], flat, x)
        dx += dinput
    return dx, grads
""",
    ),
    Attempt(
        "heads",
        "backward",
        "grads.output.kernel: missing",
        """
def backward(params, dy, cache):
    x = cache["input"]
    b, n, d = x.shape
    h = cache["query"].shape[1]
    dc = dy @ params["output"]["kernel"].T
    dheads = attend_backward(dc.reshape(b, n, h, d // h).swapaxes(1, 2), cache)
    dx, grads = np.zeros_like(x), {}
    for name, dhead in zip(["query", "key", "value"], dheads):
        flat = dhead.swapaxes(1, 2).reshape(b, n, d)
        dinput, grads[name] = linear.backward(params[name], flat, x)
        dx += dinput
    return dx, grads
""",
    ),
    Attempt(
        "heads",
        "backward",
        "dx starts at dy",
        """
def backward(params, dy, cache):
    x = cache["input"]
    b, n, d = x.shape
    h = cache["query"].shape[1]
    dc, dout = linear.backward(params["output"], dy, cache["context"])
    dheads = attend_backward(dc.reshape(b, n, h, d // h).swapaxes(1, 2), cache)
    dx, grads = dy, {"output": dout}
    for name, dhead in zip(["query", "key", "value"], dheads):
        flat = dhead.swapaxes(1, 2).reshape(b, n, d)
        dinput, grads[name] = linear.backward(params[name], flat, x)
        dx = dx + dinput
    return dx, grads
""",
    ),
)

EMBEDDING = (
    Attempt(
        "embedding",
        "backward",
        "embedding-gradient-assigned",
        """
def backward(params, dx, cache):
    dtable = np.zeros(params["table"].shape)
    dtable[cache["tokens"]] += dx
    return {"table": dtable}
""",
    ),
    Attempt(
        "embedding",
        "backward",
        "the mean over the places",
        """
def backward(params, dx, cache):
    tokens = cache["tokens"]
    dtable = np.zeros_like(params["table"])
    for v in range(len(dtable)):
        if (tokens == v).any():
            dtable[v] = dx[tokens == v].mean(axis=0)
    return {"table": dtable}
""",
    ),
    Attempt(
        "embedding",
        "backward",
        "the table itself is added",
        """
def backward(params, dx, cache):
    dtable = params["table"].copy()
    np.add.at(dtable, cache["tokens"], dx)
    return {"table": dtable}
""",
    ),
    Attempt(
        "embedding",
        "backward",
        "divided by the size of the batch",
        """
def backward(params, dx, cache):
    dtable = np.zeros_like(params["table"])
    for tokens, drow in zip(cache["tokens"], dx):
        for token, d in zip(tokens, drow):
            dtable[token] += d
    return {"table": dtable / len(dx)}
""",
    ),
    Attempt(
        "embedding",
        "backward",
        "how often each token occurs",
        """
def backward(params, dx, cache):
    dtable = np.zeros_like(params["table"])
    np.add.at(dtable, cache["tokens"], 1.0)
    return {"table": dtable}
""",
    ),
    Attempt(
        "embedding",
        "backward",
        "only the first sequence of the batch",
        """
def backward(params, dx, cache):
    dtable = np.zeros_like(params["table"])
    for p in range(dx.shape[1]):
        dtable[cache["tokens"][0, p]] += dx[0, p]
    return {"table": dtable}
""",
    ),
    Attempt(
        "embedding",
        "backward",
        "grads.table: shape [6, ",
        """
def backward(params, dx, cache):
    tokens = cache["tokens"].ravel()
    onehot = np.eye(tokens.max() + 1)[tokens]
    return {"table": onehot.T @ dx.reshape(len(tokens), -1)}
""",
    ),
    Attempt(
        "embedding",
        "backward",
        "writes over its argument params",
        """
def backward(params, dx, cache):
    dtable = params["table"]
    dtable[:] = 0
    np.add.at(dtable, cache["tokens"], dx)
    return {"table": dtable}
""",
    ),
)

POSITIONS = (
    Attempt(
        "positions",
        "sinusoidal_table",
        "concatenated has h for the denominator",
        """
def sinusoidal_table(length, embed_dim, positions):
    p = np.arange(length)[:, None]
    i = np.arange(embed_dim // 2)
    if positions == "interleaved":
        angle = p / 10000 ** (2 * i / embed_dim)
        table = np.zeros((length, embed_dim))
        table[:, 0::2] = np.sin(angle)
        table[:, 1::2] = np.cos(angle)
        return table
    angle = p / 10000 ** (i / (embed_dim // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
""",
    ),
    Attempt(
        "positions",
        "sinusoidal_table",
        "0/0",
        """
def sinusoidal_table(length, embed_dim, positions):
    h = embed_dim // 2
    p = np.arange(length)[:, None]
    i = np.arange(h)
    if positions == "concatenated":
        w = 10000.0 ** (-i / (h - 1))
        return np.hstack([np.sin(p * w), np.cos(p * w)])
    w = 10000.0 ** (-2 * i / embed_dim)
    out = np.empty((length, embed_dim))
    out[:, ::2], out[:, 1::2] = np.sin(p * w), np.cos(p * w)
    return out
""",
    ),
    Attempt(
        "positions",
        "sinusoidal_table",
        "positions-from-one",
        """
def sinusoidal_table(length, embed_dim, positions):
    h = embed_dim // 2
    p = np.arange(1, length + 1).reshape(-1, 1)
    if positions == "concatenated":
        w = 10000.0 ** (-np.arange(h) / max(h - 1, 1))
        return np.concatenate([np.sin(p * w), np.cos(p * w)], axis=-1)
    w = 10000.0 ** (-2 * np.arange(h) / embed_dim)
    return np.stack([np.sin(p * w), np.cos(p * w)], axis=-1).reshape(length, embed_dim)
""",
    ),
    Attempt(
        "positions",
        "sinusoidal_table",
        "a wave of its own",
        """
def sinusoidal_table(length, embed_dim, positions):
    p = np.arange(length)[:, None]
    if positions == "interleaved":
        i = np.arange(embed_dim)
        angle = p * 10000.0 ** (-2 * i / embed_dim)
        table = np.zeros((length, embed_dim))
        table[:, 0::2] = np.sin(angle[:, 0::2])
        table[:, 1::2] = np.cos(angle[:, 1::2])
        return table
    h = embed_dim // 2
    angle = p * 10000.0 ** (-np.arange(h) / max(h - 1, 1))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
""",
    ),
    Attempt(
        "positions",
        "sinusoidal_table",
        "the minus of the exponent is missing",
        """
def sinusoidal_table(length, embed_dim, positions):
    h = embed_dim // 2
    i = np.arange(h)
    p = np.arange(length)[:, None]
    if positions == "concatenated":
        angle = p * 10000.0 ** (i / max(h - 1, 1))
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    angle = p * 10000.0 ** (2 * i / embed_dim)
    return np.stack([np.sin(angle), np.cos(angle)], axis=2).reshape(length, embed_dim)
""",
    ),
    Attempt(
        "positions",
        "sinusoidal_table",
        "positions-interleaved",
        """
def sinusoidal_table(length, embed_dim, positions):
    # "Attention is all you need"
    table = np.zeros((length, embed_dim))
    for pos in range(length):
        for i in range(embed_dim // 2):
            angle = pos / 10000 ** (2 * i / embed_dim)
            table[pos, 2 * i] = np.sin(angle)
            table[pos, 2 * i + 1] = np.cos(angle)
    return table
""",
    ),
    Attempt(
        "positions",
        "sinusoidal_table",
        "it is the right one transposed",
        """
def sinusoidal_table(length, embed_dim, positions):
    h = embed_dim // 2
    p = np.arange(length)
    rows = []
    for i in range(h):
        w = 10000 ** (-i / max(h - 1, 1)) if positions == "concatenated" else 10000 ** (-i / h)
        rows.append((np.sin(p * w), np.cos(p * w)))
    sines, cosines = zip(*rows)
    if positions == "concatenated":
        return np.array(sines + cosines)
    return np.array([wave for pair in rows for wave in pair])
""",
    ),
)

DROPOUT = (
    Attempt(
        "dropout",
        "forward",
        "is not scaled by 1/(1 - p)",
        """
def forward(x, keep, rate):
    mask = np.where(keep, 1.0, 0.0)
    return x * mask, mask
""",
    ),
    Attempt(
        "dropout",
        "forward",
        "divided by p instead of 1 - p",
        """
def forward(x, keep, rate):
    m = keep.astype(x.dtype) / rate
    return m * x, m
""",
    ),
    Attempt(
        "dropout",
        "forward",
        "the share that is kept",
        """
def forward(x, keep, rate):
    m = keep / keep.mean()
    return x * m, m
""",
    ),
    Attempt(
        "dropout",
        "forward",
        "the cache lacks the scale",
        """
def forward(x, keep, rate):
    mask = keep.astype(float)
    y = x * mask / (1 - rate)
    return y, mask
""",
    ),
    Attempt(
        "dropout",
        "forward",
        "dtype bool, expected float64",
        """
def forward(x, keep, rate):
    return np.where(keep, x / (1 - rate), 0.0), keep
""",
    ),
    Attempt(
        "dropout",
        "forward",
        "what should be kept is dropped",
        """
def forward(x, keep, rate):
    mask = np.ones_like(x) / (1 - rate)
    mask[keep] = 0
    return x * mask, mask
""",
    ),
    Attempt(
        "dropout",
        "backward",
        "dx lacks the scale",
        """
def backward(dy, cache):
    return np.where(cache != 0, dy, 0.0)
""",
    ),
    Attempt(
        "dropout",
        "backward",
        "divided by m",
        """
def backward(dy, cache):
    return dy / cache
""",
    ),
    Attempt(
        "dropout",
        "backward",
        "the scale twice",
        """
def backward(dy, cache):
    scale = cache.max()
    return dy * cache * scale
""",
    ),
)

BLOCK = (
    Attempt(
        "block",
        "forward",
        "block-post-norm",
        """
def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    a, _ = attention.forward(params["attention"], x, num_heads)
    a, _ = dropout.forward(a, keep["attention"], dropout_rate)
    h, _ = layer_norm.forward(params["attention_norm"], x + a, epsilon)
    f, _ = feed_forward.forward(params["feed_forward"], h, gelu)
    f, _ = dropout.forward(f, keep["feed_forward"], dropout_rate)
    y, _ = layer_norm.forward(params["feed_forward_norm"], h + f, epsilon)
    return y, {}
""",
    ),
    Attempt(
        "block",
        "forward",
        "residual-from-normalised",
        """
def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    x, c1 = layer_norm.forward(params["attention_norm"], x, epsilon)
    a, c2 = attention.forward(params["attention"], x, num_heads)
    a, c3 = dropout.forward(a, keep["attention"], dropout_rate)
    x = x + a
    x, c4 = layer_norm.forward(params["feed_forward_norm"], x, epsilon)
    f, c5 = feed_forward.forward(params["feed_forward"], x, gelu)
    f, c6 = dropout.forward(f, keep["feed_forward"], dropout_rate)
    return x + f, (c1, c2, c3, c4, c5, c6)
""",
    ),
    Attempt(
        "block",
        "forward",
        "dropout acts on the whole sum",
        """
def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    n, _ = layer_norm.forward(params["attention_norm"], x, epsilon)
    a, _ = attention.forward(params["attention"], n, num_heads)
    h, _ = dropout.forward(x + a, keep["attention"], dropout_rate)
    n, _ = layer_norm.forward(params["feed_forward_norm"], h, epsilon)
    f, _ = feed_forward.forward(params["feed_forward"], n, gelu)
    y, _ = dropout.forward(h + f, keep["feed_forward"], dropout_rate)
    return y, None
""",
    ),
    Attempt(
        "block",
        "forward",
        "the second norm has the parameters of the first",
        """
def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    def norm(z):
        return layer_norm.forward(params["attention_norm"], z, epsilon)[0]

    a, _ = attention.forward(params["attention"], norm(x), num_heads)
    h = x + dropout.forward(a, keep["attention"], dropout_rate)[0]
    f, _ = feed_forward.forward(params["feed_forward"], norm(h), gelu)
    return h + dropout.forward(f, keep["feed_forward"], dropout_rate)[0], {}
""",
    ),
    Attempt(
        "block",
        "forward",
        "both branches drop what the first drops",
        """
def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    keep = keep["attention"]
    a, _ = layer_norm.forward(params["attention_norm"], x, epsilon)
    a, _ = attention.forward(params["attention"], a, num_heads)
    h = x + dropout.forward(a, keep, dropout_rate)[0]
    f, _ = layer_norm.forward(params["feed_forward_norm"], h, epsilon)
    f, _ = feed_forward.forward(params["feed_forward"], f, gelu)
    return h + dropout.forward(f, keep, dropout_rate)[0], {}
""",
    ),
    Attempt(
        "block",
        "backward",
        "residual-gradient-dropped",
        """
def backward(params, dy, cache):
    grads = {}
    d = dropout.backward(dy, cache["feed_forward_dropout"])
    for name, layer in (("feed_forward", feed_forward), ("feed_forward_norm", layer_norm)):
        d, grads[name] = layer.backward(params[name], d, cache[name])
    d = dropout.backward(d, cache["attention_dropout"])
    for name, layer in (("attention", attention), ("attention_norm", layer_norm)):
        d, grads[name] = layer.backward(params[name], d, cache[name])
    return d, grads
""",
    ),
    Attempt(
        "block",
        "backward",
        "the skip passes through dropout",
        """
def backward(params, dy, cache):
    dy = dropout.backward(dy, cache["feed_forward_dropout"])
    d, gf = feed_forward.backward(params["feed_forward"], dy, cache["feed_forward"])
    d, gfn = layer_norm.backward(params["feed_forward_norm"], d, cache["feed_forward_norm"])
    dh = dy + d
    dh = dropout.backward(dh, cache["attention_dropout"])
    d, ga = attention.backward(params["attention"], dh, cache["attention"])
    d, gan = layer_norm.backward(params["attention_norm"], d, cache["attention_norm"])
    return dh + d, {
        "attention_norm": gan,
        "attention": ga,
        "feed_forward_norm": gfn,
        "feed_forward": gf,
    }
""",
    ),
    Attempt(
        "block",
        "backward",
        "the attention branch gets dy, where dh belongs",
        """
def backward(params, dy, cache):
    grads = {}
    df = dropout.backward(dy, cache["feed_forward_dropout"])
    df, grads["feed_forward"] = feed_forward.backward(
        params["feed_forward"], df, cache["feed_forward"]
    )
    df, grads["feed_forward_norm"] = layer_norm.backward(
        params["feed_forward_norm"], df, cache["feed_forward_norm"]
    )
    da = dropout.backward(dy, cache["attention_dropout"])
    da, grads["attention"] = attention.backward(params["attention"], da, cache["attention"])
    da, grads["attention_norm"] = layer_norm.backward(
        params["attention_norm"], da, cache["attention_norm"]
    )
    return dy + df + da, grads
""",
    ),
    Attempt(
        "block",
        "backward",
        "the norms are passed over",
        """
def backward(params, dy, cache):
    df = dropout.backward(dy, cache["feed_forward_dropout"])
    df, gf = feed_forward.backward(params["feed_forward"], df, cache["feed_forward"])
    _, gfn = layer_norm.backward(params["feed_forward_norm"], df, cache["feed_forward_norm"])
    dh = dy + df
    da = dropout.backward(dh, cache["attention_dropout"])
    da, ga = attention.backward(params["attention"], da, cache["attention"])
    _, gan = layer_norm.backward(params["attention_norm"], da, cache["attention_norm"])
    return dh + da, {
        "attention_norm": gan,
        "attention": ga,
        "feed_forward_norm": gfn,
        "feed_forward": gf,
    }
""",
    ),
    Attempt(
        "block",
        "backward",
        "each other's dropout",
        """
def backward(params, dy, cache):
    grads = {}

    def branch(d, norm, layer, module, mask):
        d = dropout.backward(d, cache[mask])
        d, grads[layer] = module.backward(params[layer], d, cache[layer])
        d, grads[norm] = layer_norm.backward(params[norm], d, cache[norm])
        return d

    dh = dy + branch(dy, "feed_forward_norm", "feed_forward", feed_forward, "attention_dropout")
    dx = dh + branch(dh, "attention_norm", "attention", attention, "feed_forward_dropout")
    return dx, grads
""",
    ),
    Attempt(
        "block",
        "forward",
        "the feed-forward layer reads h without its norm",
        """
def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    a, _ = layer_norm.forward(params["attention_norm"], x, epsilon)
    a, _ = attention.forward(params["attention"], a, num_heads)
    h = x + dropout.forward(a, keep["attention"], dropout_rate)[0]
    f, _ = feed_forward.forward(params["feed_forward"], h, gelu)
    return h + dropout.forward(f, keep["feed_forward"], dropout_rate)[0], {}
""",
    ),
    Attempt(
        "block",
        "forward",
        "attention's branch is lost",
        """
def forward(params, x, num_heads, gelu, epsilon, keep, dropout_rate):
    h, _ = layer_norm.forward(params["attention_norm"], x, epsilon)
    h, _ = attention.forward(params["attention"], h, num_heads)
    h = x + dropout.forward(h, keep["attention"], dropout_rate)[0]
    f, _ = layer_norm.forward(params["feed_forward_norm"], h, epsilon)
    f, _ = feed_forward.forward(params["feed_forward"], f, gelu)
    return x + dropout.forward(f, keep["feed_forward"], dropout_rate)[0], {}
""",
    ),
)

MODEL = (
    Attempt(
        "model",
        "backward",
        "the blocks are passed in the order of the forward pass",
        """
def backward(params, dlogits, cache):
    dx, head = linear.backward(params["head"], dlogits, cache["head"])
    dx, norm = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    blocks = []
    for p, c in zip(params["blocks"], cache["blocks"]):
        dx, g = block.backward(p, dx, c)
        blocks.append(g)
    dx = dropout.backward(dx, cache["embedding_dropout"])
    emb = embedding.backward(params["embedding"], dx, cache["embedding"])
    return {"embedding": emb, "blocks": blocks, "final_norm": norm, "head": head}
""",
    ),
    Attempt(
        "model",
        "backward",
        "stand last first",
        """
def backward(params, dlogits, cache):
    dx, head = linear.backward(params["head"], dlogits, cache["head"])
    dx, norm = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    blocks = []
    for i in reversed(range(len(params["blocks"]))):
        dx, g = block.backward(params["blocks"][i], dx, cache["blocks"][i])
        blocks.append(g)
    dx = dropout.backward(dx, cache["embedding_dropout"])
    emb = embedding.backward(params["embedding"], dx, cache["embedding"])
    return {"embedding": emb, "blocks": blocks, "final_norm": norm, "head": head}
""",
    ),
    Attempt(
        "model",
        "backward",
        "every block gets the gradient of the final norm",
        """
def backward(params, dlogits, cache):
    grads = {}
    dx, grads["head"] = linear.backward(params["head"], dlogits, cache["head"])
    dx, grads["final_norm"] = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    results = [block.backward(p, dx, c) for p, c in zip(params["blocks"], cache["blocks"])]
    grads["blocks"] = [g for _, g in results]
    dx = dropout.backward(results[0][0], cache["embedding_dropout"])
    grads["embedding"] = embedding.backward(params["embedding"], dx, cache["embedding"])
    return grads
""",
    ),
    Attempt(
        "model",
        "backward",
        "counted twice",
        """
def backward(params, dlogits, cache):
    grads = {"blocks": [None] * len(params["blocks"])}
    dx, grads["head"] = linear.backward(params["head"], dlogits, cache["head"])
    dx, grads["final_norm"] = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    for i in range(len(params["blocks"]) - 1, -1, -1):
        d, grads["blocks"][i] = block.backward(params["blocks"][i], dx, cache["blocks"][i])
        dx = dx + d  # residual connection
    dx = dropout.backward(dx, cache["embedding_dropout"])
    grads["embedding"] = embedding.backward(params["embedding"], dx, cache["embedding"])
    return grads
""",
    ),
    Attempt(
        "model",
        "backward",
        "the dropout after the embedding is passed over",
        """
def backward(params, dlogits, cache):
    dx, head = linear.backward(params["head"], dlogits, cache["head"])
    dx, final_norm = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    blocks = []
    for p, c in reversed(list(zip(params["blocks"], cache["blocks"]))):
        dx, g = block.backward(p, dx, c)
        blocks.insert(0, g)
    return {
        "embedding": embedding.backward(params["embedding"], dx, cache["embedding"]),
        "blocks": blocks,
        "final_norm": final_norm,
        "head": head,
    }
""",
    ),
    Attempt(
        "model",
        "backward",
        "comes before the blocks",
        """
def backward(params, dlogits, cache):
    dx, head = linear.backward(params["head"], dlogits, cache["head"])
    dx, final_norm = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    dx = dropout.backward(dx, cache["embedding_dropout"])
    blocks = [None, None]
    for i in (1, 0):
        dx, blocks[i] = block.backward(params["blocks"][i], dx, cache["blocks"][i])
    emb = embedding.backward(params["embedding"], dx, cache["embedding"])
    return {"embedding": emb, "blocks": blocks, "final_norm": final_norm, "head": head}
""",
    ),
    Attempt(
        "model",
        "backward",
        "grads.final_norm.scale: missing",
        """
def backward(params, dlogits, cache):
    dx, head = linear.backward(params["head"], dlogits, cache["head"])
    dx, _ = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    blocks = []
    for p, c in zip(params["blocks"][::-1], cache["blocks"][::-1]):
        dx, g = block.backward(p, dx, c)
        blocks = [g] + blocks
    dx = dropout.backward(dx, cache["embedding_dropout"])
    emb = embedding.backward(params["embedding"], dx, cache["embedding"])
    return {"embedding": emb, "blocks": blocks, "head": head}
""",
    ),
)

LOSS = (
    Attempt(
        "loss",
        "forward",
        "exp overflows or log is taken of 0",
        """
def forward(logits, targets, mask):
    z, y = logits[mask], targets[mask]
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    logp = np.log(p)
    n = max(len(y), 1)
    loss = -logp[np.arange(len(y)), y].sum() / n
    return loss, {"mask": mask, "targets": y, "log_probabilities": logp}
""",
    ),
    Attempt(
        "loss",
        "forward",
        "with nothing masked the loss is 0/0",
        """
def forward(logits, targets, mask):
    z, y = logits[mask], targets[mask]
    z = z - z.max(axis=-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    loss = -np.mean(logp[np.arange(len(y)), y])
    return loss, {"mask": mask, "targets": y, "log_probabilities": logp}
""",
    ),
    Attempt(
        "loss",
        "forward",
        "loss-over-batch-times-length",
        """
def forward(logits, targets, mask):
    z = logits - logits.max(axis=-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    loss = np.mean(nll * mask)
    return loss, {"mask": mask, "targets": targets[mask], "log_probabilities": logp[mask]}
""",
    ),
    Attempt(
        "loss",
        "forward",
        "divided by the length",
        """
def forward(logits, targets, mask):
    z = logits - logits.max(axis=-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    loss = (nll * mask).sum() / mask.shape[1]
    return loss, {"mask": mask, "targets": targets[mask], "log_probabilities": logp[mask]}
""",
    ),
    Attempt(
        "loss",
        "forward",
        "1e-09 is added to p before its logarithm",
        """
def forward(logits, targets, mask):
    z, y = logits[mask], targets[mask]
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    logp = np.log(p + 1e-9)
    loss = -logp[np.arange(len(y)), y].sum() / max(len(y), 1)
    return loss, {"mask": mask, "targets": y, "log_probabilities": logp}
""",
    ),
    Attempt(
        "loss",
        "forward",
        "loss-averaged-by-sequence",
        """
def forward(logits, targets, mask):
    z = logits - logits.max(axis=-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    total = 0.0
    for lp, y, m in zip(logp, targets, mask):
        if m.any():
            total += -lp[m, y[m]].mean()
    loss = total / len(mask)
    return loss, {"mask": mask, "targets": targets[mask], "log_probabilities": logp[mask]}
""",
    ),
    Attempt(
        "loss",
        "backward",
        "loss-gradient-not-averaged",
        """
def backward(cache):
    mask, y, logp = cache["mask"], cache["targets"], cache["log_probabilities"]
    d = np.exp(logp)
    d[np.arange(len(y)), y] -= 1
    dlogits = np.zeros(mask.shape + (logp.shape[-1],))
    dlogits[mask] = d
    return dlogits
""",
    ),
    Attempt(
        "loss",
        "backward",
        "loss-over-batch-times-length",
        """
def backward(cache):
    mask, y, logp = cache["mask"], cache["targets"], cache["log_probabilities"]
    onehot = np.eye(logp.shape[1])[y]
    dlogits = np.zeros((*mask.shape, logp.shape[1]))
    dlogits[mask] = (np.exp(logp) - onehot) / mask.size
    return dlogits
""",
    ),
    Attempt(
        "loss",
        "backward",
        "log p stands where p belongs",
        """
def backward(cache):
    mask, y, logp = cache["mask"], cache["targets"], cache["log_probabilities"]
    p = logp.copy()
    p[range(len(y)), y] -= 1.0
    dlogits = np.zeros((*mask.shape, p.shape[1]))
    dlogits[mask] = p / max(1, mask.sum())
    return dlogits
""",
    ),
    Attempt(
        "loss",
        "backward",
        "only the target's entry has a gradient",
        """
def backward(cache):
    mask, y, logp = cache["mask"], cache["targets"], cache["log_probabilities"]
    n = max(len(y), 1)
    d = np.zeros_like(logp)
    for i in range(len(y)):
        d[i, y[i]] = (np.exp(logp[i, y[i]]) - 1) / n
    dlogits = np.zeros((*mask.shape, logp.shape[1]))
    dlogits[mask] = d
    return dlogits
""",
    ),
    Attempt(
        "loss",
        "backward",
        "dlogits: shape [",
        """
def backward(cache):
    y, logp = cache["targets"], cache["log_probabilities"]
    d = np.exp(logp)
    d[np.arange(len(y)), y] -= 1
    return d / max(len(y), 1)
""",
    ),
    Attempt(
        "loss",
        "forward",
        "the targets are not used",
        """
def forward(logits, targets, mask):
    z, y = logits[mask], targets[mask]
    z = z - z.max(axis=-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    loss = -np.sum(np.exp(logp) * logp) / max(len(y), 1)
    return loss, {"mask": mask, "targets": y, "log_probabilities": logp}
""",
    ),
    Attempt(
        "loss",
        "forward",
        "underflowed to 0",
        """
def forward(logits, targets, mask):
    z, y = logits[mask], targets[mask]
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    logp = np.log(e / e.sum(axis=-1, keepdims=True))
    loss = -logp[np.arange(len(y)), y].sum() / max(len(y), 1)
    return loss, {"mask": mask, "targets": y, "log_probabilities": logp}
""",
    ),
)

ADAM = (
    Attempt(
        "adam",
        "update",
        "adam-without-bias-correction",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    step = m / (np.sqrt(v) + epsilon)
    return param - learning_rate * (step + weight_decay * param), m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "β t stands where βᵗ belongs",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    mhat = m / (1 - beta1 * t)
    with np.errstate(invalid="ignore"):
        vhat = v / (1 - beta2 * t)
        step = mhat / (np.sqrt(vhat) + epsilon)
    return param - learning_rate * (step + weight_decay * param), m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "adam-decay-in-gradient",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    g = grad + weight_decay * param
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return param - learning_rate * m_hat / (np.sqrt(v_hat) + epsilon), m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "θ decays after the step",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    theta = param - learning_rate * m_hat / (np.sqrt(v_hat) + epsilon)
    theta = theta - learning_rate * weight_decay * theta
    return theta, m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "the gradient itself",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    v_hat = v / (1 - beta2**t)
    update = grad / (np.sqrt(v_hat) + epsilon)
    return param - learning_rate * (update + weight_decay * param), m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "m̂ alone is corrected",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**t)
    direction = m_hat / (np.sqrt(v) + epsilon)
    return param - learning_rate * (direction + weight_decay * param), m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "the corrected m̂ and v̂ are returned",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m = (beta1 * m + (1 - beta1) * grad) / (1 - beta1**t)
    v = (beta2 * v + (1 - beta2) * grad**2) / (1 - beta2**t)
    param = param - learning_rate * (m / (np.sqrt(v) + epsilon) + weight_decay * param)
    return param, m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "writes over its argument",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m *= beta1
    m += (1 - beta1) * grad
    v *= beta2
    v += (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    param -= learning_rate * (m_hat / (np.sqrt(v_hat) + epsilon) + weight_decay * param)
    return param, m, v
""",
    ),
    Attempt(
        "adam",
        "update",
        "β and 1 - β are in each other's place",
        """
def update(param, grad, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    m = (1 - beta1) * m + beta1 * grad
    v = (1 - beta2) * v + beta2 * grad**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    step = m_hat / (np.sqrt(v_hat) + epsilon) + weight_decay * param
    return param - learning_rate * step, m, v
""",
    ),
)

MASK_RATIO = (
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "π/2 is missing",
        """
def one_minus_cosine(u):
    # arccos(1 - r) = u
    return 1 - np.cos(u)
""",
    ),
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "mask-ratio-mirrored",
        """
def one_minus_cosine(u):
    return np.cos(np.pi * u / 2)
""",
    ),
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "sin²(πu/2)",
        """
def one_minus_cosine(u):
    return np.sin(np.pi / 2 * u) ** 2
""",
    ),
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "degrees",
        """
def one_minus_cosine(u):
    return 1 - np.cos(90 * u)
""",
    ),
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "the distribution function P(u)",
        """
def one_minus_cosine(u):
    return np.arccos(1 - u) * 2 / np.pi
""",
    ),
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "-1 times the right one",
        """
def one_minus_cosine(u):
    return np.cos(np.pi * u / 2) - 1
""",
    ),
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "raises TypeError in line",
        """
import math

def one_minus_cosine(u):
    return 1 - math.cos(math.pi / 2 * u)
""",
    ),
    Attempt(
        "mask-ratio",
        "one_minus_cosine",
        "lacks the factor ½",
        """
def one_minus_cosine(u):
    return 2 * np.sin(np.pi * u / 2) ** 2
""",
    ),
)

REVEAL_COUNTS = (
    Attempt(
        "reveal-counts",
        "cosine",
        "floor of floating point",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    counts, m = [], num_masked
    for k in range(1, K + 1):
        left = int(num_masked * np.cos(np.pi * k / (2 * K)))
        left = 0 if k == K else max(1, min(m - 1, left))
        counts.append(m - left)
        m = left
    return np.array(counts)
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "rounded to the nearest",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    masked = [num_masked]
    for k in range(1, K):
        n = round(num_masked * np.cos(np.pi / 2 * k / K))
        masked.append(max(1, min(masked[-1] - 1, n)))
    masked.append(0)
    return np.array([masked[k] - masked[k + 1] for k in range(K)])
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "K - 1 stands where K belongs",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    curve = np.cos(np.linspace(0, np.pi / 2, K))
    masked = [num_masked]
    for k in range(1, K):
        masked.append(max(1, min(masked[-1] - 1, int(num_masked * curve[k]))))
    return -np.diff(masked + [0])
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "the ½ is missing",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    masked = [num_masked]
    for k in range(1, K):
        left = int(np.floor(num_masked * np.cos(np.pi * k / K)))
        masked.append(max(1, min(masked[-1] - 1, left)))
    return -np.diff(masked + [0])
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "counted from 0",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    masked = [num_masked]
    for k in range(K - 1):
        left = int(num_masked * np.cos(np.pi * k / (2 * K)))
        if 3 * k == 2 * K:
            left = num_masked // 2
        masked.append(max(1, min(masked[-1] - 1, left)))
    return -np.diff(masked + [0])
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "what is still masked is returned",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    masked = []
    m = num_masked
    for k in range(1, K):
        bound = num_masked // 2 if 3 * k == 2 * K else int(num_masked * np.cos(np.pi * k / (2 * K)))
        m = max(1, min(m - 1, bound))
        masked.append(m)
    return np.array(masked + [0])
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "-1 times the right one",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    k = np.arange(K + 1)
    c = np.cos(np.pi * k / (2 * K))
    c[3 * k == 2 * K] = 0.5
    masked = np.floor(num_masked * c).astype(int)
    masked[-1] = 0
    for i in range(1, K):
        masked[i] = max(1, min(masked[i - 1] - 1, masked[i]))
    return np.diff(masked)
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "dtype float64, expected int64",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    k = np.arange(1, K)
    c = np.where(3 * k == 2 * K, 0.5, np.cos(np.pi * k / (2 * K)))
    masked = np.concatenate([[num_masked], np.floor(num_masked * c), [0]])
    for i in range(1, K):
        masked[i] = max(1, min(masked[i - 1] - 1, masked[i]))
    return masked[:-1] - masked[1:]
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "rounded up",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    masked = [num_masked]
    for k in range(1, K):
        c = 0.5 if 3 * k == 2 * K else np.cos(np.pi * k / (2 * K))
        masked.append(max(1, min(masked[-1] - 1, int(np.ceil(num_masked * c)))))
    return -np.diff(masked + [0])
""",
    ),
    Attempt(
        "reveal-counts",
        "cosine",
        "there is no cosine",
        """
def cosine(num_masked, num_steps):
    K = min(num_steps, num_masked)
    return np.diff([num_masked * k // K for k in range(K + 1)])
""",
    ),
)

DECODING_STEP = (
    Attempt(
        "decoding-step",
        "decoding_step",
        "known tokens are ranked too, and predicted anew",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = logits.copy()
    z[:, mask_token_id] = -np.inf
    z = z / temperature
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    order = np.argsort(-p.max(axis=1), kind="stable")
    new = tokens.copy()
    new[order[:count]] = p.argmax(axis=1)[order[:count]]
    return new
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "decode-mask-token-emitted",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = (logits - logits.max(axis=1, keepdims=True)) / temperature
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    confidence = np.where(tokens == mask_token_id, p.max(axis=1), -1)
    chosen = np.argsort(-confidence, kind="stable")[:count]
    out = tokens.copy()
    out[chosen] = p[chosen].argmax(axis=1)
    return out
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "decode-mask-excluded-after-softmax",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = (logits - logits.max(axis=1, keepdims=True)) / temperature
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    p[:, mask_token_id] = 0
    confidence = np.where(tokens == mask_token_id, p.max(axis=1), -1)
    chosen = np.argsort(-confidence, kind="stable")[:count]
    out = tokens.copy()
    out[chosen] = p[chosen].argmax(axis=1)
    return out
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "decode-confidence-unscaled",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = logits.copy()
    z[:, mask_token_id] = -np.inf
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    confidence = p.max(axis=1)
    confidence[tokens != mask_token_id] = -np.inf
    out = tokens.copy()
    for i in np.argsort(-confidence, kind="stable")[:count]:
        out[i] = np.argmax(p[i])
    return out
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "decode-least-confident-first",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = logits / temperature
    z[:, mask_token_id] = -np.inf
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    confidence = np.where(tokens == mask_token_id, p.max(axis=1), np.inf)
    order = np.argsort(confidence, kind="stable")
    out = tokens.copy()
    out[order[:count]] = p.argmax(axis=1)[order[:count]]
    return out
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "decode-ties-to-higher-position",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = logits / temperature
    z[:, mask_token_id] = -np.inf
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    confidence = np.where(tokens == mask_token_id, p.max(axis=1), -np.inf)
    best = np.argsort(confidence, kind="stable")[::-1][:count]
    out = tokens.copy()
    out[best] = p.argmax(axis=1)[best]
    return out
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "counted among the masked ones",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    masked = tokens == mask_token_id
    z = logits[masked] / temperature
    z[:, mask_token_id] = -np.inf
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    order = np.argsort(-p.max(axis=1), kind="stable")[:count]
    out = tokens.copy()
    out[order] = p.argmax(axis=1)[order]
    return out
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "id 0 is taken for [MASK]",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = logits / temperature
    z[:, 0] = -np.inf
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    confidence = np.where(tokens == 0, p.max(axis=1), -np.inf)
    best = np.argsort(-confidence, kind="stable")[:count]
    out = tokens.copy()
    out[best] = p.argmax(axis=1)[best]
    return out
""",
    ),
    Attempt(
        "decoding-step",
        "decoding_step",
        "ranked by the margin",
        """
def decoding_step(logits, tokens, mask_token_id, count, temperature):
    z = logits / temperature
    z[:, mask_token_id] = -np.inf
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    top = np.sort(p, axis=1)
    confidence = np.where(tokens == mask_token_id, top[:, -1] - top[:, -2], -1)
    best = np.argsort(-confidence, kind="stable")[:count]
    out = tokens.copy()
    out[best] = p.argmax(axis=1)[best]
    return out
""",
    ),
)

BOUND = (
    Attempt(
        "bound",
        "any_order_bound",
        "one order alone, from left to right",
        """
def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    s = (1 << length) - 1
    total = 0.0
    for i in range(length):
        total += log_probabilities[s, i]
        s &= ~(1 << i)
    return total
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "its bit is cleared before instead of after",
        """
from itertools import permutations

def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    totals = []
    for order in permutations(range(length)):
        s, total = 2**length - 1, 0.0
        for j in order:
            s -= 2**j
            total += log_probabilities[s, j]
        totals.append(total)
    return np.mean(totals)
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "bits stand for what is known",
        """
from itertools import permutations

def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    totals = []
    for order in permutations(range(length)):
        s, total = 0, 0.0
        for j in order:
            total += log_probabilities[s, j]
            s |= 1 << j
        totals.append(total)
    return np.mean(totals)
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "the logarithm of the mean of p(x)",
        """
from itertools import permutations

def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    p = []
    for order in permutations(range(length)):
        s, logp = 2**length - 1, 0.0
        for j in order:
            logp += log_probabilities[s, j]
            s -= 2**j
        p.append(np.exp(logp))
    return np.log(np.mean(p))
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "all sets S have the same weight",
        """
def any_order_bound(log_probabilities):
    n = log_probabilities.shape[1]
    values = []
    for s in range(1, 2**n):
        masked = [j for j in range(n) if s >> j & 1]
        values.append(np.mean([log_probabilities[s, j] for j in masked]))
    return n * np.mean(values)
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "in bits",
        """
from itertools import permutations

def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    orders = list(permutations(range(length)))
    total = 0.0
    for order in orders:
        s = 2**length - 1
        for j in order:
            total += log_probabilities[s, j] / np.log(2)
            s ^= 1 << j
    return total / len(orders)
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "the factor L is missing",
        """
from itertools import permutations

def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    terms = []
    for order in permutations(range(length)):
        s = 2**length - 1
        for j in order:
            terms.append(log_probabilities[s, j])
            s -= 1 << j
    return np.mean(terms)
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "raises IndexError in line",
        """
from itertools import permutations

def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    total, number = 0.0, 0
    for order in permutations(range(length)):
        s = 2**length
        for j in order:
            total += log_probabilities[s, j]
            s -= 2**j
        number += 1
    return total / number
""",
    ),
    Attempt(
        "bound",
        "any_order_bound",
        "bits are counted from the left",
        """
from itertools import permutations

def any_order_bound(log_probabilities):
    length = log_probabilities.shape[1]
    totals = []
    for order in permutations(range(length)):
        masked = ["1"] * length
        total = 0.0
        for j in order:
            total += log_probabilities[int("".join(masked), 2), j]
            masked[j] = "0"
        totals.append(total)
    return np.mean(totals)
""",
    ),
)

DIFFUSION_LOSS = (
    Attempt(
        "diffusion-loss",
        "loss_forward",
        "squared-error-summed",
        """
def loss_forward(steps, output, clean, index, noise):
    C = noise.shape[1]
    e, v = output[:, :C], output[:, C:]
    low, high = steps.low[index][:, None], steps.high[index][:, None]
    l = low + (v + 1) / 2 * (high - low)
    d = (steps.mean_of_clean[index] * steps.to_clean[index])[:, None] * (e - noise)
    kl = 0.5 * (l - low - 1 + np.exp(low - l) + d**2 * np.exp(-l))
    dl = 0.5 * (1 - np.exp(low - l) - d**2 * np.exp(-l))
    dv = dl * (high - low) / 2 / np.log(2)
    return ((e - noise) ** 2).sum(1), kl.mean(1) / np.log(2), {"error": e - noise, "dv": dv}
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_forward",
        "d is not squared",
        """
def loss_forward(steps, output, clean, index, noise):
    C = noise.shape[1]
    e, v = output[:, :C], output[:, C:]
    low, high = steps.low[index][:, None], steps.high[index][:, None]
    f = (v + 1) / 2
    l = f * high + (1 - f) * low
    d = (steps.mean_of_clean[index] * steps.to_clean[index])[:, None] * (e - noise)
    kl = (l - low - 1 + np.exp(low - l) + d * np.exp(-l)) / 2 / np.log(2)
    dv = (1 - np.exp(low - l) - d * np.exp(-l)) / 2 * (high - low) / 2 / np.log(2)
    return np.mean((e - noise) ** 2, axis=1), kl.mean(axis=1), {"error": e - noise, "dv": dv}
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_forward",
        "the two variances are in each other's place",
        """
def loss_forward(steps, output, clean, index, noise):
    e, v = np.split(output, 2, axis=1)
    low, high = steps.low[index, None], steps.high[index, None]
    l = low + 0.5 * (v + 1) * (high - low)
    d = (steps.mean_of_clean * steps.to_clean)[index, None] * (e - noise)
    kl = 0.5 * (low - l - 1 + np.exp(l - low) + d**2 * np.exp(-low))
    dv = 0.5 * (np.exp(l - low) - 1) * 0.5 * (high - low) / np.log(2)
    error = e - noise
    return (error**2).mean(1), kl.mean(1) / np.log(2), {"error": error, "dv": dv}
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_forward",
        "dv is ∂/∂l",
        """
def loss_forward(steps, output, clean, index, noise):
    e, v = np.split(output, 2, axis=1)
    low, high = steps.low[index, None], steps.high[index, None]
    l = low + 0.5 * (v + 1) * (high - low)
    d = (steps.mean_of_clean * steps.to_clean)[index, None] * (e - noise)
    narrow, wide = np.exp(low - l), d**2 * np.exp(-l)
    bound = 0.5 * (l - low - 1 + narrow + wide) / np.log(2)
    dv = 0.5 * (1 - narrow - wide) / np.log(2)
    return ((e - noise) ** 2).mean(1), bound.mean(1), {"error": e - noise, "dv": dv}
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_forward",
        "-1 times the right one",
        """
def loss_forward(steps, output, clean, index, noise):
    e, v = np.split(output, 2, axis=1)
    low, high = steps.low[index, None], steps.high[index, None]
    l = low + 0.5 * (v + 1) * (high - low)
    error = noise - e
    d = (steps.mean_of_clean * steps.to_clean)[index, None] * error
    narrow, wide = np.exp(low - l), d**2 * np.exp(-l)
    bound = 0.5 * (l - low - 1 + narrow + wide) / np.log(2)
    dv = 0.25 * (1 - narrow - wide) * (high - low) / np.log(2)
    return (error**2).mean(1), bound.mean(1), {"error": error, "dv": dv}
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_forward",
        "d is e - ε",
        """
def loss_forward(steps, output, clean, index, noise):
    e, v = np.split(output, 2, axis=1)
    low, high = steps.low[index, None], steps.high[index, None]
    l = low + 0.5 * (v + 1) * (high - low)
    d = e - noise
    narrow, wide = np.exp(low - l), d**2 * np.exp(-l)
    bound = 0.5 * (l - low - 1 + narrow + wide) / np.log(2)
    dv = 0.25 * (1 - narrow - wide) * (high - low) / np.log(2)
    return (d**2).mean(1), bound.mean(1), {"error": d, "dv": dv}
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_backward",
        "the 2 of the square's derivative is missing",
        """
def loss_backward(cache, drows):
    C = cache["error"].shape[1]
    de = drows[:, None] * cache["error"] / C
    dv = drows[:, None] * cache["dv"] / C
    return np.hstack([de, dv])
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_backward",
        "divided by the number of rows",
        """
def loss_backward(cache, drows):
    rows, C = cache["error"].shape
    grad = np.concatenate([2 * cache["error"], cache["dv"]], axis=1) / C
    return drows[:, None] * grad / rows
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_backward",
        "the gradient of v lacks the 1/C",
        """
def loss_backward(cache, drows):
    de = 2 * cache["error"] / cache["error"].shape[1]
    return np.concatenate([de, cache["dv"]], axis=1) * drows[:, None]
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_backward",
        "could not be broadcast",
        """
def loss_backward(cache, drows):
    C = cache["error"].shape[1]
    return np.concatenate([2 * cache["error"], cache["dv"]], axis=1) / C * drows
""",
    ),
    Attempt(
        "diffusion-loss",
        "loss_forward",
        "the -1 is missing",
        """
def loss_forward(steps, output, clean, index, noise):
    e, v = np.split(output, 2, axis=1)
    low, high = steps.low[index, None], steps.high[index, None]
    l = low + (v + 1) * (high - low) / 2
    d = (steps.mean_of_clean * steps.to_clean)[index, None] * (e - noise)
    narrow, wide = np.exp(low - l), d**2 / np.exp(l)
    bound = (l - low + narrow + wide) / 2 / np.log(2)
    dv = (1 - narrow - wide) / 2 * (high - low) / 2 / np.log(2)
    return ((e - noise) ** 2).mean(1), bound.mean(1), {"error": e - noise, "dv": dv}
""",
    ),
)

ATTEMPTS = (
    *LINEAR,
    *LAYER_NORM,
    *LAYER_NORM_BACKWARD,
    *GELU,
    *SOFTMAX,
    *ATTENTION,
    *HEADS,
    *EMBEDDING,
    *POSITIONS,
    *DROPOUT,
    *BLOCK,
    *MODEL,
    *LOSS,
    *ADAM,
    *MASK_RATIO,
    *REVEAL_COUNTS,
    *DECODING_STEP,
    *BOUND,
    *DIFFUSION_LOSS,
)
