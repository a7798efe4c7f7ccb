"""The hyper-parameters of a continuous MAR, and the images and labels that fit them."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.continuous import diffusion
from marref.trees import Array

_FARTHEST = 2.0


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The hyper-parameters of a `marref.continuous.ContinuousMAR`.

    Parameters
    ----------
    image_size, channels, patch_size : int
        Images are [channels, image_size, image_size]; a token is a patch of patch_size², which
        divides them.
    encoder_dim, encoder_layers, decoder_dim, decoder_layers : int
    num_heads : int
        Of both; divides both widths.
    mlp_ratio : float
        Hidden features of a block's feed-forward layer, as a multiple of its width.
    buffer_size : int
        Places before the tokens that hold the class.
    num_classes : int, optional
        ``None``: no classes.
    label_drop : float
        The probability of dropping a label in training, in [0, 1].
    diffusion_dim, diffusion_layers : int
        Width and blocks of the diffusion network.
    diffusion_batch_mul : int
        How many times, and noises, each token is trained with in a step.
    noise_schedule : {"cosine", "linear"}
        See `marref.continuous.diffusion.process`.
    layer_norm_epsilon : float
        Of the blocks and the norms behind them.
    dropout : float
        In [0, 1).

    Raises
    ------
    TypeError, ValueError
        A hyper-parameter is of another type or outside its range, or two do not fit.

    Notes
    -----
    The defaults are for the 8x8 digits on a CPU; `CONFIGURATIONS` has the paper's.
    """

    gelu: ClassVar[str] = "erf"

    image_size: int = 8
    channels: int = 1
    patch_size: int = 2
    encoder_dim: int = 64
    encoder_layers: int = 2
    decoder_dim: int = 64
    decoder_layers: int = 2
    num_heads: int = 4
    mlp_ratio: float = 4.0
    buffer_size: int = 8
    num_classes: int | None = None
    label_drop: float = 0.1
    diffusion_dim: int = 128
    diffusion_layers: int = 3
    diffusion_batch_mul: int = 4
    noise_schedule: str = "cosine"
    layer_norm_epsilon: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch_size", "encoder_dim", "encoder_layers"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("decoder_dim", "decoder_layers", "num_heads", "buffer_size"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("diffusion_dim", "diffusion_layers", "diffusion_batch_mul"):
            checks.integer(name, getattr(self, name), 1)
        if self.num_classes is not None:
            checks.integer("num_classes", self.num_classes, 1)
        checks.real("mlp_ratio", self.mlp_ratio, "(0, inf)")
        checks.real("label_drop", self.label_drop, "[0, 1]")
        checks.real("layer_norm_epsilon", self.layer_norm_epsilon, "(0, inf)")
        checks.real("dropout", self.dropout, "[0, 1)")
        checks.choice("noise_schedule", self.noise_schedule, diffusion.SCHEDULES)
        _check_divides("patch_size", self.patch_size, "image_size", self.image_size)
        for name in ("encoder_dim", "decoder_dim"):
            _check_divides("num_heads", self.num_heads, name, getattr(self, name))

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """Numbers of a token."""
        return self.channels * self.patch_size**2

    def hidden(self, features: int) -> int:
        """Hidden features of a feed-forward layer."""
        return int(features * self.mlp_ratio)

    def as_dict(self) -> dict[str, Any]:
        """Return the hyper-parameters by name."""
        return dataclasses.asdict(self)

    def check_images(self, images: npt.ArrayLike) -> Array:
        """Raise unless images fit the model and are finite; warn unless they are scaled.

        Returns
        -------
        array [batch, channels, image_size, image_size]
        """
        images = checks.array("images", images)
        if images.dtype.kind != "f":
            raise TypeError(f"images: dtype {images.dtype}, expected float32 or float64")
        shape = [self.channels, self.image_size, self.image_size]
        if images.ndim != 4 or len(images) == 0 or [*images.shape[1:]] != shape:
            expected = ", ".join(map(str, ["batch", *shape]))
            raise ValueError(f"images: shape {list(images.shape)}, expected [{expected}]")
        checks.finite("images", images)
        std = float(images.std())
        if len(images) > 1 and not 1.0 / _FARTHEST < std < _FARTHEST:
            warnings.warn(
                f"images: standard deviation {std:.3g}, and the noise schedule is made for 1: "
                f"divide by {std:.3g}",
                stacklevel=3,
            )
        return images

    def check_labels(self, labels: npt.ArrayLike | None, batch_size: int) -> Array:
        """Raise unless labels fit the model and the batch; "no class" stands for ``None``."""
        if labels is None:
            return np.full(batch_size, self.num_classes or 0)
        if self.num_classes is None:
            raise ValueError("labels: received for a model without classes, expected None")
        labels = checks.labels("labels", labels, self.num_classes)
        checks.shape("labels", labels, (batch_size,))
        return labels


@contextlib.contextmanager
def of_told_scale() -> Iterator[None]:
    """Do not warn of the scale of batches of data whose scale was told of as a whole."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "images: standard deviation")
        yield


def _check_divides(part: str, divisor: int, whole: str, value: int) -> None:
    if value % divisor:
        raise ValueError(f"{whole}: received {value}, expected a multiple of {part} = {divisor}")


def _paper(width: int, layers: int, heads: int, diffusion: tuple[int, int]) -> dict[str, Any]:
    return {
        "image_size": 16,
        "channels": 16,
        "patch_size": 1,
        "encoder_dim": width,
        "encoder_layers": layers,
        "decoder_dim": width,
        "decoder_layers": layers,
        "num_heads": heads,
        "buffer_size": 64,
        "num_classes": 1000,
        "diffusion_layers": diffusion[0],
        "diffusion_dim": diffusion[1],
        "dropout": 0.1,
    }


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "digits": {"num_classes": 10},
    "base": _paper(768, 12, 12, (6, 1024)),
    "large": _paper(1024, 16, 16, (8, 1280)),
    "huge": _paper(1280, 20, 16, (12, 1536)),
}
"""Arguments of `build` by name: one for a CPU, and the three of the paper, on latents of 16x16."""
