"""What `marref sample` is told: text with blanks, a picture with a hole, ids with gaps."""

import re
from pathlib import Path

import numpy as np

from marref import checks, files
from marref.data import arrays, images
from marref.data.codecs import ID_OF_MASK, Bytes, Characters, Codec, Ids, Pixels, Tokenizer
from marref.trees import Array


def read(prompt: str, codec: Codec, length: int) -> Array:
    """Make the tokens from which decoding starts, [MASK] (0) where one is wanted.

    Parameters
    ----------
    prompt : str
        For a run on text the text itself, with a ``_`` for each token; on pictures the name of a
        PNG, whose transparent pixels are wanted; on ids that of an ``.npy``, -1 where one is.
    codec : Codec
        Of the run.
    length : int
        Of the run's sequences.

    Returns
    -------
    int64 array [at most length]

    Raises
    ------
    OSError, TypeError, ValueError, ImportError
        The prompt is no good, or a file cannot be read.
    """
    try:
        if isinstance(codec, Bytes | Characters | Tokenizer):
            tokens = of_text(prompt, codec)
        elif isinstance(codec, Pixels):
            tokens = images.with_hole(_named(prompt, ".png", codec), codec)
        else:
            assert isinstance(codec, Ids)
            tokens = _of_ids(_named(prompt, ".npy", codec), codec)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--prompt: {error}") from error
    if len(tokens) > length:
        raise ValueError(f"--prompt: has {len(tokens)} tokens, expected at most {length}")
    return tokens


def of_text(prompt: str, codec: Bytes | Characters | Tokenizer) -> Array:
    r"""Make tokens of a text in which every ``_`` is a token to fill in, and ``\_`` a ``_``."""
    parts = []
    for part in re.findall(r"(?:\\_|[^_])+|_", prompt):
        if part == "_":
            parts.append(np.zeros(1, np.int64))
        else:
            parts.append(codec.encode(part.replace(r"\_", "_")))
    tokens = np.concatenate(parts) if parts else np.ones(0, np.int64)
    if not (tokens == 0).any():
        raise ValueError("has no _, expected one for each token to fill in")
    return tokens


def _of_ids(path: Path, codec: Ids) -> Array:
    """Read raw ids [length] and -1, which become tokens and 0."""
    ids, _ = arrays.read(files.regular(path))
    if ids.ndim != 1:
        raise ValueError(f"{path}: shape {list(ids.shape)}, expected [length]")
    wanted = ids == ID_OF_MASK
    if not wanted.any():
        raise ValueError(f"{path}: holds no {ID_OF_MASK}, expected one for each id to fill in")
    known = checks.token_ids(str(path), np.where(wanted, 0, ids), codec.num_ids, batched=False)
    return np.where(wanted, 0, known.astype(np.int64) + 1)


def _named(prompt: str, suffix: str, codec: Codec) -> Path:
    path = Path(prompt)
    if path.suffix.lower() != suffix:
        raise ValueError(f"received {prompt!r}, expected the name of a {suffix} for {codec.kind}")
    return path
