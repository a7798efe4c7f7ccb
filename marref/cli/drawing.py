"""Pictures in files, PNG and GIF, through Pillow (extra ``images``)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from marref import files
from marref.data.codecs import Pixels
from marref.data.images import pillow
from marref.trees import Array

_COLOUR_OF_MASK = (219, 140, 97)
_COLOUR_OF_GAP = 192
_GAP = 1
_SIZE = 512  # to which small pictures are enlarged, in pixels
_MOST_FRAMES = 64
_MOST_ROWS = 12
_FRAME = 100  # milliseconds
_LAST_FRAME = 2000


def check_installed(option: str) -> None:
    """Raise an ImportError that names the extra unless Pillow is installed."""
    try:
        pillow()
    except ImportError:
        raise ImportError(f'{option}: needs the images extra: pip install ".[images]"') from None


def grid(path: Path, codec: Pixels, tokens: Array) -> None:
    """Draw pictures in a square, as a PNG.

    Parameters
    ----------
    path : pathlib.Path
    codec : Pixels
    tokens : integer array [count, length]
    """
    with files.replacing(path) as temporary:
        pillow().fromarray(_enlarged(_square(_coloured(codec, tokens)))).save(temporary, "PNG")


def unmasking(path: Path, codec: Pixels, stages: Array) -> None:
    """Draw the decoder at work, as a PNG: a row a step, a column a picture, masked in colour.

    Parameters
    ----------
    path : pathlib.Path
    codec : Pixels
    stages : integer array [steps, count, length]
        Of more than 12 steps so many are drawn, evenly spread.
    """
    pictures = _coloured(codec, _spread(stages, _MOST_ROWS))
    picture = _tiled(pictures.reshape(-1, *pictures.shape[2:]), stages.shape[1])
    with files.replacing(path) as temporary:
        pillow().fromarray(_enlarged(picture)).save(temporary, "PNG")


def animation(path: Path, codec: Pixels, stages: Array) -> None:
    """Draw the decoder at work, as a GIF that begins again: pictures in a square.

    Parameters
    ----------
    path : pathlib.Path
    codec : Pixels
    stages : integer array [steps, count, length]
        Of more than 64 steps so many are shown, evenly spread, a tenth of a second each.
    """
    pictures = _coloured(codec, _spread(stages, _MOST_FRAMES))
    first, *others = (pillow().fromarray(_enlarged(_square(frame))) for frame in pictures)
    durations = [_FRAME] * len(others) + [_LAST_FRAME]
    with files.replacing(path) as temporary:
        first.save(
            temporary, "GIF", save_all=True, append_images=others, duration=durations, loop=0
        )


def _coloured(codec: Pixels, tokens: Array) -> npt.NDArray[np.uint8]:
    """Make pictures [..., height, width, 3] of tokens, with masked pixels in colour."""
    shape = (*tokens.shape[:-1], codec.height, codec.width, codec.channels)
    values = np.broadcast_to(codec.decode(tokens).reshape(shape), (*shape[:-1], 3))
    masked = (tokens.reshape(shape) == 0).any(axis=-1, keepdims=True)
    return np.where(masked, np.array(_COLOUR_OF_MASK, np.uint8), values)


def _spread(stages: Array, count: int) -> Array:
    """Take so many of the steps at most, the last always."""
    places = np.linspace(0, len(stages) - 1, min(count, len(stages)))
    taken: Array = stages[places.round().astype(int)]
    return taken


def _square(pictures: Array) -> Array:
    return _tiled(pictures, int(np.ceil(np.sqrt(len(pictures)))))


def _tiled(pictures: Array, columns: int) -> Array:
    """Lay pictures [count, height, width, 3] out in rows, with a gap below and beside each."""
    missing = -len(pictures) % columns
    padded = np.pad(
        pictures,
        ((0, missing), (0, _GAP), (0, _GAP), (0, 0)),
        constant_values=_COLOUR_OF_GAP,
    )
    rows = padded.reshape(-1, columns, *padded.shape[1:])
    return np.concatenate(np.concatenate(rows, axis=1), axis=1)


def _enlarged(picture: Array) -> Array:
    """Make every pixel a square of a whole number of them."""
    factor = max(1, _SIZE // max(picture.shape[:2]))
    enlarged: Array = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return enlarged
