"""Tokens from what people have: text, arrays of ids, images, and the shipped digits.

`load` makes a `Dataset` of a source: raw ids 0, 1, 2, …, where they lie, and a codec that says
what they mean.  A model's token is the raw id plus 1, since id 0 is [MASK].  Page: docs/data.md.
"""

from marref.data.codecs import (
    Bytes,
    Characters,
    Codec,
    Ids,
    Pixels,
    Tokenizer,
    codec_from_dict,
)
from marref.data.dataset import Dataset
from marref.data.labelling import Classes
from marref.data.loading import load
from marref.data.shipped import DIGITS_SHAPE, DIGITS_VOCAB_SIZE, digit_labels, digits

__all__ = [
    "DIGITS_SHAPE",
    "DIGITS_VOCAB_SIZE",
    "Bytes",
    "Characters",
    "Classes",
    "Codec",
    "Dataset",
    "Ids",
    "Pixels",
    "Tokenizer",
    "codec_from_dict",
    "digit_labels",
    "digits",
    "load",
]
