"""Ids from text files: bytes, characters, or what a tokenizer makes of them."""

from pathlib import Path

import numpy as np

from marref.data.codecs import Bytes, Codec
from marref.trees import Array

_LOOKED_AT = 8192  # bytes, to tell text from other files


def read(paths: list[Path], codec: Codec) -> Array:
    """Encode every file by itself, and join the ids with nothing between.

    Parameters
    ----------
    paths : list of pathlib.Path
        Regular files.  One that is taken as bytes is a memory map.
    codec : Bytes, Characters or Tokenizer

    Returns
    -------
    integer array [total]

    Raises
    ------
    OSError
        A file cannot be opened.
    ValueError
        It is no UTF-8, or has a character that the codec has not.
    """
    parts = [mapped(path) if isinstance(codec, Bytes) else _encoded(path, codec) for path in paths]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def decoded(path: Path) -> str:
    """Read a file of UTF-8, every character as it stands, line ends too."""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte 0x{content[error.start]:02x} at offset {error.start} is no UTF-8 "
            f"({error.reason})"
        ) from error


def mapped(path: Path) -> Array:
    """Map the bytes of a file."""
    # An empty file cannot be mapped.
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def check_looks_like_text(path: Path) -> None:
    """Raise if a file begins as no text does: with a zero byte among its first."""
    with path.open("rb") as file:
        place = file.read(_LOOKED_AT).find(0)
    if place >= 0:
        raise ValueError(
            f"{path}: byte 0 at offset {place}, expected text; "
            'kind="bytes" takes any file, .npy, .npz and .bin are ids'
        )


def _encoded(path: Path, codec: Codec) -> Array:
    text = decoded(path)
    try:
        return codec.ids(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
