"""The process, set up for a loop that runs for weeks: interpreter lock, garbage collector, memory allocator."""

from __future__ import annotations

import ctypes
import gc
import sys

SCORING = (20_000, 20, 20)  # of the garbage collector: a batch makes thousands of objects, and none is in a cycle
JOINING = (100_000, 50, 100)  # millions without a cycle: walking them took a quarter of the trainer's time
SWITCH_S = 1e-4  # the compute thread takes the interpreter lock around each batch: it must not wait 5 ms for it
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_BYTES = 32 << 20  # the most that glibc allows
TRIM_BYTES = 256 << 20


def settle(thresholds: tuple[int, int, int] = SCORING) -> None:
    """Call once everything is built, before the loop. ``thresholds``: see `gc.set_threshold`."""
    sys.setswitchinterval(SWITCH_S)
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # what is here now stays: a full collection would walk all of torch, in the middle of a batch
    gc.set_threshold(*thresholds)


def keep_freed_memory() -> bool:
    """Ask glibc to keep what a batch frees for the next one, where it would go back and be faulted in again.

    False where this is not glibc. Arrays of up to `MMAP_BYTES` then come from the heap, which only shrinks at its top:
    the process stays about as large as it once was.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES))
