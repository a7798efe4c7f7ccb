"""The memory of arrays: kept by the process for the next array, if the caller asks for it."""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_INT = 2**31 - 1


def keep_freed() -> bool:
    """Let the C library keep the memory of freed arrays, for the rest of the process.

    glibc returns every large array to the kernel when it is freed, and the kernel clears every
    page of the next one when it is first written to: a third of the time of a training step.
    After this call freed memory is kept and used again (``mallopt(3)``: no ``mmap`` for single
    arrays below 1 GiB, nothing trimmed, one arena for all threads).  The process does not shrink
    any more; its peak is what it would have been.

    Returns
    -------
    bool
        False where there is no ``mallopt`` (macOS, Windows, musl) and nothing was done.
    """
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
