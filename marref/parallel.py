"""Threads: each takes a share of the work, with a BLAS that uses one thread beneath it.

NumPy lets go of the interpreter while it computes, so that Python threads do run side by side.
Shares that do not wait for each other keep their pace when another program takes a core; the
threads of a BLAS meet at the end of every matrix product, and lose most of theirs.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from marref import checks

try:
    import threadpoolctl
except ImportError:
    threadpoolctl = None

Run = Callable[..., list[Any]]
"""``run(function, *shares)``: the list of the results of ``map(function, *shares)``."""

_process_wide = threading.RLock()


def one_by_one(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """Do as a `Run` does, without threads."""
    return [function(*share) for share in zip(*arguments, strict=True)]


@contextlib.contextmanager
def threads(num_threads: int) -> Iterator[Run]:
    """Start threads beside the caller's, and hold the BLAS to one until they have ended.

    Parameters
    ----------
    num_threads : int
        With 1 nothing is started, and the BLAS keeps its own number of threads.

    Yields
    ------
    callable
        ``run(function, *shares)``: the list of what ``map`` would give.  Every thread, the
        caller's too, takes one share after the other.

    Raises
    ------
    TypeError, ValueError
        ``num_threads`` is no integer >= 1.

    Warns
    -----
    RuntimeWarning
        threadpoolctl is missing: the shares are worked off one after the other.

    Notes
    -----
    The number of threads of the BLAS and the interpreter's switch interval, which is set to 0.1 ms,
    belong to the whole process: calls from several threads of the caller's own wait for each
    other.

    Examples
    --------
    >>> with threads(2) as run:
    ...     run(sum, [[1, 2], [3, 4]])
    [3, 7]
    """
    num_threads = checks.integer("num_threads", num_threads, 1)
    if num_threads > 1 and threadpoolctl is None:
        warnings.warn(
            f'num_threads: {num_threads} threads need threadpoolctl, pip install "marref[fast]"; '
            "going on with one",
            RuntimeWarning,
            stacklevel=4,
        )
    if num_threads == 1 or threadpoolctl is None:
        yield one_by_one
        return

    def run(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        shares = list(zip(*arguments, strict=True))
        results: list[Any] = [None] * len(shares)
        todo = enumerate(shares)

        def work() -> None:
            for index, share in todo:
                results[index] = function(*share)

        # Each in a copy of the caller's context, where numpy.errstate lives.
        helpers = [
            pool.submit(contextvars.copy_context().run, work)
            for _ in range(min(num_threads, len(shares)) - 1)
        ]
        work()
        for helper in helpers:
            helper.result()
        return results

    with (
        _process_wide,
        _controller().limit(limits=1, user_api="blas"),
        _quick_switches(),
        concurrent.futures.ThreadPoolExecutor(num_threads - 1) as pool,
    ):
        yield run


def split(length: int, num_shares: int) -> list[slice]:
    """Cut range(length) into contiguous slices of almost equal size, none of them empty.

    Parameters
    ----------
    length : int
    num_shares : int
        There are fewer slices if the length is less.

    Examples
    --------
    >>> split(5, 2)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    num_shares = max(1, min(length, num_shares))
    size, rest = divmod(length, num_shares)
    ends = [size * share + min(share, rest) for share in range(num_shares + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    """Let no thread wait long for the interpreter.

    One that lets go of it for a short operation often has it again before another wakes up; after
    the switch interval the other is handed it.  The default is 5 ms, or hundreds of operations.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@functools.cache
def _controller() -> Any:
    return threadpoolctl.ThreadpoolController()
