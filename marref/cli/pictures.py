"""What tokens stand for, in a terminal."""

import numpy as np

from marref.data.codecs import TEXT_OF_MASK, Codec, Pixels
from marref.trees import Array

# From dark to bright: a bright pixel is drawn with much light on a dark terminal.
_LIGHT = " .:-=+*#%@"


def shown(codec: Codec, tokens: Array) -> str:
    """Write the tokens of one sequence as text, as numbers, or as a picture in characters.

    Parameters
    ----------
    codec : Codec
    tokens : integer array [length]
        A [MASK] is shown as ``_``.

    Returns
    -------
    str
        Without characters that would command a terminal.
    """
    if isinstance(codec, Pixels):
        return _picture(codec, tokens)
    decoded = codec.decode(tokens)
    if isinstance(decoded, str):
        return "".join(
            c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decoded
        )
    return " ".join(TEXT_OF_MASK if id_ < 0 else str(id_) for id_ in decoded.tolist())


def _picture(codec: Pixels, tokens: Array) -> str:
    """Draw an image, two characters to a pixel."""
    shape = (codec.height, codec.width, codec.channels)
    light = codec.decode(tokens).reshape(shape).mean(axis=-1)
    masked = (tokens.reshape(shape) == 0).any(axis=-1)
    places = np.rint(light / 255 * (len(_LIGHT) - 1)).astype(int)
    characters = np.where(masked, TEXT_OF_MASK, np.array(list(_LIGHT))[places])
    return "\n".join("".join(2 * pixel for pixel in row).rstrip() for row in characters.tolist())
