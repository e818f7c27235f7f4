"""Memory between steps: what one step frees stays for the next. Imports little: see `experiments.start`."""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
"""Of mallopt, in glibc's malloc.h."""


def keep() -> bool:
    """Keep what this process frees for itself; True where that can be asked for (glibc).

    glibc gives large buffers back to the system as soon as they are free, and the system fills every page of the next
    ones with zeros (benchmarks/memory.py). For training, with its large steps: one arena is left for all threads, since
    theirs would ask the system again, and small calls wait for each other there. To be called while there is one thread
    only: with the second glibc decides how many arenas there are, for good.
    """
    if not is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # All answer 1 for done. No mapping of its own for any buffer, nothing trimmed, 64 MB more than is asked for.
    return all(
        mallopt(option, value)
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 1 << 26))
    )


def is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # another system, or another libc
        return False
