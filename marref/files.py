"""Arrays on disk: written whole or not at all, read without unpickling anything.

An ``.npz`` file is an archive of arrays by name, plus one entry, ``__metadata__``, that holds JSON
text as UTF-8 bytes.  A ``.safetensors`` file has the same text in its own metadata.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from marref.trees import Array

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY_PREFIX = ".marref-"
"""How the names of temporary files begin."""

_METADATA = "__metadata__"
# The last two are arguments of numpy.savez_compressed; in NumPy 2.1, "file" alone.
_RESERVED = {_METADATA, "file", "allow_pickle"}
_SAFETENSORS_KEY = "marref"
_SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "?",
}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all, even if the process is killed or the power fails.

    Parameters
    ----------
    path : path
        The file to make or replace; its folder must exist.  Of a symbolic link, where it leads.

    Yields
    ------
    pathlib.Path
        A temporary file beside it, with the same suffix, to be written instead.  When the block
        ends it becomes ``path``, with the mode that ``path`` had; when the block raises it is
        removed and ``path`` stays as it was.  `remove_stale` removes what a killed process left.

    Raises
    ------
    OSError
        The file cannot be written.
    ValueError
        There is something at ``path`` that is no regular file, such as a device or a folder.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"{os.fspath(path)}: no regular file, expected one or nothing to replace")
    with naming(path), _temporary(target) as temporary:
        yield temporary
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        sync(temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            sync(target.parent)


def regular(path: str | os.PathLike[str]) -> Path:
    """Return a path if it leads to a regular file: to read another may never end.

    Parameters
    ----------
    path : path

    Returns
    -------
    pathlib.Path

    Raises
    ------
    OSError
        There is nothing.
    ValueError
        It is a folder, a device, a pipe or a socket.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise ValueError(f"{path}: is {what}, expected a file")
    return path


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put a file's name into errors of the system that have none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def sync(path: Path) -> None:
    """Bring what was written to a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files of `replacing` whose writers are dead.

    Parameters
    ----------
    folder : path

    Returns
    -------
    list of pathlib.Path
        What was removed.  Nothing where there are no locks (Windows).
    """
    removed: list[Path] = []
    if fcntl is None:
        return removed
    for path in sorted(Path(folder).glob(f"{TEMPORARY_PREFIX}*")):
        with contextlib.suppress(OSError), locked(path):
            path.unlink()
            removed.append(path)
    return removed


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file or folder against everyone else who asks for it here, until the block ends.

    The system lets go of it when the process ends, however it ends.  Without locks (Windows)
    nothing is held.

    Parameters
    ----------
    path : path
        Must exist.

    Raises
    ------
    OSError
        There is no such path, or somebody else holds it (BlockingIOError).
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def check_suffix(argument: str, path: str | os.PathLike[str]) -> None:
    """Raise unless a file's name says its format, ``.npz`` or ``.safetensors``, for `save`.

    Parameters
    ----------
    argument : str
        What the caller calls the path, for the message.
    path : path

    Raises
    ------
    ValueError
        The name ends otherwise.
    ImportError
        It ends in ``.safetensors``, which is not installed.
    """
    if not _is_safetensors(path) and Path(path).suffix != ".npz":
        raise ValueError(
            f"{argument}: received {os.fspath(path)!r}, expected a name that ends in .npz or "
            ".safetensors"
        )


def save(
    path: str | os.PathLike[str],
    arrays: dict[str, Array],
    metadata: dict[str, Any],
    *,
    compressed: bool = True,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write named arrays and metadata to one file, the same bytes for the same content.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors``: that format (extra ``interop``).  Otherwise ``.npz``.
    arrays : dict of str to array
        Of numbers or booleans.
    metadata : dict
        Whatever JSON can hold.
    compressed : bool
        Of ``.npz``.  Parameters hardly shrink, and take many times as long to compress.
    check : callable, optional
        Called with what was written, before it gets its name; if it raises, it never does.

    Raises
    ------
    TypeError
        An array holds Python objects, or the metadata are no JSON.
    ValueError
        An array is called ``__metadata__``, ``file`` or ``allow_pickle``: NumPy's function that
        writes ``.npz`` has no room for them.
    ImportError
        safetensors is not installed.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"arrays: {name} has dtype {array.dtype}, expected numbers")
    for name in _RESERVED & arrays.keys():
        raise ValueError(f"arrays: the name {name!r} is reserved")
    text = json.dumps(metadata)
    with replacing(path) as temporary:
        if _is_safetensors(path):
            from safetensors.numpy import save as to_bytes

            whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
            temporary.write_bytes(to_bytes(whole, {_SAFETENSORS_KEY: text}))
        else:
            members: dict[str, Any] = {**arrays, _METADATA: np.frombuffer(text.encode(), np.uint8)}
            with temporary.open("wb") as file:
                (np.savez_compressed if compressed else np.savez)(file, **members)
        if check is not None:
            check(temporary)


def load(
    path: str | os.PathLike[str], *, max_bytes: int | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read named arrays and metadata: what `save` wrote, or others with the same tools.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file (extra ``interop``), an ``.npz`` file, or a folder of such files
        and of ``.npy`` files, whose arrays are named by their paths within it.  An index of shards,
        ``*.index.json`` as of Hugging Face, must find them all there.
    max_bytes : int, optional
        A file that holds more, or claims to hold more once it is inflated, is not read.

    Returns
    -------
    arrays : dict of str to array
        bfloat16 is widened to float32, exactly.
    metadata : dict
        Empty where the file has none; ``{"precision": "bfloat16"}`` is added where an array was
        stored in it.

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It cannot be read: truncated, garbled, of another format, with pickled objects, or larger
        than ``max_bytes``.
    ImportError
        safetensors is not installed.
    """
    path = Path(path)
    is_folder = path.is_dir()
    is_safetensors = not is_folder and _is_safetensors(path)
    if max_bytes is not None and not is_folder:
        _check_size(path, max_bytes)
    content = b"" if is_folder else path.read_bytes()
    try:
        if is_folder:
            return _read_folder(path)
        return _read_safetensors(content) if is_safetensors else _read_npz(content)
    except Exception as error:
        # Garbled bytes make zipfile, zlib, NumPy and safetensors raise errors of a dozen types.
        raise ValueError(f"{path}: cannot be read as arrays ({error!r})") from error


def load_all(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Array]:
    """Read the arrays of several files or folders as if they were one.

    Parameters
    ----------
    paths : sequence of path

    Returns
    -------
    dict of str to array

    Raises
    ------
    OSError, ValueError, ImportError
        As `load`; and two arrays have the same name.
    """
    arrays: dict[str, Array] = {}
    for path in paths:
        _join(arrays, load(path)[0], path)
    return arrays


def _join(arrays: dict[str, Array], others: dict[str, Array], path: str | os.PathLike[str]) -> None:
    twice = sorted(arrays.keys() & others.keys())
    if twice:
        raise ValueError(f"{path}: has {twice[0]}, which another file has too")
    arrays |= others


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Make a file beside another, whose name no other thread, process or container makes.

    It is locked until the block ends, which tells it from those of dead writers.
    """
    # A name has 255 bytes at most; a long suffix names no format.
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= 16 else ""
    path = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{suffix}")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        with locked(path):
            yield path
    finally:
        path.unlink(missing_ok=True)


def load_metadata(path: str | os.PathLike[str], *, max_bytes: int) -> dict[str, Any]:
    """Read the metadata of a file of `save`, and nothing else of it.

    Parameters
    ----------
    path : path
        A ``.safetensors`` or ``.npz`` file.
    max_bytes : int
        Longer metadata are not read.

    Returns
    -------
    dict
        Empty where the file has none.

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It cannot be read, or its metadata are longer.
    ImportError
        safetensors is not installed.
    """
    path = regular(path)
    of_format = _safetensors_metadata if _is_safetensors(path) else _npz_metadata
    with path.open("rb") as file:
        try:
            return of_format(file, max_bytes)
        except Exception as error:  # As in `load`.
            raise ValueError(f"{path}: cannot be read as arrays ({error!r})") from error


def _npz_metadata(file: IO[bytes], max_bytes: int) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        name = f"{_METADATA}.npy"
        if name not in archive.namelist():
            return {}
        _check_length(archive.getinfo(name).file_size, max_bytes)
        with archive.open(name) as member:
            return _parsed(np.lib.format.read_array(member, allow_pickle=False).tobytes())


def _safetensors_metadata(file: IO[bytes], max_bytes: int) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    _check_length(length, max_bytes)
    text = json.loads(file.read(length)).get(_METADATA, {}).get(_SAFETENSORS_KEY)
    return {} if text is None else _parsed(text)


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise ValueError(f"metadata of {length:,} bytes, expected at most {max_bytes:,}")


def _check_size(path: Path, max_bytes: int) -> None:
    """Raise if a file is larger than a bound, or says that it becomes so when it is inflated."""
    size = path.stat().st_size
    if size <= max_bytes and not _is_safetensors(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    if size > max_bytes:
        raise ValueError(f"{path}: holds {size:,} bytes, expected at most {max_bytes:,}")


def _read_npz(content: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        raise ValueError(
            "a single .npy array, which has no name; expected .npz, or a folder of .npy"
        )
    with loaded as archive:
        if len(set(archive.files)) < len(archive.files):
            raise ValueError("two arrays have the same name")
        arrays = {
            name: _numbers(name, functools.partial(archive.__getitem__, name))
            for name in archive.files
        }
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise ValueError(
            f"{strange[0]} is no array; a PyTorch file is saved with safetensors.torch.save_file"
        )
    # No array, but an argument: NumPy 2.1 wrote it to the files of whoever gave it.
    arrays.pop("allow_pickle", None)
    encoded = arrays.pop(_METADATA, None)
    return arrays, {} if encoded is None else _parsed(encoded.tobytes())


def _read_safetensors(content: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    from safetensors import deserialize

    arrays, metadata = {}, {}
    for name, tensor in deserialize(content):
        if tensor["dtype"] == "BF16":
            metadata["precision"] = "bfloat16"
            halves = np.frombuffer(tensor["data"], "<u2").astype(np.uint32)
            flat = (halves << 16).view(np.float32)
        else:
            flat = np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]])
        arrays[name] = flat.reshape(tensor["shape"])
    return arrays, {**metadata, **_safetensors_metadata(io.BytesIO(content), len(content))}


def _read_folder(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays: dict[str, Array] = {}
    metadata: dict[str, Any] = {}
    for index in sorted(path.glob("*.index.json")):
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (path / name).exists())
        if missing:
            raise ValueError(f"{index.name} names {missing[0]}, which is not there")
    for file in sorted(path.rglob("*")):
        if file.suffix == ".npy":
            name = file.relative_to(path).with_suffix("").as_posix()
            _join(
                arrays,
                {name: _numbers(name, functools.partial(np.load, file, allow_pickle=False))},
                file,
            )
        elif file.suffix in (".npz", ".safetensors"):
            shard, its_metadata = load(file)
            _join(arrays, shard, file)
            metadata |= its_metadata
    if not arrays:
        raise ValueError("no .npy, .npz or .safetensors files in it")
    return arrays, metadata


def _numbers(name: str, read: Callable[[], Array]) -> Array:
    """Read an array; say which one it is that would have to be unpickled."""
    try:
        return read()
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{name} holds Python objects (None, or arrays of several shapes); leave it out"
            ) from error
        raise


def _parsed(text: str | bytes) -> dict[str, Any]:
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata are {type(metadata).__name__}, expected an object")
    return metadata


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name asks for safetensors; raise if it does and that is not installed."""
    asked_for = Path(path).suffix == ".safetensors"
    if asked_for and importlib.util.find_spec("safetensors") is None:
        raise ImportError(
            'safetensors files need the interop extra: pip install ".[interop]"; .npz does not'
        )
    return asked_for
