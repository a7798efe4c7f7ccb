"""The live decoder: a page that runs a model in the browser, in one file that needs nothing else.

`write` puts a model's parameters, in float32, and what its token ids mean into
``page/decode.html``, together with the scripts and the style beside it.  Page: docs/watch.md.
"""

import base64
import json
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import marref
from marref import data, files, trees
from marref.data.codecs import Codec, Ids, Pixels, Tokenizer
from marref.model import MAR, check_model
from marref.training import models, runs
from marref.training.checkpoints import discrete
from marref.trees import Array, Tree

PAGE = Path(__file__).parent / "page"
SMALL = 2_000_000
"""Bytes of a page up to which a step should take less than a tenth of a second."""

_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')
_MODEL = '<script type="application/json" id="model"></script>'


class Watched(NamedTuple):
    """What a page shows.

    Parameters
    ----------
    title : str
        Of what the model is.
    model : MAR
    params : dict
    codec : Codec
        What its token ids mean.
    length : int
        Of a sequence.
    classes : tuple of str
        The names of the classes; empty where there are none.
    examples : mapping of str to sequence of int
        Tokens to start from, by what they are called.
    ink : bool
        Whether the highest level of a grey picture is drawn black, as ink is, and not white.
    """

    title: str
    model: MAR
    params: Tree
    codec: Codec
    length: int
    classes: tuple[str, ...] = ()
    examples: Mapping[str, Sequence[int]] = types.MappingProxyType({})
    ink: bool = False


def of_path(path: str | os.PathLike[str]) -> Watched:
    """Read what is to be watched: a run's best checkpoint, or what `marref.save_model` wrote.

    Parameters
    ----------
    path : path
        The folder of a run, or an ``.npz`` file, whose token ids mean nothing but numbers.

    Raises
    ------
    OSError, TypeError, ValueError, ImportError
        There is no discrete model, or it cannot be read.
    """
    path = Path(path)
    if path.is_file():
        model, params = models.load_model(path)
        codec: Codec = Ids(model.vocab_size - 1)
        classes = tuple(map(str, range(model.num_classes or 0)))
        return Watched(path.name, model, params, codec, model.seq_len, classes)
    checkpoint = runs.best(path)
    _, model = discrete(checkpoint, "watch")
    settings = runs.read_settings(path)
    of_data = runs.classes_of(settings)
    numbers = tuple(map(str, range(model.num_classes or 0)))
    return Watched(
        title=f"{path.resolve().name}, step {checkpoint.step:,}",
        model=model,
        params=checkpoint.state.averaged,
        codec=data.codec_from_dict(checkpoint.codec),
        length=settings["data"]["length"],
        classes=(of_data.names if of_data is not None else None) or numbers,
    )


def write(path: str | os.PathLike[str], watched: Watched) -> int:
    """Write the page, whole or not at all.

    Parameters
    ----------
    path : path
    watched : Watched

    Returns
    -------
    int
        The bytes of the file.

    Raises
    ------
    TypeError, ValueError
        The parameters do not fit the model, or the codec does not.
    OSError
        The file cannot be written.
    """
    text = page(watched).encode()
    with files.replacing(path) as temporary:
        temporary.write_bytes(text)
    return len(text)


def page(watched: Watched) -> str:
    """Make the text of the page."""
    # No text of a data set may end the script that it stands in.
    inner = json.dumps(told(watched)).replace("<", "\\u003c")
    html = _source("decode.html")
    html = _STYLE.sub(lambda found: f"<style>\n{_source(found[1])}</style>", html)
    html = _SCRIPT.sub(lambda found: f"<script>\n{_source(found[1])}</script>", html)
    return html.replace(_MODEL, _MODEL.replace("><", f">{inner}<"))


def told(watched: Watched) -> dict[str, Any]:
    """Tell the page what it shows, in what JSON can hold.

    Raises
    ------
    TypeError, ValueError
        The parameters do not fit the model, or the codec does not.
    """
    check_model(watched.model)
    if watched.codec.num_ids + 1 != watched.model.vocab_size:
        raise ValueError(
            f"codec: {watched.codec.kind} has {watched.codec.num_ids} ids, expected "
            f"{watched.model.vocab_size - 1} as the model"
        )
    return {
        "title": watched.title,
        "marref": marref.__version__,
        **packed(watched.model, watched.params),
        "length": watched.length,
        "codec": _codec(watched.codec, watched.ink),
        "classes": list(watched.classes),
        "examples": {name: list(map(int, row)) for name, row in watched.examples.items()},
    }


def packed(model: MAR, params: Tree) -> dict[str, Any]:
    """Tell a model as JSON can: ``config``, ``shapes`` and ``weights``, float32 in base64.

    Parameters
    ----------
    model : MAR
    params : dict

    Returns
    -------
    dict
        The numbers lie one parameter after the other, in the order of ``shapes``, little-endian.
    """
    trees.check_like("params", params, model.parameter_shapes)
    leaves = trees.flatten(params)
    shapes = {name: list(leaf.shape) for name, leaf in leaves.items()}
    numbers = b"".join(np.asarray(leaf, "<f4").tobytes() for leaf in leaves.values())
    weights = base64.b64encode(numbers).decode()
    return {"config": model.as_dict(), "shapes": shapes, "weights": weights}


def _codec(codec: Codec, ink: bool) -> dict[str, Any]:
    """Tell what the page needs of a codec: how each token is shown, and the shape of a picture."""
    if isinstance(codec, Pixels):
        greys = (255 - codec.values if ink else codec.values).tolist()
        size = {"height": codec.height, "width": codec.width, "channels": codec.channels}
        return {"kind": codec.kind, **size, "greys": greys}
    if isinstance(codec, Tokenizer):
        tokens: Array = np.arange(1, codec.num_ids + 1)[:, np.newaxis]
        return {"kind": codec.kind, "pieces": codec.decode(tokens)}
    return codec.as_dict()


def _source(name: str) -> str:
    return (PAGE / name).read_text("utf-8")
