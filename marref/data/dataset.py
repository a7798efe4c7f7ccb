"""Sequences to train on, read where they lie."""

import dataclasses

import numpy as np
import numpy.typing as npt

from marref import chance, checks
from marref.data import labelling
from marref.data.codecs import Codec
from marref.data.labelling import Classes
from marref.trees import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Sequences of one length, or one stream whose windows are the sequences.

    Nothing is read, copied or checked before `rows` needs it, so that ``tokens`` may be a memory
    map of a file larger than memory.

    Parameters
    ----------
    tokens : integer array [n, length] or [total]
        Raw ids, in [0, codec.num_ids).
    codec : Codec
        What they mean.
    length : int
        Of the sequences.  A stream of ``total`` tokens holds total - length + 1 windows, one at
        every offset, and needs two at least.
    labels : int64 array, optional
        The class of every sequence, from 0 on; not of a stream.
    class_names : tuple of str, optional
        Of the classes, by number, where they have names.
    selection : int64 array, optional
        Which rows of ``tokens`` are the sequences; all of them without it.  What `split` returns
        shares its tokens.

    Raises
    ------
    TypeError, ValueError
        The parts do not fit each other.
    """

    tokens: Array
    codec: Codec
    length: int
    labels: Array | None = None
    class_names: tuple[str, ...] | None = None
    selection: Array | None = None

    def __post_init__(self) -> None:
        checks.integer("length", self.length, 1)
        checks.array("tokens", self.tokens)
        if self.tokens.dtype.kind not in "iu":
            raise TypeError(f"tokens: dtype {self.tokens.dtype}, expected integers")
        shape = list(self.tokens.shape)
        if self.is_stream:
            if len(self.tokens) <= self.length:
                raise ValueError(
                    f"tokens: a stream of {len(self.tokens)}, expected at least "
                    f"{self.length + 1}, length + 1"
                )
            if self.labels is not None or self.selection is not None:
                raise ValueError("labels: received for a stream, which has no sequences to label")
        elif self.tokens.ndim != 2 or shape[0] < 1 or shape[1] != self.length:
            raise ValueError(
                f"tokens: shape {shape}, expected [n, {self.length}] with n >= 1, or one stream"
            )
        if self.labels is not None:
            labels = labelling.checked("labels", checks.array("labels", self.labels)).numbers
            checks.shape("labels", labels, (len(self),))
            object.__setattr__(self, "labels", labels)
        if self.class_names is not None and (
            self.labels is None or self.labels.max() >= len(self.class_names)
        ):
            raise ValueError(
                f"class_names: received {len(self.class_names)}, expected labels, "
                "and a name for each of them"
            )

    @property
    def is_stream(self) -> bool:
        """Whether the sequences are windows of one stream."""
        return self.tokens.ndim == 1

    @property
    def vocab_size(self) -> int:
        """Ids of a model's tokens: [MASK] and the raw ids."""
        return self.codec.num_ids + 1

    @property
    def num_classes(self) -> int | None:
        """Classes: as many as names, or up to the largest label; ``None`` without labels."""
        if self.labels is None:
            return None
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def without_labels(self) -> "Dataset":
        """Return the same sequences without classes."""
        return dataclasses.replace(self, labels=None, class_names=None)

    def with_classes(self, classes: Classes) -> "Dataset":
        """Give the classes the numbers that they have in other data, by their names.

        Parameters
        ----------
        classes : Classes
            Of the other data, those that a model was trained on.

        Returns
        -------
        Dataset
            Without labels, if this has none.

        Raises
        ------
        ValueError
            A class is unknown there.
        """
        if self.labels is None:
            return self
        found = np.unique(self.labels)
        names = found if self.class_names is None else np.array(self.class_names)[found]
        try:
            numbers = classes.numbers([str(name) for name in names])
        except ValueError as error:
            raise ValueError(f"labels: {error}") from error
        labels = np.array(numbers)[np.searchsorted(found, self.labels)]
        return dataclasses.replace(self, labels=labels, class_names=classes.names)

    def labels_at(self, index: Array) -> Array | None:
        """Return the labels of sequences; ``None`` where there are none."""
        return None if self.labels is None else self.labels[index]

    def __len__(self) -> int:
        """Count the sequences, or the windows of a stream."""
        if self.selection is not None:
            return len(self.selection)
        return len(self.tokens) - self.length + 1 if self.is_stream else len(self.tokens)

    def rows(self, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Read sequences, or the windows that begin at these offsets of a stream.

        Parameters
        ----------
        index : integer array [k]
            In [0, len(self)).

        Returns
        -------
        int64 array [k, length]
            A model's tokens: raw ids plus 1.

        Raises
        ------
        TypeError, ValueError
            An index is out of range, or an id is none of the codec's.
        """
        index = checks.array("index", index)
        if index.dtype.kind not in "iu" or index.ndim != 1:
            raise TypeError(
                f"index: dtype {index.dtype} and shape {list(index.shape)}, expected integers [k]"
            )
        bad = (index < 0) | (index >= len(self))
        if bad.any():
            raise ValueError(f"index: {index[bad][0]}, expected integers in [0, {len(self) - 1}]")
        if self.is_stream:
            raw = self.tokens[index[:, np.newaxis] + np.arange(self.length)]
        else:
            index = index if self.selection is None else self.selection[index]
            raw = self.tokens[index]
        self._check(raw, index)
        return raw.astype(np.int64) + 1

    def draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Read sequences, or windows of a stream at any offset, drawn with replacement.

        Parameters
        ----------
        rng : numpy.random.Generator
        count : int

        Returns
        -------
        int64 array [count, length]
            As `rows` returns them.
        """
        return self.rows(self.draw_index(rng, count))

    def draw_index(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Draw which sequences `draw` reads: integers [count] in [0, len(self))."""
        checks.generator("rng", rng)
        checks.integer("count", count, 1)
        return rng.integers(len(self), size=count)

    def split(self, fraction: float, seed: int) -> "tuple[Dataset, Dataset]":
        """Hold out a part for validation.

        Parameters
        ----------
        fraction : float
            Of the sequences or of the stream, in (0, 1); rounded to a whole number of sequences
            or tokens.
        seed : int
            Which sequences are held out: the first of a random permutation.  Of a stream it is
            the end, whatever the seed, so that no window of one part lies in the other.

        Returns
        -------
        train, validation : Dataset
            Both share ``tokens`` with the whole; sequences keep their order.

        Raises
        ------
        TypeError, ValueError
            A part would be empty, or shorter than length + 1 tokens of a stream.
        """
        checks.real("fraction", fraction, "(0, 1)")
        checks.integer("seed", seed, 0)
        total = len(self.tokens) if self.is_stream else len(self)
        count = round(total * fraction)
        least = self.length + 1 if self.is_stream else 1
        if min(count, total - count) < least:
            raise ValueError(
                f"fraction: {fraction} of {total} {'tokens' if self.is_stream else 'sequences'} "
                f"leaves {total - count} and {count}, expected at least {least} in each part"
            )
        if self.is_stream:
            return self._stream(slice(total - count)), self._stream(slice(total - count, None))
        order = chance.generator(seed, "split", 0).permutation(total)
        return self._part(np.sort(order[count:])), self._part(np.sort(order[:count]))

    def _stream(self, part: slice) -> "Dataset":
        return dataclasses.replace(self, tokens=self.tokens[part])

    def _part(self, index: npt.NDArray[np.int64]) -> "Dataset":
        return dataclasses.replace(
            self,
            selection=index if self.selection is None else self.selection[index],
            labels=None if self.labels is None else self.labels[index],
        )

    def _check(self, raw: Array, index: Array) -> None:
        """Raise, with the place in ``tokens``, if a raw id is none of the codec's."""
        bad = (raw < 0) | (raw >= self.codec.num_ids)
        if bad.any():
            row, position = (int(place) for place in np.argwhere(bad)[0])
            start = int(index[row])
            place = [start + position] if self.is_stream else [start, position]
            raise ValueError(
                f"tokens: id {raw[row, position]} at {place} is not in [0, {self.codec.num_ids})"
            )
