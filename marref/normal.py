"""The normal distribution: Φ(x), the probability of being below x, and its density φ(x) = Φ′(x).

Φ is SciPy's.  SciPy works it out number by number, in double precision; for float32 arrays there
is a second one that goes over the array in passes, which is several times as fast.
"""

import math

import numpy as np
from scipy.special import ndtr

from marref.trees import Array

# Of 1/M in `_distribution_float32`, found by tools/fit_normal.py: c₄, b₃; c₃, b₂; c₂, b₁.
_B4, _C1 = 1.25793102, 0.797628486
_LEVELS = ((22.5640795, 5.07344864), (-11.7879524, 2.48763778), (1.89085744, 1.23780324))


def distribution_and_density(x: Array) -> tuple[Array, Array]:
    """Compute Φ(x) and φ(x), for real or complex x.

    Parameters
    ----------
    x : array

    Returns
    -------
    phi, density : arrays
        Φ and φ = exp(-x²/2)/√(2π), of the shape and dtype of ``x``.  In float32 the error of Φ is
        below 1.2·2⁻²³ everywhere and, for x < 0, below 3e-7 (1 + x²/2) relative to Φ(x): the
        rounding of x² in the exponent.
    """
    with np.errstate(over="ignore"):
        density: Array = x * x
    density *= -0.5
    np.exp(density, out=density)
    density /= math.sqrt(2 * math.pi)
    # Not for the subclass that rounds further, which stands for another precision.
    fast = x.dtype == np.float32 and type(x) is np.ndarray
    return (_distribution_float32(x, density) if fast else ndtr(x)), density


def _distribution_float32(x: Array, density: Array) -> Array:
    """Compute Φ(x) from the density and Mills' ratio.

    With a = |x|,  Φ(-a) = φ(a) M(a)  and  Φ(a) = 1 - Φ(-a).  Mills' ratio M is taken from

        1/M(a) = √(2/π) + a (1 - c₁/(a + b₁ + c₂/(a + b₂ + c₃/(a + b₃ + c₄/(a + b₄)))))

    which is exact at a = 0 and within 1e-8 (1 + a²/2) relative up to a = 13; beyond, Φ(-a) is
    below the smallest normal float32.
    """
    a = np.abs(x)
    fraction = a + _B4
    for c, b in _LEVELS:
        np.divide(c, fraction, out=fraction)
        fraction += b
        fraction += a
    np.divide(-_C1, fraction, out=fraction)
    fraction += 1.0
    fraction *= a
    fraction += math.sqrt(2 / math.pi)
    upper = np.divide(density, fraction, out=fraction)
    phi: Array = np.greater(x, 0.0, out=a)  # 1 where x > 0, elsewhere 0.
    phi -= upper
    return np.abs(phi, out=phi)
