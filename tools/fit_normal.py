"""Find the coefficients of the normal distribution function in marref/normal.py.

    python tools/fit_normal.py

With the Mills ratio M(a) = Φ(-a)/φ(a), the function

    R(a) = 1 - (1/M(a) - √(2/π))/a

is smooth, R(0) = 1 - 2/π, and R(a) ~ √(2/π)/a for large a.  The quotient N/D of a polynomial of
degree 3 and one of degree 4 that equals R at 8 points is written as the continued fraction

    N/D = c₁/(a + b₁ + c₂/(a + b₂ + c₃/(a + b₃ + c₄/(a + b₄))))

by Euclid's division.  The points are Chebyshev's in (a - 2)/(a + 2), for a from 0 to 13, beyond
which Φ(-a) is below the smallest normal float32.
"""

import mpmath as mp

LEVELS, MIDDLE, END = 4, 2, 13


def mills(a: mp.mpf) -> mp.mpf:
    """Φ(-a)/φ(a)."""
    return mp.ncdf(-a) / mp.npdf(a)


def points(count: int) -> list[mp.mpf]:
    """Chebyshev's points in (a - MIDDLE)/(a + MIDDLE), between 0 and END."""
    half = mp.mpf(END) / (END + MIDDLE)  # Half of the way from -1, where a = 0, to a = END.
    u = [-1 + half * (1 - mp.cos(mp.pi * (i + mp.mpf(0.5)) / count)) for i in range(count)]
    return [MIDDLE * (1 + v) / (1 - v) for v in u]


def fit() -> tuple[list[mp.mpf], list[mp.mpf]]:
    """Return c₁ … c₄ and b₁ … b₄."""
    # N(a) - R(a) D(a) = 0 at the points.  Coefficients from a⁰ up; D begins with 1 a⁴.
    a = points(2 * LEVELS)
    ratio = [1 - (1 / mills(v) - mp.sqrt(2 / mp.pi)) / v for v in a]
    powers = [[v**j for j in range(LEVELS)] for v in a]
    system = mp.matrix([row + [-r * p for p in row] for row, r in zip(powers, ratio, strict=True)])
    found = mp.lu_solve(system, mp.matrix([r * v**LEVELS for v, r in zip(a, ratio, strict=True)]))
    numerator, denominator = list(found[:LEVELS]), [*found[LEVELS:], mp.mpf(1)]

    # D/(N/c) = a + b + rest/(N/c), where c makes N/c begin with 1; then N/c over rest, and so on.
    c, b = [], []
    while numerator:
        c.append(numerator[-1])
        divisor = [n / c[-1] for n in numerator]
        b.append(denominator[-2] - (divisor[-2] if len(divisor) > 1 else 0))
        shifted = [mp.mpf(0), *divisor]
        rest = [denominator[j] - b[-1] * divisor[j] - shifted[j] for j in range(len(divisor) - 1)]
        denominator, numerator = divisor, rest
    return c, b


def relative_error(a: mp.mpf, c: list[mp.mpf], b: list[mp.mpf]) -> mp.mpf:
    """Error of M(a) without any rounding, relative to M(a)."""
    fraction = mp.mpf(0)
    for cj, bj in zip(reversed(c), reversed(b), strict=True):
        fraction = cj / (a + bj + fraction)
    return abs(1 / (mp.sqrt(2 / mp.pi) + a * (1 - fraction)) / mills(a) - 1)


if __name__ == "__main__":
    mp.mp.dps = 50
    c, b = fit()
    for level in reversed(range(LEVELS)):
        print(f"c{level + 1} = {mp.nstr(c[level], 9)}, b{level + 1} = {mp.nstr(b[level], 9)}")
    grid = [mp.mpf(END) * i / 2000 for i in range(2001)]
    errors = [relative_error(a, c, b) for a in grid]
    weighted = [e / (1 + a * a / 2) for a, e in zip(grid, errors, strict=True)]
    print(f"relative error of M: {mp.nstr(max(errors), 2)}")
    print(f"divided by 1 + a²/2: {mp.nstr(max(weighted), 2)}")
