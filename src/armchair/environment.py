"""What the libraries below PyTorch read from the environment when they are first used, and where its memory comes from.
Imports nothing of theirs.

Only a process of our own is set up, a command or a part of a benchmark, never one that imports armchair; and what its
user has set already stays.
"""

import ctypes
import os
from collections.abc import MutableMapping

FEW_ROWS = 8
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's numbers, malloc.h


def for_drawing(rows: int, weights: str | None, environment: MutableMapping[str, str] | None = None) -> None:
    """Of few rows that are drawn together, keep a processor's AMX tiles out of it. weights: None is a machine's own.

    oneDNN takes them for products of whole numbers wherever there are any, and a tile that is filled by one row in
    sixteen only costs the time of setting it up: on an Intel Xeon one picture took 1.4 times as long (docs/speed.md).
    The sums are whole numbers either way, and the same; those of `bf16` are not, and a candidate's picture would depend
    on how many there are, so nothing is set for it.
    """
    if rows <= FEW_ROWS and weights != "bf16":
        _set("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", environment)


def for_serving(environment: MutableMapping[str, str] | None = None) -> None:
    """Threads that wait shall not burn what others could use."""
    _set("OMP_WAIT_POLICY", "passive", environment)


def for_training() -> None:
    """Keep memory that is freed, where the C library is glibc: each update asks for the same large blocks again.

    As it comes, malloc gives such blocks back and has the system clear new ones, page by page. The process stays as
    large as it once was.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        mallopt(option, value)


def _set(name: str, value: str, environment: MutableMapping[str, str] | None) -> None:
    (os.environ if environment is None else environment).setdefault(name, value)
