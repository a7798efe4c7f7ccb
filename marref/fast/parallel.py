"""Threads: each takes a part of the work, with a BLAS that uses one thread beneath it.

NumPy lets go of the interpreter while it computes, so that Python threads do run side by side.
Parts that do not wait for each other keep their pace when another program takes a core; the
threads of a BLAS meet at the end of every matrix product, and lose most of theirs.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from marref import checks

try:
    import threadpoolctl
except ImportError:
    threadpoolctl = None

FEATURES_WORTH_A_THREAD = 2**15
"""The features, batch·length·embed_dim, that pay for a thread; see docs/performance.md."""

_inside = contextvars.ContextVar("inside", default=False)


class Run:
    """``run(function, *arguments)``: the list of the results of ``map(function, *arguments)``.

    Parameters
    ----------
    helpers : sequence of concurrent.futures.ThreadPoolExecutor
        Of one thread each, which takes calls beside the caller's.

    Attributes
    ----------
    num_threads : int
        How many calls may be under way at once, and wait for each other.
    """

    def __init__(self, helpers: Sequence[concurrent.futures.ThreadPoolExecutor] = ()) -> None:
        self.num_threads = 1 + len(helpers)
        self._helpers = helpers

    def __call__(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        """Call the function with each of the arguments; every thread takes one after the other."""
        calls = list(zip(*arguments, strict=True))
        results: list[Any] = [None] * len(calls)
        todo = enumerate(calls)

        def work() -> None:
            for index, call in todo:
                results[index] = function(*call)

        # Each in a copy of the caller's context, where numpy.errstate lives.
        helping = [
            helper.submit(contextvars.copy_context().run, work)
            for helper in self._helpers[: len(calls) - 1]
        ]
        work()
        for future in helping:
            # From within a call here the helper is not free, and there is nothing left to do.
            if not future.cancel():
                future.result()
        return results


@contextlib.contextmanager
def threads(num_threads: int, *, blas_threads: int = 1) -> Iterator[Run]:
    """Start threads beside the caller's, and hold the BLAS to a number until they have ended.

    Parameters
    ----------
    num_threads : int
        With 1 none is started.
    blas_threads : int
        Of each matrix product.

    Yields
    ------
    Run
        ``run(function, *arguments)``: the list of what ``map`` would give.

    Raises
    ------
    TypeError, ValueError
        ``num_threads`` is no integer >= 1.

    Notes
    -----
    The number of threads of the BLAS and the interpreter's switch interval, which is set to 0.1 ms
    for several threads, belong to the whole process: the first of several calls at once sets them,
    the last sets them back.  A call from within one of the threads here starts no others.

    Without threadpoolctl the BLAS keeps its threads, and no others are started; the first call that
    would start some says so.

    Examples
    --------
    >>> with threads(2) as run:
    ...     run(sum, [[1, 2], [3, 4]])
    [3, 7]
    """
    num_threads = checks.integer("num_threads", num_threads, 1)
    if _inside.get() or _without_threadpoolctl(num_threads):
        yield Run()
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_entered())
        stack.enter_context(_blas.entered(blas_threads))
        helpers = []
        if num_threads > 1:
            stack.enter_context(_switches.entered())
            for _ in range(num_threads - 1):
                helpers.append(concurrent.futures.ThreadPoolExecutor(1))
                stack.enter_context(helpers[-1])
                # Its thread starts now, while nobody waits for it.
                helpers[-1].submit(int).result()
        yield Run(helpers)


def choose(num_threads: int | None, work: int, worth: int) -> int:
    """Return the number of threads that is asked for or, with ``None``, that pays.

    Parameters
    ----------
    num_threads : int or None
    work : int
        Of the whole call, in numbers that each of many operations goes over.
    worth : int
        The work that pays for a thread.

    Returns
    -------
    int
        With ``None``: a thread for every ``worth`` of the work, at least one, and no more than
        cores.
    """
    if num_threads is not None:
        return checks.integer("num_threads", num_threads, 1)
    pays = max(1, min(num_cores(), work // worth))
    return 1 if _without_threadpoolctl(pays) else pays


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split(length: int, num_parts: int) -> list[slice]:
    """Cut range(length) into contiguous slices of almost equal size, none of them empty.

    Parameters
    ----------
    length : int
    num_parts : int
        There are fewer slices if the length is less.

    Examples
    --------
    >>> split(5, 2)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    num_parts = max(1, min(length, num_parts))
    size, rest = divmod(length, num_parts)
    ends = [size * part + min(part, rest) for part in range(num_parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@contextlib.contextmanager
def _entered() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


class _Shared:
    """A setting of the process: entered by the first of several at once, left by the last."""

    def __init__(self, setting: Callable[..., contextlib.AbstractContextManager[object]]) -> None:
        self._setting = setting
        self._renew()
        if hasattr(os, "register_at_fork"):
            # The threads that would leave it do not exist in a child.
            os.register_at_fork(after_in_child=self._forget)

    @contextlib.contextmanager
    def entered(self, *args: Any) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._stack.enter_context(self._setting(*args))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._stack.close()

    def _renew(self) -> None:
        self._lock, self._users, self._stack = threading.Lock(), 0, contextlib.ExitStack()

    def _forget(self) -> None:
        self._stack.close()
        self._renew()


@functools.cache
def _controller() -> Any:
    return threadpoolctl.ThreadpoolController()


def _blas_limit(num_threads: int) -> Any:
    return _controller().limit(limits=num_threads, user_api="blas")


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


_blas, _switches = _Shared(_blas_limit), _Shared(_quick_switches)

_said = False


def _without_threadpoolctl(num_threads: int) -> bool:
    """Tell whether threadpoolctl is missing; say so once, where several threads are meant."""
    global _said
    if threadpoolctl is None and num_threads > 1 and not _said:
        _said = True
        warnings.warn(
            'several threads need threadpoolctl, pip install "marref[fast]"; going on with one',
            RuntimeWarning,
            stacklevel=4,
        )
    return threadpoolctl is None
