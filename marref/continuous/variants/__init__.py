"""The variants that the paper compares with its model, and its authors never released.

What is generated when, and what a token's distribution is learnt with, are two choices:

    a backbone, z of every token       `marref.continuous.ContinuousMAR`: several tokens at a time,
                                       in random order, all that are known seen by all;
                                       `causal.CausalMAR`: one at a time, in raster or random order,
                                       each seen by those behind it
    a head, the token from its z       `heads.Diffusion`, `heads.CrossEntropy` on quantised tokens,
                                       `heads.SquaredError`

Li et al. 2024 (arXiv 2406.11838, sections 3 and 5.1).  Page: docs/continuous.md.
"""

from marref.continuous.variants.causal import CausalMAR
from marref.continuous.variants.heads import CrossEntropy, Diffusion, Head, SquaredError, codebook
from marref.continuous.variants.variant import Variant

__all__ = [
    "CausalMAR",
    "CrossEntropy",
    "Diffusion",
    "Head",
    "SquaredError",
    "Variant",
    "codebook",
]
