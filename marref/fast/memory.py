"""The memory of arrays, kept by the process for the next array."""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_INT = 2**31 - 1


_decided = False


def keep_freed(keep: bool = True) -> bool:
    """Let the C library keep the memory of freed arrays, for the rest of the process.

    glibc returns every large array to the kernel when it is freed, and the kernel clears every
    page of the next one when it is first written to: a third of the time of a training step.
    After this call freed memory is kept and used again (``mallopt(3)``: no ``mmap`` for single
    arrays below 1 GiB, nothing trimmed, one arena for all threads).  The process does not shrink
    any more; its peak is what it would have been.

    The first call of a function of `marref.fast` does it, unless it has been decided here before.

    Parameters
    ----------
    keep : bool
        False leaves the C library as it is; it cannot be undone.

    Returns
    -------
    bool
        Whether this call made the process keep it.  False where there is no ``mallopt`` (macOS,
        Windows, musl).
    """
    global _decided
    _decided = True
    if not keep:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(
        mallopt(parameter, value)
        for parameter, value in (
            (_M_MMAP_THRESHOLD, 2**30),
            (_M_TRIM_THRESHOLD, _LARGEST_INT),
            (_M_ARENA_MAX, 1),
        )
    )


def keep_by_default() -> None:
    """Call `keep_freed`, unless that has been decided."""
    if not _decided:
        keep_freed()
