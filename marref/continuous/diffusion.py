"""Diffusion of one token: noise schedules, the loss of the network's output, and a step back.

With β_t the noise of step t = 0, …, T - 1 and ᾱ_t = Π_{i<=t} (1 - β_i), a clean x becomes

    x_t = √ᾱ_t x + √(1 - ᾱ_t) ε,      ε ~ N(0, 1)

(Ho et al. 2020, arXiv 2006.11239).  The network returns [e, v]: e estimates ε, and v says where
between two bounds the variance of the step back lies (Nichol and Dhariwal 2021, arXiv 2102.09672,
eq. 15), which nothing forces v to stay in:

    log variance l = f log β_t + (1 - f) log ṽ_t,   f = (v + 1)/2
    ṽ_t = β_t (1 - ᾱ_{t-1})/(1 - ᾱ_t)

ṽ is the variance of x_{t-1} given x_t and x; ṽ_0 = 0, for which ṽ_1 is taken.  Page:
docs/continuous.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from marref import checks
from marref.trees import Array, Tree

NUM_TIMESTEPS = 1000
SCHEDULES = ("cosine", "linear")

_ROOT, _CUBIC = math.sqrt(2.0 / math.pi), 0.044715
_BIN = 1.0 / 255.0
_SMALLEST = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """A noise schedule of K steps, and what follows from it; arrays [K], float64."""

    beta: Array
    timestep: Array
    """The index among the T original steps, which is what the network sees."""

    @functools.cached_property
    def alpha_bar(self) -> Array:
        """ᾱ."""
        alpha_bar: Array = np.cumprod(1.0 - self.beta)
        return alpha_bar

    @functools.cached_property
    def alpha_bar_before(self) -> Array:
        """ᾱ of the step before: 1, ᾱ_0, …"""
        return np.append(1.0, self.alpha_bar[:-1])

    @functools.cached_property
    def low(self) -> Array:
        """log ṽ, the first as the second; of one step alone log β."""
        variance = self.beta * (1.0 - self.alpha_bar_before) / (1.0 - self.alpha_bar)
        variance[0] = variance[1] if len(variance) > 1 else self.beta[0]
        low: Array = np.log(variance)
        return low

    @functools.cached_property
    def high(self) -> Array:
        """log β."""
        high: Array = np.log(self.beta)
        return high

    @functools.cached_property
    def to_clean(self) -> Array:
        """√(1/ᾱ - 1), by which an error of e is an error of the estimated x."""
        factor: Array = np.sqrt(1.0 / self.alpha_bar - 1.0)
        return factor

    @functools.cached_property
    def mean_of_clean(self) -> Array:
        """c₁ in the mean c₁ x + c₂ x_t of x_{t-1} given both; 1 at t = 0."""
        c1: Array = self.beta * np.sqrt(self.alpha_bar_before) / (1.0 - self.alpha_bar)
        return c1

    @functools.cached_property
    def mean_of_noisy(self) -> Array:
        """c₂; 0 at t = 0."""
        root = np.sqrt(1.0 - self.beta)
        c2: Array = (1.0 - self.alpha_bar_before) * root / (1.0 - self.alpha_bar)
        return c2


def process(schedule: str, num_steps: int = NUM_TIMESTEPS) -> Process:
    """Make a schedule, of all T = 1000 steps or of fewer.

    "cosine" has ᾱ_t ∝ f(t/T), f(u) = cos²((u + 0.008)/1.008 π/2), β at most 0.999 (Nichol and
    Dhariwal 2021); "linear" β from 1e-4 to 0.02 (Ho et al. 2020).  K < T steps are those of the
    published code (`respace`), with β of step i 1 - ᾱ[m_i]/ᾱ[m_{i-1}].

    Parameters
    ----------
    schedule : {"cosine", "linear"}
    num_steps : int
        K, in [1, 1000].

    Returns
    -------
    Process
    """
    checks.choice("noise_schedule", schedule, SCHEDULES)
    checks.integer("num_diffusion_steps", num_steps, 1, NUM_TIMESTEPS)
    if schedule == "linear":
        beta = np.linspace(1e-4, 0.02, NUM_TIMESTEPS)
    else:
        u = np.arange(NUM_TIMESTEPS + 1) / NUM_TIMESTEPS
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1.0 - f[1:] / f[:-1], 0.999)
    if num_steps == NUM_TIMESTEPS:
        return Process(beta, np.arange(NUM_TIMESTEPS))
    kept = respace(num_steps)
    alpha_bar = np.cumprod(1.0 - beta)[kept]
    return Process(1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]), kept)


def respace(num_steps: int) -> Array:
    """Choose K of the T times: 0 and T - 1 and what is nearest to even spacing between.

    The stride (T - 1)/(K - 1) is added up in floating point and rounded, halves to even, as in the
    published code; K = 1 keeps time 0.

    Examples
    --------
    >>> respace(5)
    array([  0, 250, 500, 749, 999])
    """
    stride = (NUM_TIMESTEPS - 1) / (num_steps - 1) if num_steps > 1 else 1.0
    place, kept = 0.0, []
    for _ in range(num_steps):
        kept.append(round(place))
        place += stride
    return np.array(kept)


def add_noise(steps: Process, clean: Array, index: Array, noise: Array) -> Array:
    """Compute x_t = √ᾱ_t x + √(1 - ᾱ_t) ε for rows [rows, token_dim], t = ``index`` [rows]."""
    of_clean, of_noise = _rows_of(
        index, clean, np.sqrt(steps.alpha_bar), np.sqrt(1.0 - steps.alpha_bar)
    )
    noisy: Array = of_clean * clean + of_noise * noise
    return noisy


def _rows_of(index: Array, like: Array, *tables: Array) -> list[Array]:
    """Look each row's time up in tables: [rows, 1], of the precision of ``like``."""
    return [table[index][:, np.newaxis].astype(like.real.dtype) for table in tables]


def loss_forward(
    steps: Process, output: Array, clean: Array, index: Array, noise: Array
) -> tuple[Array, Array, Tree]:
    """Compute the two parts of the loss, row by row.

    The squared error (1/C) Σ (ε - e)² trains e.  The variational bound, in bits, trains v; e enters
    it as a constant.  With d = μ* - μ = c₁ √(1/ᾱ - 1) (e - ε) the distance of the two means, it is

        t >= 1:   (1/C) Σ ½ (-1 + l - log ṽ + exp(log ṽ - l) + d² exp(-l)) / log 2

    the Kullback-Leibler divergence between two normal distributions, and at t = 0 -log₂ of the
    probability that the last step ends in the bin of x, as if x were 8-bit numbers in [-1, 1]:

        P = Φ(a₊) - Φ(a₋),   a± = exp(-l/2) (x - μ ± 1/255),   at least 1e-12

    with Φ(a₊) alone where x < -0.999 and 1 - Φ(a₋) where x > 0.999, and the approximation
    Φ(a) = (1 + tanh(√(2/π) (a + 0.044715 a³)))/2.  All as in the published code.

    Parameters
    ----------
    steps : Process
    output : array [rows, 2·token_dim]
        [e, v].
    clean, noise : arrays [rows, token_dim]
        x and ε.
    index : integer array [rows]
        t.

    Returns
    -------
    squared_error, bound : arrays [rows]
    cache : dict
    """
    e, v = np.split(output, 2, axis=1)
    low, high, scale = _rows_of(
        index, output, steps.low, steps.high, steps.mean_of_clean * steps.to_clean
    )
    log_variance = log_variance_of(v, low, high)
    error = e - noise
    # The real part is constant where a complex step is taken in e: that is what detached means.
    distance = scale * error.real
    narrow = np.exp(low - log_variance)
    wide = distance**2 * np.exp(-log_variance)
    bound = 0.5 * (log_variance - low - 1.0 + narrow + wide)
    dlog_variance = 0.5 * (1.0 - narrow - wide)
    last = index == 0
    bound[last], dlog_variance[last] = _last_step(clean[last], distance[last], log_variance[last])
    cache = {"error": error, "dv": dlog_variance * 0.5 * (high - low) / math.log(2.0)}
    return (error**2).mean(axis=1), bound.mean(axis=1) / math.log(2.0), cache


def log_variance_of(v: Array, low: Any, high: Any) -> Array:
    """Compute l between log ṽ and log β; see the head of this module."""
    log_variance: Array = low + 0.5 * (v + 1.0) * (high - low)
    return log_variance


def loss_backward(cache: Tree, drows: Array) -> Array:
    """Push the gradient of each row's loss, the sum of both parts, back to [e, v].

        ∂/∂e = 2 (e - ε)/C                                    of the squared error alone
        ∂/∂l = ½ (1 - exp(log ṽ - l) - d² exp(-l))            t >= 1, times 1/(C log 2)
        ∂l/∂v = ½ (log β - log ṽ)

    `_last_step` has t = 0.

    Parameters
    ----------
    cache : dict
        From `loss_forward`.
    drows : array [rows]

    Returns
    -------
    array [rows, 2·token_dim]
    """
    gradient = np.concatenate([2.0 * cache["error"], cache["dv"]], axis=1)
    doutput: Array = gradient * (drows / cache["error"].shape[1])[:, np.newaxis]
    return doutput


def _last_step(clean: Array, distance: Array, log_variance: Array) -> tuple[Array, Array]:
    """Compute -log P and its derivative by l, entry by entry.

    a± = exp(-l/2) (…), so ∂a±/∂l = -a±/2, and ∂(-log P)/∂l = (Φ′(a₊) a₊ - Φ′(a₋) a₋)/(2 P),
    without the part that the branch leaves out; 0 where P is at its floor.
    """
    shrink = np.exp(-0.5 * log_variance)
    above, below = (shrink * (distance + side) for side in (_BIN, -_BIN))
    (phi_above, slope_above), (phi_below, slope_below) = map(normal, (above, below))
    lowest, highest = clean < -0.999, clean > 0.999
    p = np.where(highest, 1.0, phi_above) - np.where(lowest, 0.0, phi_below)
    dp = np.where(highest, 0.0, slope_above * above) - np.where(lowest, 0.0, slope_below * below)
    floored = p.real < _SMALLEST
    p = np.where(floored, _SMALLEST, p)
    return -np.log(p), np.where(floored, 0.0, 0.5 * dp / p)


def normal(a: Array) -> tuple[Array, Array]:
    """Compute Φ, nearly, and its derivative ½ (1 - tanh²) √(2/π) (1 + 3·0.044715 a²)."""
    tanh = np.tanh(_ROOT * (a + _CUBIC * a**3))
    return 0.5 * (1.0 + tanh), 0.5 * (1.0 - tanh**2) * _ROOT * (1.0 + 3.0 * _CUBIC * a**2)


def step_back(
    steps: Process,
    output: Array,
    noisy: Array,
    index: int,
    noise: Array,
    temperature: float,
    clip: float | None,
) -> Array:
    """Draw x_{t-1} given x_t.

        x̂ = √(1/ᾱ) x_t - √(1/ᾱ - 1) e,   in [-clip, clip]
        x_{t-1} = c₁ x̂ + c₂ x_t + temperature exp(l/2) noise          no noise at t = 0

    Without clipping an error of e is multiplied by c₁ √(1/ᾱ - 1) in each step, which in the first
    of 100 cosine steps is 316.

    Parameters
    ----------
    steps : Process
    output : array [rows, 2·token_dim]
    noisy : array [rows, token_dim]
    index : int
        t.
    noise : array [rows, token_dim]
        From N(0, 1).
    temperature : float
    clip : float or None

    Returns
    -------
    array [rows, token_dim]
    """
    e, v = np.split(output, 2, axis=1)
    clean = math.sqrt(1.0 / steps.alpha_bar[index]) * noisy - float(steps.to_clean[index]) * e
    if clip is not None:
        clean = np.clip(clean, -clip, clip)
    mean: Array = float(steps.mean_of_clean[index]) * clean
    mean = mean + float(steps.mean_of_noisy[index]) * noisy
    if index == 0:
        return mean
    low, high = float(steps.low[index]), float(steps.high[index])
    deviation = np.exp(0.5 * log_variance_of(v, low, high))
    return mean + temperature * deviation * noise


def chain(
    steps: Process,
    output_of: Callable[[Array, int], Array],
    noisy: Array,
    noise_of: Callable[[int], Array],
    temperature: float,
    clip: float | None,
) -> Iterator[Array]:
    """Take all steps back, the last time first; yields the tokens after each.

    Parameters
    ----------
    steps : Process
    output_of : callable
        ``(noisy, index)`` to what the network returns.
    noisy : array [rows, token_dim]
        What the chain starts from.
    noise_of : callable
        ``index`` to the noise of a step; see `step_back`.
    temperature, clip
        See `step_back`.
    """
    for index in reversed(range(len(steps.beta))):
        output = output_of(noisy, index)
        noisy = step_back(steps, output, noisy, index, noise_of(index), temperature, clip)
        yield noisy
