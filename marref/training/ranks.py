"""Processes that train one model together, over MPI: the same bits for any number of them.

A step's sequences are cut into shards, whose number is an option of the run.  What a shard draws
and computes does not depend on which process does it, and shards are added along one tree,

    sum(first, last) = sum(first, middle) + sum(middle, last),     middle = ⌊(first + last)/2⌋

MPI's own sum would not do: its order is up to the library, the number of processes and the size of
the message.  Each process has some neighbouring shards and adds up the branches that are its own;
of two branches that are not, the process of the right one sends its sum to that of the left one,
who adds it.  The whole goes from the first process to all.  Page: docs/scaling.md.
"""

import contextlib
import functools
import hashlib
import operator
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from marref import trees
from marref.fast import parallel
from marref.trees import Array, Tree

DEFAULT_SHARDS = 8
"""Of a run that MPI starts and that does not say how many."""
REDUCE = ("exact", "fast")

# How MPICH and Intel MPI, Open MPI, MVAPICH and Slurm tell their processes how many they are.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_STOPS = (signal.SIGINT, signal.SIGTERM)
# In seconds: what a launcher has not read when all are ended is lost.
_UNTIL_READ = 0.5
# What a user can mend; of anything else the traceback tells more.
_EXPECTED = (
    OSError,
    ValueError,
    TypeError,
    ImportError,
    MemoryError,
    FloatingPointError,
    RuntimeError,
    KeyboardInterrupt,
)


class Share(NamedTuple):
    """What a shard adds with a weight: its losses and gradients, which are means."""

    weight: float
    losses: Sequence[float]
    grads: Tree


class Ranks:
    """The processes that train together, and which of them this is.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        ``None``: this process alone.

    Attributes
    ----------
    number, count : int
        The rank of this process, from 0, and how many there are.
    """

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.number: int = 0 if comm is None else comm.rank
        self.count: int = 1 if comm is None else comm.size
        self._is_stopping = False

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.number == 0

    @property
    def acts_with_all(self) -> bool:
        """Whether all processes stop where this one does."""
        return self.count == 1 or self._is_stopping

    def threads(self, num_threads: int | None, features: int) -> int:
        """Choose how many threads this process uses: one beside others, unless it is told."""
        if num_threads is None and self.count > 1:
            return 1
        return parallel.choose(num_threads, features, parallel.FEATURES_WORTH_A_THREAD)

    def mean(
        self,
        of_shard: Callable[[int], Share],
        num_shards: int,
        like: Tree,
        *,
        num_threads: int = 1,
        reduce: str = "exact",
    ) -> tuple[list[float], Tree]:
        """Compute the shards, add them up, and divide by the sum of their weights once.

        Parameters
        ----------
        of_shard : callable
            Takes the number of a shard; the same function in all processes.
        num_shards : int
            At least ``count``.
        like : dict
            A tree like the gradients.
        num_threads : int
            How many shards this process computes at a time; nothing depends on it.
        reduce : {"exact", "fast"}
            Along the tree, or by MPI's own sum, whose last digits depend on ``count``.

        Returns
        -------
        losses : list of float
        grads : dict
            Views of one array.
        """
        leaves = trees.flatten(like)
        sums: dict[int, list[float]] = {}

        def vector_of(shard: int) -> Array:
            weight, losses, grads = of_shard(shard)
            sums[shard] = [weight, *(weight * loss for loss in losses)]
            flat = trees.flatten(grads)
            vector = np.concatenate([flat[name].ravel() for name in leaves])
            vector *= weight
            return vector

        owners = self._owners(num_shards)
        with parallel.threads(num_threads) as run:
            compute = functools.partial(run, vector_of)
            own = {
                branch: _sum_of_branch(compute, *branch, run.num_threads)
                for branch in _branches(owners, 0, num_shards)
                if owners[branch[0]] == self.number
            }
        if reduce == "fast":
            total = self._all_added(functools.reduce(operator.iadd, own.values()))
        else:
            total = self._total(own, owners)
        rows = np.zeros((num_shards, len(sums[min(sums)])))
        rows[list(sums)] = list(sums.values())
        # All processes but one add zeros to a row: exact, whatever the order.
        weight, *losses = self._all_added(rows).sum(axis=0).tolist()
        total /= weight
        return [loss / weight for loss in losses], _cut(total, leaves)

    def told(self, value: float) -> float:
        """Return what the first process was given, in all of them."""
        message = np.array([value], np.float64)
        if self._comm is not None:
            self._comm.Bcast(message, 0)
        return float(message[0])

    def copy(self, arrays: Any) -> None:
        """Write the first process's arrays, of a tree, over those of the others."""
        if self._comm is not None:
            for _, leaf in _sorted(arrays):
                self._comm.Bcast(leaf, 0)

    def agreed(self, received: Sequence[int]) -> list[int]:
        """Return which signals to stop any of the processes has received."""
        flags = self._all_added(np.array([stop in received for stop in _STOPS], np.int64))
        self._is_stopping = bool(flags.any())
        return [stop for stop, flag in zip(_STOPS, flags, strict=True) if flag]

    def wait(self) -> None:
        """Wait until all have come this far."""
        self._all_added(np.zeros(1))

    def check_equal(self, what: str, arrays: Any) -> None:
        """Raise RuntimeError unless all processes have the same bits in the arrays of a tree."""
        if self._comm is None:
            return
        digest = hashlib.sha256()
        for _, leaf in _sorted(arrays):
            digest.update(leaf.tobytes())
        mine = np.frombuffer(digest.digest(), np.uint8)
        found = np.empty((self.count, len(mine)), np.uint8)
        self._comm.Allgather(mine, found)
        others = np.flatnonzero((found != found[0]).any(axis=1))
        if len(others):
            raise RuntimeError(
                f"{what}: rank {', '.join(map(str, others))} has other bits than rank 0, expected "
                "the same: are all machines of one kind, with the same versions of NumPy and SciPy?"
            )

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """End all processes where this one alone fails: the others would wait for it for ever."""
        try:
            yield
        except BaseException as error:
            if self.acts_with_all:
                raise
            what = str(error) or type(error).__name__
            print(f"marref: rank {self.number} of {self.count}: {what}", file=sys.stderr)
            if not isinstance(error, _EXPECTED):
                traceback.print_exc()
            sys.stderr.flush()
            time.sleep(_UNTIL_READ)
            self._comm.Abort(1 if isinstance(error, FloatingPointError) else 2)

    def warn_if_crowded(self, num_threads: int) -> None:
        """Warn where the processes of this machine have more threads than it has cores."""
        if self._comm is None:
            return
        from mpi4py import MPI

        here = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        cores = os.cpu_count() or 1
        if here.rank == 0 and here.size * num_threads > cores:
            warnings.warn(
                f"{here.size} processes of {num_threads} threads on {cores} cores: they wait for "
                "each other",
                RuntimeWarning,
                stacklevel=2,
            )

    def _owners(self, num_shards: int) -> list[int]:
        """Say which process computes each shard."""
        parts = parallel.split(num_shards, self.count)
        return [rank for rank, part in enumerate(parts) for _ in range(part.start, part.stop)]

    def _all_added(self, mine: Array) -> Array:
        """Add arrays of all processes, in an order that is MPI's."""
        if self._comm is None:
            return mine
        total = np.empty_like(mine)
        self._comm.Allreduce(mine, total)
        return total

    def _total(self, own: dict[tuple[int, int], Array], owners: list[int]) -> Array:
        """Add up the tree, each sum where its left branch is, and hand the whole to all."""
        buffer = np.empty_like(next(iter(own.values())))

        def total(first: int, last: int) -> Array | None:
            if owners[first] == owners[last - 1]:
                return own.pop((first, last), None)
            middle = (first + last) // 2
            left, right = total(first, middle), total(middle, last)
            here, there = owners[first], owners[middle]
            if here != there and self.number == here:
                self._comm.Recv(buffer, there)
                right = buffer
            elif here != there and right is not None:
                self._comm.Send(right, here)
                return None
            if left is not None:
                left += right
            return left

        whole = total(0, len(owners))
        whole = buffer if whole is None else whole
        if self._comm is not None:
            self._comm.Bcast(whole, 0)
        return whole


ALONE = Ranks()


@functools.cache
def world() -> Ranks:
    """Return the processes that MPI has started with this one, or this process alone.

    Raises
    ------
    ImportError
        There are several, and mpi4py is missing.
    RuntimeError
        mpi4py does not see them, being built for another MPI than the launcher's.
    """
    sizes = [int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdecimal()]
    if not sizes:
        return ALONE
    try:
        from mpi4py import MPI
    except ImportError as error:
        if max(sizes) == 1:
            return ALONE
        raise ImportError('several processes need mpi4py, pip install "marref[mpi]"') from error
    if MPI.COMM_WORLD.size == 1 < max(sizes):
        raise RuntimeError(
            f"mpi4py sees one process of {max(sizes)}, expected all: is it built for the MPI that "
            "has started them?"
        )
    return Ranks(MPI.COMM_WORLD)


def _sorted(arrays: Any) -> list[tuple[str, Array]]:
    """Name the leaves in one order for all processes, whatever each has read them from."""
    return sorted(trees.flatten(arrays).items())


def _branches(owners: list[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the largest branches of the tree that one process has, from the left."""
    if owners[first] == owners[last - 1]:
        yield first, last
        return
    middle = (first + last) // 2
    yield from _branches(owners, first, middle)
    yield from _branches(owners, middle, last)


def _sum_of_branch(
    compute: Callable[[range], list[Array]], first: int, last: int, at_once: int
) -> Array:
    """Compute the shards of a branch, a few at a time, and add them along the tree."""
    if last - first <= at_once:
        return _sum_along_tree(compute(range(first, last)))
    middle = (first + last) // 2
    left = _sum_of_branch(compute, first, middle, at_once)
    left += _sum_of_branch(compute, middle, last, at_once)
    return left


def _sum_along_tree(vectors: list[Array]) -> Array:
    """Add arrays, over the first of them."""
    if len(vectors) > 1:
        middle = len(vectors) // 2
        left = _sum_along_tree(vectors[:middle])
        left += _sum_along_tree(vectors[middle:])
    return vectors[0]


def _cut(vector: Array, leaves: dict[str, Array]) -> Tree:
    """Undo the concatenation of leaves."""
    ends = np.cumsum([leaf.size for leaf in leaves.values()])[:-1]
    parts = np.split(vector, ends)
    return trees.unflatten(
        {
            name: part.reshape(leaf.shape)
            for (name, leaf), part in zip(leaves.items(), parts, strict=True)
        }
    )
