"""The loss of MAR: cross-entropy at the masked positions.

    L = -(1/|M|) Σ_{i in M} log softmax(z_i)[y_i]

z_i are the logits of position i, y_i its target, M the masked positions of the whole batch.
Positions outside M have no part in it.  With M empty, L = 0 and its gradient is 0.
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
        ``mask`` [...], and that of `rows_forward` for the masked positions, one after the other.
    """
    logits = checks.array("logits", logits)
    trees.check_dtype("logits", logits.dtype)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: shape {list(logits.shape)}, expected [..., vocab_size]")
    checks.finite("logits", logits)
    targets = checks.token_ids("targets", targets, logits.shape[-1], batched=False)
    checks.shape("targets", targets, logits.shape[:-1])
    mask = checks.binary_mask("mask", mask, logits.shape[:-1])

    loss, cache = rows_forward(logits[mask], targets[mask], max(int(mask.sum()), 1))
    return loss, {"mask": mask, **cache}


def backward(cache: Tree) -> Array:
    """Compute the gradient of the loss with respect to the logits.

    That of the masked positions is the word of `rows_backward`; no other reaches the loss.

    Parameters
    ----------
    cache : dict
        From `forward`.

    Returns
    -------
    array [..., vocab_size]
        dlogits, of the dtype of the logits.
    """
    mask, drows = cache["mask"], rows_backward(cache)
    dlogits = np.zeros((*mask.shape, drows.shape[-1]), drows.dtype)
    dlogits[mask] = drows
    return dlogits


def rows_forward(logits: Array, targets: Array, num_masked: int) -> tuple[np.inexact, Tree]:
    """Compute what some masked positions add to the loss: -Σ log softmax(z_i)[y_i] / |M|.

    Parameters
    ----------
    logits : array [rows, vocab_size]
    targets : integer array [rows]
    num_masked : int
        |M|, at least 1.

    Returns
    -------
    loss : scalar
    cache : dict
        ``targets`` [rows], ``log_probabilities`` [rows, vocab_size] and ``num_masked`` [].
    """
    log_probabilities = log_softmax(logits)
    losses = -log_probabilities[np.arange(len(targets)), targets]
    return losses.sum() / num_masked, {
        "targets": targets,
        "log_probabilities": log_probabilities,
        "num_masked": np.array(num_masked),
    }


def rows_backward(cache: Tree) -> Array:
    """Compute the gradient of `rows_forward` with respect to the logits.

    For one masked position, with p = softmax(z): ∂/∂z_k (log Σ_j exp z_j - z_y) = p_k - [k = y].
    The mean divides by |M|:

        dz_i = (softmax(z_i) - onehot(y_i)) / |M|

    p_y - 1 is taken as expm1(log p_y), which keeps its digits where p_y is almost 1.

    Parameters
    ----------
    cache : dict
        From `rows_forward`.

    Returns
    -------
    array [rows, vocab_size]
        dlogits, of the dtype of the logits.
    """
    targets, log_probabilities = cache["targets"], cache["log_probabilities"]
    at_target = np.arange(len(targets)), targets
    dlogits: Array = np.exp(log_probabilities)
    dlogits[at_target] = np.expm1(log_probabilities[at_target])
    dlogits /= int(cache["num_masked"])
    return dlogits


def log_softmax(logits: Array) -> Array:
    """Compute the logarithm of softmax for each row.

    With z the logits less their largest, z_max = 0 and

        log p_k = z_k - log Σ_j exp z_j = z_k - log1p(Σ′_j exp z_j),     Σ′ without the largest

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
    shifted: Array = logits - logits[largest][:, np.newaxis]
    exponentials = np.exp(shifted)
    exponentials[largest] = 0.0
    shifted -= np.log1p(exponentials.sum(axis=1, keepdims=True))
    return shifted
