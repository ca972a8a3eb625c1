"""Limits of containers are found in both versions of control groups, at any height above the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.machine import resources
from luthier.machine.resources import Memory, cpus, free_disk, memory

GB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 64 GB, 40 of them available, and 8 processors."""
    monkeypatch.setattr(resources, "PROC", tmp_path / "proc")
    monkeypatch.setattr(resources, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {40 * GB // 1024} kB")
    return tmp_path


def write(root: Path, name: str, content: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(f"{content}\n")


def test_without_a_container_it_is_what_the_system_has(system: Path) -> None:
    assert memory() == Memory(64 * GB, 40 * GB) and cpus() == 8


def test_version_2_at_any_height(system: Path) -> None:
    write(system, "proc/self/cgroup", "0::/slice/job")
    write(system, "cgroup/slice/job/memory.max", "max")
    write(system, "cgroup/slice/job/memory.current", 1 * GB)
    write(system, "cgroup/slice/memory.max", 8 * GB)
    write(system, "cgroup/slice/memory.current", 3 * GB)
    write(system, "cgroup/slice/memory.stat", f"anon 1\ninactive_file {GB}")
    write(system, "cgroup/slice/cpu.max", "150000 100000")
    assert memory() == Memory(8 * GB, 6 * GB) and cpus() == 1.5


def test_version_1(system: Path) -> None:
    write(system, "proc/self/cgroup", "7:cpu,cpuacct:/job\n4:memory:/job\n0::/")
    write(system, "cgroup/memory/job/memory.limit_in_bytes", 4 * GB)
    write(system, "cgroup/memory/job/memory.usage_in_bytes", 1 * GB)
    write(system, "cgroup/memory/memory.limit_in_bytes", (1 << 63) - 4096)
    write(system, "cgroup/memory/memory.usage_in_bytes", 30 * GB)
    write(system, "cgroup/cpu/job/cpu.cfs_quota_us", 200000)
    write(system, "cgroup/cpu/job/cpu.cfs_period_us", 100000)
    write(system, "cgroup/cpu/cpu.cfs_quota_us", -1)
    write(system, "cgroup/cpu/cpu.cfs_period_us", 100000)
    assert memory() == Memory(4 * GB, 3 * GB) and cpus() == 2


@pytest.mark.parametrize("path", ["0::/a/path/of/the/host", "0::/../../other"])
def test_a_path_that_the_container_does_not_see(system: Path, path: str) -> None:
    write(system, "proc/self/cgroup", path)
    write(system, "cgroup/memory.max", 2 * GB)
    write(system, "cgroup/memory.current", 3 * GB)  # above its limit for a moment
    write(system, "cgroup/cpu.max", "max 100000")
    assert memory() == Memory(2 * GB, 0) and cpus() == 8


def test_a_limit_above_what_there_is_changes_nothing(system: Path) -> None:
    write(system, "cgroup/memory.max", 128 * GB)
    write(system, "cgroup/memory.current", GB)
    write(system, "cgroup/cpu.max", "6400000 100000")
    assert memory() == Memory(64 * GB, 40 * GB) and cpus() == 8


def test_without_proc_the_system_is_asked(system: Path) -> None:
    (system / "proc" / "meminfo").unlink()
    found = memory()
    assert 0 < found.available <= found.total


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    import shutil

    assert abs(free_disk(tmp_path / "a" / "b") - shutil.disk_usage(tmp_path).free) < GB
