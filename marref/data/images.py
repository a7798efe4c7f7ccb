"""Ids from a folder of PNG and JPEG images, through Pillow (extra ``images``)."""

import io
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import files
from marref.data import labelling
from marref.data.codecs import Pixels, first_line
from marref.trees import Array

_SUFFIXES = (".png", ".jpg", ".jpeg")
# Pillow's names of 8 bits a channel; wider ones it would clip without a word.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def read(
    folder: Path, codec: Pixels | None, levels: int, colour: bool
) -> tuple[Array, Pixels, labelling.Labels | None]:
    """Read every PNG and JPEG in a folder and its sub-folders, in order of path.

    Parameters
    ----------
    folder : pathlib.Path
    codec : Pixels, optional
        What the images must fit; otherwise it is made of the first image's size, ``levels`` and
        ``colour``.
    levels : int
    colour : bool

    Returns
    -------
    ids : uint8 array [n, codec.length]
    codec : Pixels
    labels : Labels, or None
        The classes that sub-folders of ``folder`` stand for, if there are any.

    Raises
    ------
    ImportError
        Pillow is not installed.
    OSError, ValueError
        There are no images, one cannot be read, is transparent, has more than 8 bits a channel or
        another size.
    """
    module = pillow()
    paths = _found(folder)
    if codec is None:
        width, height = _opened(module, paths[0]).size
        codec = Pixels(height, width, 3 if colour else 1, levels)
    ids = np.empty((len(paths), codec.length), np.uint8)
    for row, path in zip(ids, paths, strict=True):
        values, opacity = _decoded(module, path, codec)
        if (opacity < 255).any():
            raise ValueError(f"{path}: has transparent pixels, expected none")
        row[:] = codec.ids(values)
    return ids, codec, _labels(folder, paths)


def with_hole(path: Path, codec: Pixels) -> npt.NDArray[np.int64]:
    """Read an image whose transparent pixels are to be filled in.

    Parameters
    ----------
    path : pathlib.Path
        A PNG of the codec's size.
    codec : Pixels

    Returns
    -------
    int64 array [codec.length]
        Tokens, [MASK] (0) for every channel of a transparent pixel.

    Raises
    ------
    ImportError, OSError, ValueError
        As `read`; or no pixel is transparent, or one is in part.
    """
    values, opacity = _decoded(pillow(), files.regular(path), codec)
    if ((opacity > 0) & (opacity < 255)).any():
        raise ValueError(
            f"{path}: has pixels that are transparent in part, expected all or nothing"
        )
    if opacity.all():
        raise ValueError(f"{path}: has no transparent pixel, expected those to fill in")
    return np.where(np.repeat(opacity == 0, codec.channels), 0, codec.encode(values))


def pillow() -> types.ModuleType:
    """Return Pillow's module of images, or raise an ImportError that names the extra."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            'images need the images extra: pip install ".[images]"; text and arrays do not'
        ) from error
    return PIL.Image


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        folder.stat()
        raise ValueError(f"{folder}: is no folder, expected a folder of PNG or JPEG images")
    paths = [
        path
        for path in folder.rglob("*")
        # A name that begins with a dot is hidden: the copies that macOS makes are no images.
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not paths:
        raise ValueError(f"{folder}: holds no PNG or JPEG images")
    return sorted(paths, key=lambda path: path.relative_to(folder).parts)


def _labels(folder: Path, paths: list[Path]) -> labelling.Labels | None:
    parts = [path.relative_to(folder).parts for path in paths]
    if all(len(part) == 1 for part in parts):
        return None
    for path, part in zip(paths, parts, strict=True):
        if len(part) == 1:
            raise ValueError(f"{path}: lies in no sub-folder, expected one, as others do")
    return labelling.of_names(str(folder), [part[0] for part in parts])


def _decoded(
    pillow: Any, path: Path, codec: Pixels
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Decode an image: [height, width], or [height, width, 3] in colour, and its opacity."""
    image = _opened(pillow, path)
    if image.size != (codec.width, codec.height):
        raise ValueError(
            f"{path}: {image.size[0]} x {image.size[1]} pixels, expected {codec.width} x "
            f"{codec.height}, as all"
        )
    if image.mode not in _MODES:
        raise ValueError(f"{path}: mode {image.mode}, expected 8 bits a channel")
    try:
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
        opacity = np.full((codec.height, codec.width), 255, np.uint8)
        if "A" in image.getbands():
            opacity = np.asarray(image.getchannel("A"))
        values = np.asarray(image.convert("L" if codec.channels == 1 else "RGB"))
    except Exception as error:
        # Garbled bytes make Pillow raise errors of several types.
        raise ValueError(f"{path}: cannot be read as an image ({first_line(error)})") from error
    return values, opacity


def _opened(pillow: Any, path: Path) -> Any:
    """Read the header of an image; one that claims more pixels than Pillow's limit is refused."""
    content = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            return pillow.open(content, formats=("PNG", "JPEG"))
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"{path}: is no PNG or JPEG image") from error
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as an image ({first_line(error)})") from error
