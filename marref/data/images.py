"""Ids from a folder of PNG and JPEG images, through Pillow (extra ``images``)."""

import io
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
    pillow = _pillow()
    paths = _found(folder)
    if codec is None:
        width, height = _opened(pillow, paths[0]).size
        codec = Pixels(height, width, 3 if colour else 1, levels)
    ids = np.empty((len(paths), codec.length), np.uint8)
    for row, path in zip(ids, paths, strict=True):
        row[:] = codec.ids(_values(pillow, path, codec))
    return ids, codec, _labels(folder, paths)


def _pillow() -> types.ModuleType:
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


def _values(pillow: Any, path: Path, codec: Pixels) -> npt.NDArray[np.uint8]:
    """Decode an image: [height, width], or [height, width, 3] in colour."""
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
        is_opaque = "A" not in image.getbands() or image.getextrema()[-1] == (255, 255)
        values = np.asarray(image.convert("L" if codec.channels == 1 else "RGB"))
    except Exception as error:
        # Garbled bytes make Pillow raise errors of several types.
        raise ValueError(f"{path}: cannot be read as an image ({first_line(error)})") from error
    if not is_opaque:
        raise ValueError(f"{path}: has transparent pixels, expected none")
    return values


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
