"""Find the coefficients of the GELU in marref/fast/gelu.py.

    python tools/fit_gelu.py

With Φ the normal distribution function, R(x²) = log(Φ(x)/Φ(-x))/x is smooth and even, and
Φ(x) = σ(x R(x²)).  An error δ of R moves y = x Φ(x) by x² Φ(x) Φ(-x) δ.  The polynomial p of the
given degree that makes the largest of these smallest, over 0 <= x² <= 30, is a linear programme:

    minimise e,    |x² Φ(x) Φ(-x) (p(x²) - R(x²))| <= e  at many x
"""

import numpy as np
from numpy.polynomial import Polynomial, chebyshev
from scipy.optimize import linprog
from scipy.special import log_ndtr, ndtr

DEGREE, END, POINTS = 6, 30.0, 4000


def fit() -> tuple[Polynomial, float]:
    """Return p and e."""
    x = np.linspace(1e-3, np.sqrt(END), POINTS)
    wanted = (log_ndtr(x) - log_ndtr(-x)) / x
    # In units of the last place at 1, so that e is of order one.
    weight = 2.0**23 * x * x * ndtr(x) * ndtr(-x)
    # In Chebyshev's polynomials of u, from -1 to 1, the programme is well conditioned.
    u = chebyshev.chebvander(2 * x * x / END - 1, DEGREE) * weight[:, np.newaxis]
    slack = np.full((POINTS, 1), -1.0)
    found = linprog(
        np.eye(DEGREE + 2)[-1],
        A_ub=np.block([[u, slack], [-u, slack]]),
        b_ub=np.concatenate([weight * wanted, -weight * wanted]),
        bounds=[(None, None)] * (DEGREE + 1) + [(0, None)],
    )
    in_u = Polynomial(chebyshev.cheb2poly(found.x[:-1]))
    return in_u(Polynomial([-1.0, 2.0 / END])), float(found.x[-1])


if __name__ == "__main__":
    polynomial, error = fit()
    for power, coefficient in enumerate(polynomial.coef):
        print(f"x^{2 * power}: {coefficient:.9g}")
    print(f"largest error of y, in units of the last place of 1: {error:.2g}")
