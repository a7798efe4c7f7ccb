"""`load`: a dataset of whatever a path leads to."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from marref import checks, files
from marref.data import arrays, images, labelling, shipped, text
from marref.data.codecs import KINDS, Bytes, Characters, Codec, Ids, Pixels, Tokenizer
from marref.data.dataset import Dataset
from marref.trees import Array

DIGITS = "digits"
# nanoGPT's README trains on a CPU with this block_size.
DEFAULT_LENGTH = 64
DEFAULT_LEVELS = 16

_ID_SUFFIXES = (".npy", ".npz", ".bin")
_KIND_OF_OPTION = {
    "tokenizer": "tokenizer",
    "num_ids": "ids",
    "levels": "pixels",
    "colour": "pixels",
}


def load(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    kind: str | None = None,
    codec: Codec | None = None,
    length: int | None = None,
    num_ids: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    levels: int | None = None,
    colour: bool | None = None,
    labels: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Make a dataset of a file, several text files or a folder of images.

    Parameters
    ----------
    source : path, or list of paths
        A text file or several, joined with nothing between; ``.npy``, ``.npz`` or ``.bin``; a
        folder of PNG and JPEG images; or ``"digits"``, the shipped digits.
    kind : {"bytes", "characters", "tokenizer", "ids", "pixels"}, optional
        What the tokens are.  Without it: ids of ``.npy``, ``.npz`` and ``.bin``, pixels of a
        folder, a tokenizer's if one is given, and bytes otherwise.
    codec : Codec, optional
        Read the data as these tokens, those of a trained model for instance, in place of ``kind``
        and its options.
    length : int, optional
        Of the windows of a stream: 64, or a sixteenth of the stream if that is less.  Sequences
        [n, length] and images have theirs.
    num_ids : int, optional
        Of ids: how many there are.  Without it the data are read once for the largest.
    tokenizer : path, optional
        A JSON file of the ``tokenizers`` package (extra ``tokens``).
    levels : int, optional
        Of pixels: how many a channel has, 16 by default.
    colour : bool, optional
        Of pixels: whether images are read in colour, not in grey.
    labels : path, optional
        A text file with the class of every sequence, one a line, in the order of the sequences;
        images are in order of path.  Without it: an array called labels in an ``.npz``, or the
        sub-folders that images lie in.

    Returns
    -------
    Dataset

    Raises
    ------
    OSError
        A file cannot be opened.
    TypeError, ValueError
        The data or the options are no good; the message names the file.
    ImportError
        The extra that the data need is not installed.
    """
    options = {"tokenizer": tokenizer, "num_ids": num_ids, "levels": levels, "colour": colour}
    paths = _paths(source)
    is_digits = source == DIGITS
    kind = _kind(paths, kind, codec, options, is_digits)
    if is_digits:
        tokens, codec, classes = _digits(codec)
    elif kind == "pixels":
        tokens, codec, classes = _pixels(paths, codec, levels, colour)
    elif kind == "ids":
        tokens, codec, classes = _ids(paths, codec, num_ids)
    else:
        tokens, codec, classes = _text(paths, kind, codec, tokenizer)
    if labels is not None:
        if tokens.ndim == 1:
            raise ValueError(f"labels: received for {paths[0]}, a stream without sequences")
        classes = labelling.of_file(files.regular(labels), len(tokens))
    if length is None:
        length = _default_length(tokens)
    try:
        return Dataset(tokens, codec, length, *(classes or ()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{paths[0]}: {error}") from error


_Read: TypeAlias = tuple[Array, Codec, labelling.Labels | None]


def _digits(codec: Codec | None) -> _Read:
    digits = shipped.dataset()
    if codec not in (None, digits.codec):
        raise ValueError(f"codec: received {codec}, expected {digits.codec}, the digits'")
    assert digits.labels is not None
    return digits.tokens, digits.codec, labelling.Labels(digits.labels)


def _pixels(
    paths: list[Path], codec: Codec | None, levels: int | None, colour: bool | None
) -> _Read:
    assert codec is None or isinstance(codec, Pixels)
    levels = DEFAULT_LEVELS if levels is None else checks.integer("levels", levels, 2, 256)
    return images.read(_only(paths), codec, levels, bool(colour))


def _ids(paths: list[Path], codec: Codec | None, num_ids: int | None) -> _Read:
    path = files.regular(_only(paths))
    given = codec if num_ids is None else Ids(num_ids)
    tokens, classes = arrays.read(path)
    return tokens, given or Ids(arrays.count_ids(path, tokens)), classes


def _text(
    paths: list[Path], kind: str, codec: Codec | None, tokenizer: str | os.PathLike[str] | None
) -> _Read:
    paths = [files.regular(path) for path in paths]
    if codec is None and kind == "characters":
        codec = Characters.of("".join(text.decoded(path) for path in paths))
    elif codec is None and kind == "tokenizer":
        codec = _tokenizer(tokenizer)
    return text.read(paths, codec or Bytes()), codec or Bytes(), None


def _tokenizer(path: str | os.PathLike[str] | None) -> Tokenizer:
    if path is None:
        raise ValueError('tokenizer: received None, expected a file, for kind="tokenizer"')
    path = files.regular(path)
    try:
        return Tokenizer(text.decoded(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _paths(source: Any) -> list[Path]:
    sources = source if isinstance(source, list | tuple) else [source]
    for path in sources:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"source: received {type(path).__name__}, expected a path or paths")
    if not sources:
        raise ValueError("source: received no paths, expected at least one")
    return [Path(path) for path in sources]


def _kind(
    paths: list[Path],
    kind: str | None,
    codec: Codec | None,
    options: dict[str, Any],
    is_digits: bool,
) -> str:
    """Settle what the tokens are; refuse options that other kinds have."""
    given = [name for name, value in options.items() if value is not None]
    if codec is not None:
        if not isinstance(codec, Codec):
            raise TypeError(f"codec: received {type(codec).__name__}, expected a Codec")
        if kind is not None or given:
            raise ValueError(
                f"codec: received with {given[0] if given else 'kind'}, expected alone"
            )
        return codec.kind
    if kind is not None:
        checks.choice("kind", kind, KINDS)
    elif is_digits:
        kind = "digits"
    elif "tokenizer" in given:
        kind = "tokenizer"
    else:
        kind = _told(paths)
    for name in given:
        if _KIND_OF_OPTION[name] != kind:
            raise ValueError(f"{name}: received for {kind}, expected for {_KIND_OF_OPTION[name]}")
    return kind


def _told(paths: list[Path]) -> str:
    """Tell the kind of data from the first path's suffix, and that text is text."""
    if paths[0].is_dir():
        return "pixels"
    if paths[0].suffix in _ID_SUFFIXES:
        return "ids"
    for path in paths:
        text.check_looks_like_text(files.regular(path))
    return "bytes"


def _only(paths: list[Path]) -> Path:
    if len(paths) > 1:
        raise ValueError(f"source: received {len(paths)} paths, expected one; only text is joined")
    return paths[0]


def _default_length(tokens: Array) -> int:
    """Choose windows of a stream of which a tenth, held out, has two."""
    if tokens.ndim == 1:
        return max(1, min(DEFAULT_LENGTH, len(tokens) // 16))
    return int(tokens.shape[1])
