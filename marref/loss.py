"""The loss of MAR: cross-entropy at the masked positions.

    L = -(1/|M|) Σ_{i in M} log softmax(z_i)[y_i]

z_i are the logits of position i, y_i its target, M the masked positions of the whole batch.
Positions outside M have no part in it.  With M empty, L = 0 and its gradient is 0.  Page:
docs/loss.md.
"""

import numpy as np
import numpy.typing as npt

from marref import checks, trees
from marref.trees import Array, Tree


def mar_loss(logits: npt.ArrayLike, targets: npt.ArrayLike, mask: npt.ArrayLike) -> np.inexact:
    """Mean cross-entropy over the masked positions, in nats.

    Parameters
    ----------
    logits : array [..., vocab_size]
        Finite; float32, float64 or complex128.
    targets : integer array [...]
        The true ids, in [0, vocab_size), at unmasked positions too.
    mask : array [...]
        True (or 1) where a position was masked.

    Returns
    -------
    scalar
        Of the dtype of the logits; 0.0 if nothing is masked.

    Raises
    ------
    TypeError, ValueError
        Shapes differ, ids are out of range, the mask is not binary, or logits are not finite.
    """
    return forward(logits, targets, mask)[0]


def forward(
    logits: npt.ArrayLike, targets: npt.ArrayLike, mask: npt.ArrayLike
) -> tuple[np.inexact, Tree]:
    """Compute the loss as `mar_loss` does, and keep what `backward` needs.

    Returns
    -------
    loss : scalar
    cache : dict
        ``mask`` [...], and of the masked positions, one after the other, ``targets`` [masked] and
        ``log_probabilities`` log softmax(z) [masked, vocab_size].
    """
    logits = checks.array("logits", logits)
    trees.check_dtype("logits", logits.dtype)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: shape {list(logits.shape)}, expected [..., vocab_size]")
    checks.finite("logits", logits)
    targets = checks.token_ids("targets", targets, logits.shape[-1], batched=False)
    checks.shape("targets", targets, logits.shape[:-1])
    mask = checks.binary_mask("mask", mask, logits.shape[:-1])

    log_probabilities, ids = log_softmax(logits[mask]), targets[mask]
    losses = -log_probabilities[np.arange(len(ids)), ids]
    cache = {"mask": mask, "targets": ids, "log_probabilities": log_probabilities}
    return losses.sum() / max(len(ids), 1), cache


def backward(cache: Tree) -> Array:
    """Compute the gradient of the loss with respect to the logits.

    For one masked position, with p = softmax(z): ∂/∂z_k (log Σ_j exp z_j - z_y) = p_k - [k = y].
    The mean divides by |M|:

        dz_i = (softmax(z_i) - onehot(y_i)) / |M|        0 where i is not masked

    At k = y, p_y - 1 = exp(log p_y) - 1 is taken as expm1(log p_y), which keeps its digits where
    p_y is almost 1.

    Parameters
    ----------
    cache : dict
        From `forward`.

    Returns
    -------
    array [..., vocab_size]
        dlogits, of the dtype of the logits.
    """
    mask, ids, log_probabilities = (
        cache[name] for name in ("mask", "targets", "log_probabilities")
    )
    at_target = np.arange(len(ids)), ids
    differences = np.exp(log_probabilities)
    differences[at_target] = np.expm1(log_probabilities[at_target])
    dlogits = np.zeros((*mask.shape, log_probabilities.shape[-1]), log_probabilities.dtype)
    dlogits[mask] = differences / max(len(ids), 1)
    return dlogits


def uniform(cache: Tree) -> tuple[np.inexact, Array]:
    """Compute the cross-entropy with the uniform distribution, and its gradient.

    Label smoothing ε (Szegedy et al. 2016, arXiv 1512.00567, section 7) spreads ε of a target's
    probability evenly over all V ids, its own among them: L_ε = (1 - ε) L + ε U, with

        U = -(1/|M|) Σ_{i in M} (1/V) Σ_k log softmax(z_i)[k]

        dz_i = (softmax(z_i) - 1/V) / |M|        0 where i is not masked

    Parameters
    ----------
    cache : dict
        From `forward`.

    Returns
    -------
    value : scalar
        U, at least log V where something is masked.
    dlogits : array [..., vocab_size]
    """
    mask, log_probabilities = cache["mask"], cache["log_probabilities"]
    count, vocab_size = max(len(log_probabilities), 1), log_probabilities.shape[-1]
    dlogits = np.zeros((*mask.shape, vocab_size), log_probabilities.dtype)
    dlogits[mask] = (np.exp(log_probabilities) - 1.0 / vocab_size) / count
    return -log_probabilities.mean(axis=1).sum() / count, dlogits


def log_softmax(logits: Array) -> Array:
    """Compute the logarithm of softmax for each row.

    With m the largest logit of a row and Σ′ the sum without it,

        log p_k = (z_k - m) - log Σ_j exp(z_j - m) = (z_k - m) - log1p(Σ′_j exp(z_j - m))

    exp cannot overflow, no logarithm is taken of a probability that underflowed to 0, and log1p
    keeps the digits of a log p that is almost 0: the loss of a sure and right prediction.

    Parameters
    ----------
    logits : array [rows, vocab_size]
        -inf is allowed beside finite numbers, and excludes an id.

    Returns
    -------
    array [rows, vocab_size]
    """
    largest = np.arange(len(logits)), logits.real.argmax(axis=1)
    shifted = logits - logits[largest][:, np.newaxis]
    others = np.exp(shifted)
    others[largest] = 0.0
    log_probabilities: Array = shifted - np.log1p(others.sum(axis=1, keepdims=True))
    return log_probabilities
