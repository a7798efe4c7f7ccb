"""Pictures of the codec `marref.data.codecs.Pixels` as images, scaled for the noise schedules."""

import dataclasses

import numpy as np

from marref.data import Dataset
from marref.data.codecs import Codec, Pixels
from marref.trees import Array

_MOST_MEASURED = 4096


@dataclasses.dataclass(frozen=True)
class Scale:
    """What takes levels, tokens less 1, to a mean of 0 and a standard deviation of 1."""

    codec: Pixels
    mean: float
    std: float

    @classmethod
    def of(cls, dataset: Dataset) -> "Scale":
        """Measure it on pictures, 4,096 at most, evenly spread over a dataset.

        Raises
        ------
        ValueError
            The dataset is none of square pictures, or they are all of one level.
        """
        codec = square(dataset.codec)
        places = np.linspace(0, len(dataset) - 1, min(len(dataset), _MOST_MEASURED))
        tokens = dataset.rows(places.astype(np.int64))
        mean, std = float((tokens - 1).mean()), float(tokens.std())
        if std == 0.0:
            raise ValueError(f"data: every level is {mean:g}, expected pictures that differ")
        return cls(codec, mean, std)

    def to_images(self, tokens: Array) -> Array:
        """[count, codec.length] -> float64 [count, channels, height, width]."""
        codec = self.codec
        pictures = tokens.reshape(-1, codec.height, codec.width, codec.channels)
        scaled: Array = (pictures.transpose(0, 3, 1, 2) - 1 - self.mean) / self.std
        return scaled

    def to_tokens(self, images: Array) -> Array:
        """Undo `to_images`, to the nearest level: int64 [count, codec.length]."""
        levels = np.rint(images.transpose(0, 2, 3, 1) * self.std + self.mean)
        clipped = np.clip(levels, 0, self.codec.num_ids - 1).astype(np.int64)
        tokens: Array = clipped.reshape(len(images), -1) + 1
        return tokens


def square(codec: Codec) -> Pixels:
    """Return the codec; raise ValueError unless it is one of square pictures."""
    if not isinstance(codec, Pixels):
        raise ValueError(f"data: {codec.kind}, expected pictures for the continuous model")
    if codec.height != codec.width:
        raise ValueError(
            f"data: pictures of {codec.height} x {codec.width} pixels, expected square ones for "
            "the continuous model"
        )
    return codec
