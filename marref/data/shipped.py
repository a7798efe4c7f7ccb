"""Tokens from the handwritten digits that ship with the package.

An image of 8x8 pixels is a sequence of 64 tokens, row by row.  Grey level g (0 paper, 16 ink) is
token g + 1, since id 0 is [MASK]: ``vocab_size`` is 18.

The digits are E. Alpaydin and C. Kaynak's (1998, UCI Machine Learning Repository, CC BY 4.0); see
``marref/datasets/README.md``.
"""

import importlib.resources

import numpy as np
import numpy.typing as npt

from marref.data.codecs import Pixels
from marref.data.dataset import Dataset
from marref.trees import Array

DIGITS_VOCAB_SIZE = 18
DIGITS_SHAPE = (8, 8)


def digits() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Load the digits as tokens, split once and for all.

    Returns
    -------
    train : int64 array [1500, 64]
    held_out : int64 array [297, 64]
    """
    arrays = _arrays()
    return _split(arrays["images"].reshape(-1, 64).astype(np.int64) + 1, arrays["held_out"])


def digit_labels() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Load which digit each image of `digits` shows, in the same order.

    Returns
    -------
    train : int64 array [1500]
        From 0 to 9.
    held_out : int64 array [297]
    """
    arrays = _arrays()
    return _split(arrays["labels"].astype(np.int64), arrays["held_out"])


def dataset() -> Dataset:
    """Load all 1,797 digits, in the order of the file, with their labels."""
    arrays = _arrays()
    height, width = DIGITS_SHAPE
    codec = Pixels(height, width, channels=1, levels=DIGITS_VOCAB_SIZE - 1)
    images = arrays["images"].reshape(-1, codec.length)
    return Dataset(images, codec, codec.length, arrays["labels"].astype(np.int64))


def _arrays() -> dict[str, Array]:
    resource = importlib.resources.files("marref") / "datasets" / "digits.npz"
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _split(
    rows: npt.NDArray[np.int64], held_out: Array
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    is_held_out = np.zeros(len(rows), bool)
    is_held_out[held_out] = True
    return rows[~is_held_out], rows[is_held_out]
