"""Random numbers by name: what is drawn depends on what it is for, not on what was drawn before.

A generator belongs to a seed, a purpose and numbers, such as the step of a run.  Its stream is
that of NumPy's ``SeedSequence(seed, spawn_key=(place of the purpose, *numbers))``, whose streams
for different keys are independent for all practical purposes.  So a run that was stopped and goes
on draws what it would have drawn, and a sample does not depend on how many were drawn before it.
"""

import numpy as np

from marref import checks

PURPOSES = (
    "parameters",
    "split",
    "batch",
    "mask",
    "dropout",
    "validation",
    "sample",
    "label",
    "diffusion",
)
"""What is drawn; a new purpose goes to the end, so that the others keep their streams."""


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Make the generator of a name.

    Parameters
    ----------
    seed : int
        In [0, 2¹²⁸).
    purpose : str
        One of `PURPOSES`.
    *numbers : int
        Each in [0, 2³²): which of the draws of this purpose, for instance the step.

    Returns
    -------
    numpy.random.Generator
        The same stream for the same name, and another one for every other name.

    Raises
    ------
    TypeError, ValueError
        The purpose is unknown, or a number is no integer in its range.

    Notes
    -----
    SeedSequence cuts the seed and the key into words of 32 bits and strings them together.  Within
    these ranges the seed fills the first four words, padded by zeros, and every number exactly one
    more: no two names are the same words.

    Examples
    --------
    >>> int(generator(0, "batch", 7).integers(1000))
    311
    >>> int(generator(0, "batch", 7).integers(1000))
    311
    >>> int(generator(0, "batch", 8).integers(1000))
    627
    """
    seed = checks.integer("seed", seed, 0, 2**128 - 1)
    place = PURPOSES.index(checks.choice("purpose", purpose, PURPOSES))
    key = [checks.integer("numbers", number, 0, 2**32 - 1) for number in numbers]
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(place, *key)))
