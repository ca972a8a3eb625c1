"""Memory, processors and disk that this process may use, the limits of its container included; and their one-line description."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from luthier.machine.answer import cpu

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 of control groups writes "no limit" as a huge number


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int


def memory() -> Memory:
    """What the system has, or what the container allows where that is less. Pages of files that can be dropped count as available."""
    total, available = _system_memory()
    for limit, used in _memory_limits():
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Memory(total, available)


def resident() -> int:
    """Bytes of memory that this process holds."""
    import psutil

    return psutil.Process().memory_info().rss


def trim() -> None:
    """Hand freed memory back to the system. The C library keeps it, in holes too small for what comes next where sizes change from batch to batch."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries than GNU's do not know it
        ctypes.CDLL(None).malloc_trim(0)


def cpus() -> float:
    """Processors this process may use: its affinity, or the container's quota where that is less."""
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(visible), *_cpu_quotas()])


def free_disk(path: Path) -> int:
    """Bytes free where `path` will be."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def describe(device: str = "cpu") -> str:
    """One line for records."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return f"{cpu().get('model name', 'unnamed processor')}, {cpus():g} cores, {memory().total / 1e9:.0f} GB"


def _system_memory() -> tuple[int, int]:
    try:
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in (PROC / "meminfo").read_text(encoding="utf-8").splitlines()}
        return fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        import psutil

        found = psutil.virtual_memory()
        return found.total, found.available


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of each control group above this process."""
    found = []
    for folder in _groups("memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < UNLIMITED:
            found.append((int(limit), int(used) - _droppable(folder)))
    return found


def _droppable(folder: Path) -> int:
    """Bytes of the page cache that nobody used of late."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)
    except (OSError, ValueError):
        return 0


def _cpu_quotas() -> list[float]:
    found = []
    for folder in _groups("cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        with contextlib.suppress(OSError, ValueError):  # version 1, or the word "max"
            quota, period = map(float, (folder / "cpu.max").read_text(encoding="utf-8").split())
        if quota and period and quota > 0:
            found.append(quota / period)
    return found


def _groups(controller: str) -> list[Path]:
    """The folders of this process's control group and of those above it: version 2 (`0::/path`) and version 1 (`4:memory:/path`)."""
    try:
        lines = [line.split(":", 2) for line in (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    roots = {CGROUPS: "/", CGROUPS / controller: "/"}  # in a container the path may be the host's; the roots are always looked at
    for _, controllers, path in lines:
        if not controllers:
            roots[CGROUPS] = path
        elif controller in controllers.split(","):
            roots[CGROUPS / controller] = path
    folders = []
    for root, path in roots.items():
        place = root / path.strip("/")
        folders += [place, *[p for p in place.parents if p == root or root in p.parents]]
    return list(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def _number(*files: Path) -> float | None:
    """The content of the first file that holds a number."""
    for file in files:
        try:
            return float(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None
