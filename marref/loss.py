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

    -log softmax(z)[y] = log Σ_j exp(z_j - m) - (z_y - m) with m = max z: exp cannot overflow, and
    no logarithm of a probability that underflowed to 0 is taken.

    Returns
    -------
    loss : scalar
    cache : dict
        ``mask`` [...]; at the masked positions, one after the other, ``targets`` [masked] and
        ``probabilities`` [masked, vocab_size].
    """
    logits = np.asarray(logits)
    trees.check_dtype("logits", logits.dtype)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: shape {list(logits.shape)}, expected [..., vocab_size]")
    checks.finite("logits", logits)
    targets = checks.token_ids("targets", targets, logits.shape[-1])
    checks.shape("targets", targets, logits.shape[:-1])
    mask = checks.binary_mask("mask", mask, logits.shape[:-1])

    rows, targets = logits[mask], targets[mask]
    shifted = rows - rows.real.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(axis=-1)
    losses = np.log(total) - shifted[np.arange(len(targets)), targets]
    loss = losses.sum() / max(len(targets), 1)
    probabilities = exponentials / total[:, np.newaxis]
    return loss, {"mask": mask, "targets": targets, "probabilities": probabilities}


def backward(cache: Tree) -> Array:
    """Compute the gradient of the loss with respect to the logits.

    For one masked position, with p = softmax(z): ∂/∂z_k (log Σ_j exp z_j - z_y) = p_k - [k = y].
    The mean divides by |M|:

        dz_i = (softmax(z_i) - onehot(y_i)) / |M|   for i in M,      0 elsewhere

    Parameters
    ----------
    cache : dict
        From `forward`.

    Returns
    -------
    array [..., vocab_size]
        dlogits, of the dtype of the logits.
    """
    mask, targets, probabilities = cache["mask"], cache["targets"], cache["probabilities"]
    drows = probabilities.copy()
    drows[np.arange(len(targets)), targets] -= 1.0
    drows /= max(len(targets), 1)
    dlogits = np.zeros((*mask.shape, probabilities.shape[-1]), probabilities.dtype)
    dlogits[mask] = drows
    return dlogits
