"""A process in which nothing is known of the machine yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.machine import answer, setting
from luthier.machine.setting import CAP_NAMES, MARK


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process in which luthier has set nothing yet."""
    before = dict(os.environ)
    for name in (*CAP_NAMES, MARK):
        os.environ.pop(name, None)
    os.environ["LUTHIER_CACHE"] = str(tmp_path / "cache")
    monkeypatch.setattr(answer, "_found", None)
    monkeypatch.setattr(setting, "_earlier", set())
    yield tmp_path / "cache"
    os.environ.clear()
    os.environ.update(before)
