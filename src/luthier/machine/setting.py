"""What is set for the process: the cap on oneDNN's instructions where AMX is not known to be sound, how long threads wait awake, and that freed memory stays.

oneDNN reads its variable once, when torch first computes with it, and OpenMP reads its own when torch is imported; what is set later changes nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

from luthier.machine.answer import CAPPED, UNCAPPED, known
from luthier.machine.resources import cpus

CAP_NAMES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # oneDNN reads the first of these that is set
CAP = "AVX512_CORE_BF16"  # the last level below AMX
MARK = "LUTHIER_CAPPED"  # tells child processes that the cap is luthier's and not the user's

# Threads that wait for each other keep the processor for 5 ms, by which time whoever else computes here has taken the other one's place.
# Where only some tenths of a millisecond lie between two kernels, a fiftieth of that is about as good alone and twice as fast in company.
SPINS = ("GOMP_SPINCOUNT", "6000")
THREADS = "OMP_NUM_THREADS"
MARK_THREADS = "LUTHIER_SHARES"  # which of these luthier has set
WAITS = ("OMP_WAIT_POLICY", SPINS[0])  # by which a user may have chosen otherwise

# The C library hands back what is freed at the end of the heap, and fetches it again page by page in the next step: thousands of page faults.
TRIM, MMAP = -1, -3  # its numbers for these two: from what size on the free end is handed back, and from what size on memory is mapped for itself
LARGEST_MMAP = 1 << 25  # that it allows: larger tensors come and go as they did
MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # by which a user may have chosen otherwise

_earlier: set[str] = set()  # settings that torch may already have read when luthier changed them


def cap() -> None:
    """Hold oneDNN below AMX unless AMX is known to be sound here, or the user chose. Costs a file read; imports neither torch nor NumPy."""
    if given() is not None:
        return
    answer = known()
    if answer is None or not answer.needs_no_cap:
        _change({CAP_NAMES[0]: CAP, MARK: "1"})
    else:
        lift()


def share() -> None:
    """Let threads sleep soon when they wait, and be no more than the processors that a container may use, unless the user chose."""
    chosen = {}
    if not any(name in os.environ for name in WAITS):
        chosen.update([SPINS])
    visible, allowed = os.cpu_count() or 1, cpus()
    if allowed < visible and THREADS not in os.environ:  # torch counts what it sees
        chosen[THREADS] = str(max(1, int(allowed)))
    if chosen:
        os.environ.update(chosen)
        os.environ[MARK_THREADS] = ",".join([*filter(None, [os.environ.get(MARK_THREADS)]), *map("=".join, chosen.items())])


@functools.cache
def keep_memory() -> None:
    """Let this process keep the small memory that it frees, unless the user chose. Where the C library is not GNU's nothing is done."""
    if sys.platform == "linux" and not any(name in os.environ for name in MALLOC) and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(TRIM, 2**31 - 1)
        library.mallopt(MMAP, LARGEST_MMAP)


def lift() -> None:
    """Take back luthier's cap; a user's stays."""
    if ours():
        _change({})


def ours() -> bool:
    """Whether the cap is luthier's: of this process, or of the one that started it."""
    return MARK in os.environ and os.environ.get(CAP_NAMES[0]) == CAP


def given() -> tuple[str, str] | None:
    """The variable that the user set, and its value."""
    return None if ours() else next(((name, os.environ[name]) for name in CAP_NAMES if name in os.environ), None)


def in_force() -> list[str]:
    """The settings of which one is in force here: `uncapped`, `capped`, or what else the user gave. More than one where torch may have computed before a change."""
    return sorted({*_earlier, _setting()})


def pristine_environment() -> dict[str, str]:
    """The environment without what luthier has set in it: for programs that are measured beside it."""
    set_here = [MARK, MARK_THREADS, *([CAP_NAMES[0]] if ours() else [])]
    shares = os.environ.get(MARK_THREADS, "").split(",")
    return {name: value for name, value in os.environ.items() if name not in set_here and f"{name}={value}" not in shares}


def _change(values: dict[str, str]) -> None:
    before = _setting()
    for name in (CAP_NAMES[0], MARK):
        os.environ.pop(name, None)
    os.environ.update(values)
    if "torch" in sys.modules and _setting() != before:
        _earlier.add(before)


def _setting() -> str:
    found = CAP if ours() else (given() or ("", ""))[1].upper()
    return {"": UNCAPPED, "ALL": UNCAPPED, "DEFAULT": UNCAPPED, CAP: CAPPED}.get(found, found)
