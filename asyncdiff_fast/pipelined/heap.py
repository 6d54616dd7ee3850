"""What is freed on the CPU while weights are read goes back to the system.

torch asks the C library for aligned blocks. Where glibc takes large ones from its heap, a freed one has not the few
bytes that alignment needs beside its size, so the next one of that size does not fit: each copy that a first call makes
of a large weight then stays resident, as much as the whole model. Blocks with a mapping of their own do not.
"""

import contextlib
import ctypes
import os

# glibc's names of what is set: when blocks are mapped, when the heap's end goes back.
_TRIM, _MMAP = -1, -3
# Blocks of so many bytes are mapped while weights come; afterwards those that glibc maps in a process that has had
# large blocks: it raises both limits by itself, up to these, but not once they were set.
_LARGE, _MOST = 1 << 17, 32 << 20
# A user's own settings stay.
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextlib.contextmanager
def mapped():
    """Within it large blocks of memory have a mapping each; nothing happens where the C library is not glibc."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or any(name in os.environ for name in _VARIABLES):
        yield
        return
    library.malloc_trim(0)
    library.mallopt(_MMAP, _LARGE)
    try:
        yield
    finally:
        library.mallopt(_TRIM, 2 * _MOST)
        library.mallopt(_MMAP, _MOST)
        library.malloc_trim(0)
