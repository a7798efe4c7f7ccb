"""Tokens from the handwritten digits that ship with the package.

An image of 8x8 pixels is a sequence of 64 tokens, row by row.  Grey level g (0 paper, 16 ink) is
token g + 1, since id 0 is [MASK]: ``vocab_size`` is 18.

The digits are E. Alpaydin and C. Kaynak's (1998, UCI Machine Learning Repository, CC BY 4.0); see
``marref/datasets/README.md``.
"""

import importlib.resources

import numpy as np
import numpy.typing as npt

DIGITS_VOCAB_SIZE = 18
DIGITS_SHAPE = (8, 8)


def digits() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Load the digits as tokens, split once and for all.

    Returns
    -------
    train : int64 array [1500, 64]
    held_out : int64 array [297, 64]
    """
    resource = importlib.resources.files("marref") / "datasets" / "digits.npz"
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, held_out = arrays["images"], arrays["held_out"]
    tokens = images.reshape(len(images), -1).astype(np.int64) + 1
    is_held_out = np.zeros(len(tokens), bool)
    is_held_out[held_out] = True
    return tokens[~is_held_out], tokens[is_held_out]
