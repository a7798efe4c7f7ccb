"""Arrays on disk: written whole or not at all, read without unpickling anything.

A file is an ``.npz`` archive of arrays by dotted name, plus one entry, ``__metadata__``, that
holds JSON text as UTF-8 bytes.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from marref.trees import Array

_METADATA = "__metadata__"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    Parameters
    ----------
    path : path
        The file to make or replace; its folder must exist.

    Yields
    ------
    pathlib.Path
        A temporary file beside it, with the same suffix, to be written instead.  When the block
        ends it becomes ``path``; when the block raises it is removed and ``path`` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike[str], arrays: dict[str, Array], metadata: dict[str, Any]) -> None:
    """Write named arrays and metadata to an ``.npz`` file.

    Parameters
    ----------
    path : path
        Written as given: no suffix is added.
    arrays : dict of str to array
        Of numbers or booleans.
    metadata : dict
        Whatever JSON can hold.

    Raises
    ------
    TypeError
        An array holds Python objects, or the metadata are no JSON.
    ValueError
        An array is called ``__metadata__``.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"arrays: {name} has dtype {array.dtype}, expected numbers")
    if _METADATA in arrays:
        raise ValueError(f"arrays: the name {_METADATA} is taken by the metadata")
    text = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays, **{_METADATA: text})


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `save` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    arrays : dict of str to array
    metadata : dict

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It is no such file: truncated, of another format, or with pickled objects.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            metadata = json.loads(arrays.pop(_METADATA).tobytes())
        except Exception as error:
            # Garbled bytes make zipfile, zlib and NumPy raise errors of a dozen types.
            raise ValueError(f"{path}: not a marref .npz file ({error!r})") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: metadata are {type(metadata).__name__}, expected an object")
    return arrays, metadata
