"""Many calls whose results do not depend on each other: samples, evaluations.

They come in order, whoever computes them: this process, others on this machine, those that MPI has
started, or any executor of `concurrent.futures`' kind, such as that of Dask's ``get_executor``.
What each draws must depend on its number alone (`marref.chance`).  Page: docs/scaling.md.
"""

import contextlib
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import TypeVar, cast

from marref.fast import parallel
from marref.training import ranks

_CHUNKS = 256

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], executor: Executor | None = None
) -> Iterator[_Result]:
    """Yield what a function returns of each item, in their order.

    Parameters
    ----------
    function : callable
        One that other processes can be told of: a function of a module, or `functools.partial` of
        one.
    items : iterable
    executor : concurrent.futures.Executor, optional
        Its workers call the function in one thread each.  ``None``: this process, one item after
        the other.

    Examples
    --------
    >>> list(in_order(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    if executor is None:
        return map(function, items)
    items = list(items)
    # The function, and the parameters that it may hold, go along with every chunk.
    chunk = math.ceil(len(items) / _CHUNKS)
    return executor.map(functools.partial(_in_one_thread, function), items, chunksize=chunk)


def _in_one_thread(function: Callable[[_Item], _Result], item: _Item) -> _Result:
    """Call a function beside other processes, which have threads of their own."""
    with parallel.threads(1):
        return function(item)


@contextlib.contextmanager
def workers(num_processes: int | None) -> Iterator[tuple[bool, Executor | None]]:
    """Start what computes: the processes of MPI where it has started several, or so many here.

    Parameters
    ----------
    num_processes : int, optional
        ``None``: no others than this.

    Yields
    ------
    is_first : bool
        False in processes of MPI that work for the first, and have nothing to do on their own.
    executor : Executor or None
        For `in_order`.

    Raises
    ------
    ImportError
        MPI has started several processes, and mpi4py is missing.
    """
    if ranks.world().count > 1:
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor() as of_first:
            # Its methods are those of an Executor, of which it is none.
            yield of_first is not None, cast("Executor | None", of_first)
    elif num_processes is None:
        yield True, None
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=context) as executor:
            yield True, executor
