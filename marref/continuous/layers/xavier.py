"""Linear layers drawn as Glorot and Bengio 2010 (JMLR W&CP 9, eq. 16) propose.

    W ~ uniform(-a, a),   a = sqrt(6 / (inputs + outputs)),   b = 0

The forward pass and its derivative are those of `marref.layers.linear`.
"""

import math

import numpy as np
import numpy.typing as npt

from marref.trees import Tree


def init(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    dtype: npt.DTypeLike = np.float64,
    *,
    fused: int = 1,
) -> Tree:
    """Draw the kernel, in float64 whatever the dtype.

    Parameters
    ----------
    rng : numpy.random.Generator
    in_features, out_features : int
    dtype : dtype
    fused : int
        How many such layers are one in the published code, whose bound counts all their outputs:
        3 for query, key and value.

    Returns
    -------
    dict
        ``kernel`` [in_features, out_features], ``bias`` [out_features].
    """
    bound = math.sqrt(6.0 / (in_features + fused * out_features))
    kernel = rng.uniform(-bound, bound, (in_features, out_features))
    return {"kernel": kernel.astype(dtype), "bias": np.zeros(out_features, dtype)}
