"""What is learnt of a token from its condition z: three heads with the same three functions.

    init(rng, condition_dim, dtype)         parameters
    draw(rng, num_rows)                     what is random in a step
    loss_and_grads(params, z, x, draws)     the mean over rows, its gradient by z, and by params
    sample(params, z, rng)                  a token for each row

`Diffusion` is the paper's.  `CrossEntropy` is that of MAR on quantised tokens, and `SquaredError`
learns the mean of x given z,

    L = (1/nC) Σ (y - x)²,   y = linear(z),   dy = 2 (y - x)/(nC)

and has no variance to sample with: where a token may be this or that, it generates neither.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2, vq

from marref import checks
from marref.continuous import diffusion
from marref.continuous.layers import network, xavier
from marref.layers import linear
from marref.layers.attention import softmax
from marref.loss import log_softmax
from marref.trees import Array, Tree


class Head(Protocol):
    """See the head of this module."""

    @property
    def token_dim(self) -> int:
        """Numbers of a token."""

    def init(self, rng: np.random.Generator, condition_dim: int, dtype: npt.DTypeLike) -> Tree:
        """Draw parameters."""

    def draw(self, rng: np.random.Generator, num_rows: int) -> Tree:
        """Draw what is random in a step."""

    def loss_and_grads(
        self, params: Tree, z: Array, x: Array, draws: Tree
    ) -> tuple[Any, Array, Tree]:
        """Compute the loss of rows z [rows, condition_dim] and tokens x [rows, token_dim]."""

    def sample(self, params: Tree, z: Array, rng: np.random.Generator) -> Array:
        """Generate tokens [rows, token_dim]."""


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The diffusion loss; see `marref.continuous.diffusion`.

    Parameters
    ----------
    token_dim, features, num_blocks : int
        Of the network.
    copies : int
        How many times, and noises, each token is trained with in a step.
    schedule : {"cosine", "linear"}
    num_steps : int
        Diffusion steps of a sample.
    temperature : float
    clip : float or None
        See `marref.continuous.diffusion.step_back`.
    """

    token_dim: int
    features: int = 64
    num_blocks: int = 3
    copies: int = 4
    schedule: str = "linear"
    num_steps: int = 25
    temperature: float = 1.0
    clip: float | None = 3.0

    def __post_init__(self) -> None:
        for name in ("token_dim", "features", "num_blocks", "copies"):
            checks.integer(name, getattr(self, name), 1)
        diffusion.process(self.schedule, self.num_steps)
        checks.real("temperature", self.temperature, "[0, inf)")
        if self.clip is not None:
            checks.real("clip", self.clip, "(0, inf)")

    def init(self, rng: np.random.Generator, condition_dim: int, dtype: npt.DTypeLike) -> Tree:
        """Draw the network."""
        return network.init(
            rng, self.token_dim, condition_dim, self.features, self.num_blocks, dtype
        )

    def draw(self, rng: np.random.Generator, num_rows: int) -> Tree:
        """Draw a time and a noise for each copy of each row."""
        count = self.copies * num_rows
        return {
            "timesteps": rng.integers(diffusion.NUM_TIMESTEPS, size=count),
            "noise": rng.standard_normal((count, self.token_dim)),
        }

    def loss_and_grads(
        self, params: Tree, z: Array, x: Array, draws: Tree
    ) -> tuple[Any, Array, Tree]:
        """Compute the mean over copies of all rows of both parts of the loss."""
        z, x = (np.tile(rows, (self.copies, 1)) for rows in (z, x))
        steps, time = diffusion.process(self.schedule), draws["timesteps"]
        noise = draws["noise"].astype(x.dtype)
        noisy = diffusion.add_noise(steps, x, time, noise)
        output, cache = network.forward(params, noisy, time, z)
        error, bound, of_loss = diffusion.loss_forward(steps, output, x, time, noise)
        doutput = diffusion.loss_backward(of_loss, np.full(len(x), 1.0 / len(x), x.real.dtype))
        _, dz, grads = network.backward(params, doutput, cache)
        dz = dz.reshape(self.copies, -1, dz.shape[1]).sum(axis=0)
        return error.mean() + bound.mean(), dz, grads

    def sample(self, params: Tree, z: Array, rng: np.random.Generator) -> Array:
        """Run the chain."""
        *_, x = self.chain(params, z, rng)
        return x

    def chain(self, params: Tree, z: Array, rng: np.random.Generator) -> Iterator[Array]:
        """Yield the tokens after each diffusion step."""
        steps = diffusion.process(self.schedule, self.num_steps)
        start: Array = rng.standard_normal((len(z), self.token_dim)).astype(z.dtype)

        def output_of(x: Array, index: int) -> Array:
            time = np.full(len(x), steps.timestep[index])
            return network.forward(params, x, time, z)[0]

        def noise_of(_: int) -> Array:
            return rng.standard_normal(start.shape).astype(z.dtype)

        return diffusion.chain(steps, output_of, start, noise_of, self.temperature, self.clip)


@dataclasses.dataclass(frozen=True, eq=False)
class CrossEntropy:
    """A distribution over the codes of a codebook.

    Parameters
    ----------
    codes : array [num_codes, token_dim]
        See `codebook`.
    temperature : float
        Of the softmax that a code is drawn from, > 0.
    """

    codes: Array
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if np.ndim(self.codes) != 2:
            shape = list(np.shape(self.codes))
            raise ValueError(f"codes: shape {shape}, expected [num_codes, token_dim]")
        checks.real("temperature", self.temperature, "(0, inf)")

    @property
    def token_dim(self) -> int:
        """Numbers of a token."""
        return int(self.codes.shape[1])

    def init(self, rng: np.random.Generator, condition_dim: int, dtype: npt.DTypeLike) -> Tree:
        """Draw a linear layer: z to logits."""
        return xavier.init(rng, condition_dim, len(self.codes), dtype)

    def draw(self, rng: np.random.Generator, num_rows: int) -> Tree:
        """Draw nothing."""
        return {}

    def loss_and_grads(
        self, params: Tree, z: Array, x: Array, draws: Tree
    ) -> tuple[Any, Array, Tree]:
        """Compute -log p of the nearest codes, in nats: dlogits = (p - [code])/rows."""
        logits, cache = linear.forward(params, z)
        rows, ids = np.arange(len(x)), self.nearest(x)
        log_p = log_softmax(logits)
        dlogits = np.exp(log_p)
        dlogits[rows, ids] -= 1.0
        dz, grads = linear.backward(params, dlogits / len(x), cache)
        return -log_p[rows, ids].mean(), dz, grads

    def sample(self, params: Tree, z: Array, rng: np.random.Generator) -> Array:
        """Draw a code for each row: the first whose cumulative probability is above a number."""
        logits, _ = linear.forward(params, z)
        cumulative = np.cumsum(softmax(logits / self.temperature), axis=1)
        bounds = rng.random((len(z), 1)) * cumulative[:, -1:]
        tokens: Array = self.codes[(cumulative > bounds).argmax(axis=1)].astype(z.dtype)
        return tokens

    def nearest(self, x: Array) -> Array:
        """Return the number of the nearest code to each token: [rows]."""
        ids, _ = vq(x.real.astype(np.float64), self.codes)
        return np.asarray(ids)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """A token of least squared error.

    Parameters
    ----------
    token_dim : int
    """

    token_dim: int

    def __post_init__(self) -> None:
        checks.integer("token_dim", self.token_dim, 1)

    def init(self, rng: np.random.Generator, condition_dim: int, dtype: npt.DTypeLike) -> Tree:
        """Draw a linear layer: z to a token."""
        return xavier.init(rng, condition_dim, self.token_dim, dtype)

    def draw(self, rng: np.random.Generator, num_rows: int) -> Tree:
        """Draw nothing."""
        return {}

    def loss_and_grads(
        self, params: Tree, z: Array, x: Array, draws: Tree
    ) -> tuple[Any, Array, Tree]:
        """Compute the mean over rows and numbers of (y - x)²."""
        y, cache = linear.forward(params, z)
        error = y - x
        dz, grads = linear.backward(params, 2.0 * error / error.size, cache)
        return (error**2).mean(), dz, grads

    def sample(self, params: Tree, z: Array, rng: np.random.Generator) -> Array:
        """Return y: there is nothing to draw."""
        return linear.forward(params, z)[0]


def codebook(tokens: npt.ArrayLike, num_codes: int, rng: np.random.Generator) -> Array:
    """Find codes for tokens by k-means (`scipy.cluster.vq.kmeans2`, from k-means++).

    Parameters
    ----------
    tokens : float array [count, token_dim]
    num_codes : int
        At most ``count``.
    rng : numpy.random.Generator

    Returns
    -------
    float64 array [num_codes, token_dim]
    """
    tokens = checks.array("tokens", tokens).astype(np.float64)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: shape {list(tokens.shape)}, expected [count, token_dim]")
    checks.finite("tokens", tokens)
    checks.integer("num_codes", num_codes, 1, len(tokens))
    checks.generator("rng", rng)
    # Called rng from SciPy 1.15 on, which takes the old name too.
    codes, _ = kmeans2(tokens, num_codes, minit="++", seed=rng)
    return np.asarray(codes)
