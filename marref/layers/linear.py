"""Linear layer, an affine map of the features: y = x W + b.  Page: docs/linear.md."""

import numpy as np
import numpy.typing as npt

from marref.trees import Array, Tree


def init(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    std: float,
    dtype: npt.DTypeLike = np.float64,
) -> Tree:
    """Draw the kernel W from N(0, std²) and set the bias b to 0.

    Numbers are drawn in float64 whatever the dtype, so one seed means one model.

    Returns
    -------
    dict
        ``kernel`` [in_features, out_features], ``bias`` [out_features].
    """
    return {
        "kernel": rng.normal(0.0, std, (in_features, out_features)).astype(dtype),
        "bias": np.zeros(out_features, dtype),
    }


def forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """Compute y = x W + b.

    Parameters
    ----------
    params : dict
        ``kernel`` W, ``bias`` b.
    x : array [..., in_features]

    Returns
    -------
    y : array [..., out_features]
    cache : array
        ``x`` itself.
    """
    return x @ params["kernel"] + params["bias"], x


def backward(params: Tree, dy: Array, cache: Array) -> tuple[Array, Tree]:
    """Push ``dy`` back through y = x W + b.

    For one row, y_j = Σ_i x_i W_ij + b_j, so

        ∂y_j/∂x_i  = W_ij          dx_i  = Σ_j dy_j W_ij             dx = dy Wᵀ
        ∂y_j/∂W_ij = x_i           dW_ij = Σ_rows x_i dy_j           dW = xᵀ dy
        ∂y_j/∂b_j  = 1             db_j  = Σ_rows dy_j

    and parameters sum over the rows because every row uses them.

    Parameters
    ----------
    params : dict
    dy : array [..., out_features]
    cache : array [..., in_features]
        From `forward`.

    Returns
    -------
    dx : array [..., in_features]
    grads : dict
        Like ``params``.
    """
    x = cache.reshape(-1, cache.shape[-1])
    drows = dy.reshape(-1, dy.shape[-1])
    return dy @ params["kernel"].T, {"kernel": x.T @ drows, "bias": drows.sum(axis=0)}
