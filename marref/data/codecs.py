"""What token ids mean: one frozen dataclass for each kind of data.

A codec numbers what data consist of from 0 on: raw ids, in [0, num_ids).  Token 0 is [MASK], so
raw id r is token r + 1 and a model's ``vocab_size`` is ``num_ids + 1``.  ``codec.encode`` makes
tokens, ``codec.decode`` makes of them what they stand for, and ``codec.as_dict`` is JSON, to be
kept beside the parameters; `codec_from_dict` reads it.
"""

import abc
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.trees import Array

# How a [MASK] that is not yet filled is shown.
TEXT_OF_MASK = "_"
ID_OF_MASK = -1
GREY_OF_MASK = 128

# The largest number of ids whose tokens fit int32.
MAX_NUM_IDS = 2**31 - 2


class Codec(abc.ABC):
    """What all codecs share; see the head of this module."""

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def num_ids(self) -> int:
        """The number of raw ids."""

    @abc.abstractmethod
    def ids(self, content: Any) -> Array:
        """Make raw ids of content, in the smallest dtype that holds ``num_ids``."""

    @abc.abstractmethod
    def _decoded(self, tokens: Array) -> Any:
        """Make content of tokens that are known to be in range."""

    def encode(self, content: Any) -> npt.NDArray[np.int64]:
        """Make tokens of content: raw ids plus 1.

        Parameters
        ----------
        content : str, bytes or array
            Whatever the codec is for.

        Returns
        -------
        int64 array [..., length]

        Raises
        ------
        TypeError, ValueError
            The codec has no id for a part of it.
        """
        return self.ids(content).astype(np.int64) + 1

    def decode(self, tokens: npt.ArrayLike) -> Any:
        """Make content of tokens, the inverse of `encode`.

        Parameters
        ----------
        tokens : integer array [..., length]
            0, [MASK], is shown as ``_`` in text, as -1 among ids and as the grey level 128 among
            pixels.

        Returns
        -------
        content
            Of text a string, or a list of strings (nested like the axes before the last); of ids
            an int64 array [..., length]; of pixels a uint8 array [..., height, width], of colours
            [..., height, width, 3].

        Raises
        ------
        TypeError, ValueError
            The tokens are no integers in [0, num_ids], or have no axis.
        """
        tokens = checks.token_ids("tokens", tokens, self.num_ids + 1, batched=False)
        if tokens.ndim == 0:
            raise ValueError("tokens: shape [], expected [..., length]")
        return self._decoded(tokens)

    def as_dict(self) -> dict[str, Any]:
        """Say everything about the codec in what JSON can hold."""
        assert dataclasses.is_dataclass(self)
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Bytes(Codec):
    """Bytes as ids: any file at all.  Text is its UTF-8; what is none is shown as U+FFFD."""

    kind = "bytes"

    @property
    def num_ids(self) -> int:
        """256."""
        return 256

    def ids(self, content: str | bytes) -> Array:
        """Take the bytes as they are, or the UTF-8 of a string."""
        if isinstance(content, str):
            content = content.encode()
        if not isinstance(content, bytes):
            raise TypeError(f"content: received {type(content).__name__}, expected str or bytes")
        return np.frombuffer(content, np.uint8)

    def _decoded(self, tokens: Array) -> Any:
        table = np.array([ord(TEXT_OF_MASK), *range(256)], np.uint8)
        return _texts(tokens, lambda row: table[row].tobytes().decode(errors="replace"))


@dataclasses.dataclass(frozen=True)
class Characters(Codec):
    """Characters as ids.

    Parameters
    ----------
    alphabet : str
        Every character once, in order of code point; the first has id 0.
    """

    alphabet: str
    kind = "characters"

    def __post_init__(self) -> None:
        _check_text("alphabet", self.alphabet)
        if not self.alphabet or self.alphabet != "".join(sorted(set(self.alphabet))):
            raise ValueError(
                f"alphabet: received {_start(self.alphabet)}, expected characters in order of code "
                "point, each once"
            )

    @property
    def num_ids(self) -> int:
        """The number of characters."""
        return len(self.alphabet)

    @classmethod
    def of(cls, text: str) -> "Characters":
        """Make the alphabet of a text."""
        return cls("".join(sorted(set(text))))

    def ids(self, content: str) -> Array:
        """Find every character of a string in the alphabet."""
        _check_text("content", content)
        alphabet, points = _code_points(self.alphabet), _code_points(content)
        ids = np.searchsorted(alphabet, points).astype(np.min_scalar_type(self.num_ids))
        unknown = alphabet[np.minimum(ids, self.num_ids - 1)] != points
        if unknown.any():
            place = int(unknown.argmax())
            raise ValueError(
                f"character {content[place]!r} (U+{points[place]:04X}) at {place} is not in the "
                f"alphabet of {self.num_ids}"
            )
        return ids

    def _decoded(self, tokens: Array) -> Any:
        table = _code_points(TEXT_OF_MASK + self.alphabet)
        return _texts(tokens, lambda row: table[row].tobytes().decode("utf-32-le"))


@dataclasses.dataclass(frozen=True)
class Tokenizer(Codec):
    """The ids of a ``tokenizers`` JSON file (extra ``tokens``).

    Parameters
    ----------
    file : str
        The file's text, so that it travels with whatever was trained.  Its truncation, padding
        and special tokens added around a text are not used.
    """

    file: str = dataclasses.field(repr=False)
    kind = "tokenizer"

    def __post_init__(self) -> None:
        _check_text("file", self.file)
        checks.integer("num_ids", self.num_ids, 1, MAX_NUM_IDS)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                'tokenizer files need the tokens extra: pip install ".[tokens]"; bytes and '
                "characters do not"
            ) from error
        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.file)
        except Exception as error:  # of no narrower type
            raise ValueError(
                f"file: received {_start(self.file)}, expected the JSON of the tokenizers package "
                f"({first_line(error)})"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def num_ids(self) -> int:
        """One more than the largest id, added tokens among them."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def ids(self, content: str) -> Array:
        """Encode a string."""
        _check_text("content", content)
        ids = self._tokenizer.encode(content, add_special_tokens=False).ids
        return np.array(ids, np.min_scalar_type(self.num_ids))

    def _decoded(self, tokens: Array) -> Any:
        def text(row: Array) -> str:
            runs = itertools.groupby(row.tolist(), key=bool)
            return "".join(
                self._tokenizer.decode([token - 1 for token in run], skip_special_tokens=False)
                if known
                else TEXT_OF_MASK * len(list(run))
                for known, run in runs
            )

        return _texts(tokens, text)


@dataclasses.dataclass(frozen=True)
class Ids(Codec):
    """Ids that mean nothing to marref: those of somebody's arrays.

    Parameters
    ----------
    count : int
        How many there are.
    """

    count: int
    kind = "ids"

    def __post_init__(self) -> None:
        checks.integer("num_ids", self.count, 1, MAX_NUM_IDS)

    @property
    def num_ids(self) -> int:
        """The number of ids."""
        return self.count

    def ids(self, content: npt.ArrayLike) -> Array:
        """Check that every id is in range."""
        ids = checks.token_ids("ids", content, self.num_ids, batched=False)
        return ids.astype(np.min_scalar_type(self.num_ids))

    def _decoded(self, tokens: Array) -> npt.NDArray[np.int64]:
        return np.where(tokens == 0, ID_OF_MASK, tokens.astype(np.int64) - 1)


@dataclasses.dataclass(frozen=True)
class Pixels(Codec):
    """Images, row by row; the channels of a pixel beside each other.

    A value v of 0 to 255 is the nearest of ``levels`` evenly spaced levels, round(v·(levels-1)/255)
    (halves up), and level l is shown as round(l·255/(levels-1)).

    Parameters
    ----------
    height, width : int
        In pixels.
    channels : {1, 3}
        Grey, or red, green and blue.
    levels : int
        Of each channel, from 2 to 256.
    """

    height: int
    width: int
    channels: int
    levels: int
    kind = "pixels"

    def __post_init__(self) -> None:
        checks.integer("height", self.height, 1)
        checks.integer("width", self.width, 1)
        if checks.integer("channels", self.channels, 1, 3) == 2:
            raise ValueError("channels: received 2, expected 1 (grey) or 3 (colour)")
        checks.integer("levels", self.levels, 2, 256)

    @property
    def num_ids(self) -> int:
        """The number of levels."""
        return self.levels

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.height * self.width * self.channels

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: [height, width], or [height, width, 3]."""
        return (self.height, self.width, 3)[: 2 if self.channels == 1 else 3]

    @property
    def values(self) -> Array:
        """How each level is shown, from 0 to 255."""
        intervals = self.levels - 1
        values: Array = (2 * 255 * np.arange(self.levels) + intervals) // (2 * intervals)
        return values

    def ids(self, content: npt.ArrayLike) -> Array:
        """Quantise images, uint8 [..., height, width] or [..., height, width, 3]."""
        images = checks.array("images", content)
        if images.dtype != np.uint8:
            raise TypeError(f"images: dtype {images.dtype}, expected uint8")
        if images.ndim < len(self.shape) or images.shape[-len(self.shape) :] != self.shape:
            raise ValueError(f"images: shape {list(images.shape)}, expected [..., {self._sizes}]")
        before = images.shape[: -len(self.shape)]
        return self._level_of_value[images].reshape(*before, self.length)

    def _decoded(self, tokens: Array) -> npt.NDArray[np.uint8]:
        if tokens.shape[-1] != self.length:
            raise ValueError(f"tokens: shape {list(tokens.shape)}, expected [..., {self.length}]")
        table = np.array([GREY_OF_MASK, *self.values], np.uint8)
        return table[tokens].reshape(*tokens.shape[:-1], *self.shape)

    @property
    def _level_of_value(self) -> npt.NDArray[np.uint8]:
        levels = (2 * np.arange(256) * (self.levels - 1) + 255) // (2 * 255)
        return levels.astype(np.uint8)

    @property
    def _sizes(self) -> str:
        return ", ".join(str(size) for size in self.shape)


_CODECS: dict[str, type[Codec]] = {
    codec.kind: codec for codec in (Bytes, Characters, Tokenizer, Ids, Pixels)
}
KINDS = tuple(_CODECS)


def codec_from_dict(fields: dict[str, Any]) -> Codec:
    """Read what ``codec.as_dict`` wrote.

    Parameters
    ----------
    fields : dict

    Returns
    -------
    Codec

    Raises
    ------
    TypeError, ValueError
        It describes no codec.
    ImportError
        It is a tokenizer's, and the extra ``tokens`` is not installed.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"codec: received {type(fields).__name__}, expected a dict")
    kind = checks.choice("codec: kind", fields.get("kind"), KINDS)
    given = {name: value for name, value in fields.items() if name != "kind"}
    codec = _CODECS[kind]
    assert dataclasses.is_dataclass(codec)
    expected = [field.name for field in dataclasses.fields(codec)]
    if sorted(given) != sorted(expected):
        raise ValueError(
            f"codec: {kind} has the fields {', '.join(given) or 'none'}, expected "
            f"{', '.join(expected) or 'none'}"
        )
    try:
        return codec(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"codec: {error}") from error


def first_line(error: Exception) -> str:
    """Take the first line of an error's message, or the error's type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _texts(tokens: Array, text: Callable[[Array], str]) -> Any:
    """Make a string of every row, in lists nested like the axes before the last."""
    return text(tokens) if tokens.ndim == 1 else [_texts(part, text) for part in tokens]


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _check_text(argument: str, value: Any) -> None:
    """Raise unless ``value`` is a string without halves of surrogate pairs."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}: received {type(value).__name__}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{argument}: half a surrogate pair at {error.start}, expected Unicode text"
        ) from error


def _start(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:40] + "…", ensure_ascii=False)
