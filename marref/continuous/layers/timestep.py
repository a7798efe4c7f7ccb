"""What the diffusion network sees of the time: cosines and sines of the index t.

    features = [cos(t w_0), …, cos(t w_127), sin(t w_0), …, sin(t w_127)],   w_k = 10000^(-k/128)

The sinusoids of Vaswani et al. 2017, as in the code published with MAR (Li et al. 2024, arXiv
2406.11838): cosines first, and k/128 where others have k/127.  Nothing is learnt here.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from marref.continuous.diffusion import NUM_TIMESTEPS
from marref.trees import Array

FEATURES = 256


def features(timesteps: Array, dtype: npt.DTypeLike) -> Array:
    """Compute the features of times [rows]: [rows, 256], in float64 and then rounded."""
    of_rows: Array = _of_all_times(np.dtype(dtype))[timesteps]
    return of_rows


@functools.cache
def _of_all_times(dtype: np.dtype[Any]) -> Array:
    half = FEATURES // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    angles = np.arange(NUM_TIMESTEPS)[:, np.newaxis] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(dtype)
