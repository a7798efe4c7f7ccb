"""Ids from arrays on disk: ``.npy``, ``.npz`` and the raw uint16 of nanoGPT's ``.bin``.

``.npy`` and ``.bin`` are opened as memory maps.  The arrays of an ``.npz`` are read whole, so what
they claim to inflate to is checked first.  Nothing is unpickled: an array of Python objects is
refused by its header, and the ``meta.pkl`` that lies beside a ``.bin`` is not opened.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from marref.data import labelling
from marref.data.codecs import MAX_NUM_IDS, first_line
from marref.data.labelling import Labels
from marref.trees import Array

# What the arrays of an .npz may claim, 1 GiB: deflate makes up to 1032 bytes of one, so that a
# file's size says nothing.  More belongs into an .npy, which is mapped and not read.
MAX_INFLATED = 2**30

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

_PIECE = 2**18  # ids that are looked at at a time: 2 MiB of int64


def read(path: Path) -> tuple[Array, Labels | None]:
    """Open the ids of a file, and its labels if it is an ``.npz`` that has them.

    Parameters
    ----------
    path : pathlib.Path
        A regular file; ``.npy``, ``.npz`` or ``.bin``.

    Returns
    -------
    ids : integer array [n, length] or [total]
        Not looked at yet.
    labels : Labels, or None

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It is damaged, or holds anything else.
    """
    labels = None
    if path.suffix == ".bin":
        ids = _raw(path)
    elif path.suffix == ".npz":
        ids, labels = _archived(path)
    else:
        ids = _mapped(path)
    if ids.ndim not in (1, 2):
        raise ValueError(
            f"{path}: shape {list(ids.shape)}, expected [n, length], or one stream [total]"
        )
    if ids.size < 2:
        raise ValueError(f"{path}: shape {list(ids.shape)}, expected at least two ids")
    return ids, labels


def count_ids(path: Path, ids: Array) -> int:
    """Tell the number of ids, the largest plus 1, in one pass over pieces of a few MB."""
    flat = ids.ravel(order="K")  # as they lie in the file
    largest = 0
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= MAX_NUM_IDS:
            bad = low if low < 0 else high
            place = _place(ids, start + int((piece == bad).argmax()))
            raise ValueError(f"{path}: id {bad} at {place} is not in [0, {MAX_NUM_IDS})")
        largest = max(largest, high)
    return largest + 1


def _raw(path: Path) -> Array:
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size} bytes, expected uint16, two bytes an id")
    return np.memmap(path, "<u2", "r")


def _mapped(path: Path) -> Array:
    with path.open("rb") as file:
        shape, order, dtype = _header(file, str(path), path.stat().st_size)
        start = file.tell()
    return np.memmap(path, dtype, "r", start, shape, order)


def _archived(path: Path) -> tuple[Array, Labels | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            return _members(path, archive)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as .npz ({first_line(error)})") from error


def _members(path: Path, archive: zipfile.ZipFile) -> tuple[Array, Labels | None]:
    infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    others = [name for name in infos if name != "labels"]
    name = "tokens" if "tokens" in infos or len(others) != 1 else others[0]
    if name not in infos:
        raise ValueError(
            f"{path}: holds {', '.join(infos) or 'nothing'}; expected one array, or one called "
            "tokens, and perhaps labels"
        )
    claimed = sum(infos[key].file_size for key in {name, "labels"} & infos.keys())
    if claimed > MAX_INFLATED:
        raise ValueError(
            f"{path}: claims to inflate to {claimed:,} bytes, expected at most {MAX_INFLATED:,}; "
            "an .npy may be of any size"
        )
    ids = _member(path, archive, infos[name])
    if "labels" not in infos:
        return ids, None
    labels = _member(path, archive, infos["labels"])
    return ids, labelling.checked(f"{path}: labels", labels)


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    where = f"{path}: {info.filename}"
    try:
        content = archive.read(info)
    except Exception as error:
        # Garbled bytes make zipfile and zlib raise errors of several types.
        raise ValueError(f"{where}: cannot be inflated ({first_line(error)})") from error
    file = io.BytesIO(content)
    shape, order, dtype = _header(file, where, len(content))
    flat = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    return flat.reshape(shape, order=order)


def _header(
    file: IO[bytes], where: str, size: int
) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[Any]]:
    """Read what an .npy file of integers says of itself, and hold it to the file's size."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"format version {version}")
        shape, in_columns, dtype = _HEADERS[version](file)
    except Exception as error:
        # A garbled header is parsed as Python, which fails in several ways.
        raise ValueError(f"{where}: cannot be read as .npy ({first_line(error)})") from error
    if dtype.hasobject:
        raise ValueError(f"{where}: holds pickled Python objects, expected integers")
    if dtype.kind not in "iu":
        raise ValueError(f"{where}: dtype {dtype}, expected integers")
    if any(axis < 1 for axis in shape):
        raise ValueError(f"{where}: shape {list(shape)}, expected no axis to be empty")
    needed = math.prod(shape) * dtype.itemsize
    if needed > size - file.tell():
        raise ValueError(
            f"{where}: truncated: shape {list(shape)} of {dtype} takes {needed:,} bytes, "
            f"received {size - file.tell():,}"
        )
    return shape, "F" if in_columns else "C", dtype


def _place(ids: Array, flat_index: int) -> list[int]:
    order: Literal["C", "F"] = "C" if ids.flags.c_contiguous else "F"
    return [int(axis) for axis in np.unravel_index(flat_index, ids.shape, order)]
