"""What was measured comes back from the cache as it was; whatever else lies there counts as absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import AMX, BROKEN_AMX, NO_AMX, NO_BF16

from luthier.machine import answer
from luthier.machine.answer import cache_file, cache_folder, forget, known, remember


def reread() -> answer.Answer | None:
    answer._found = None
    return known()


@pytest.mark.parametrize("found", [AMX, BROKEN_AMX, NO_AMX, NO_BF16])
def test_an_answer_round_trips_through_the_cache(cache: Path, found: answer.Answer) -> None:
    remember(found)
    assert reread() == found
    assert [p.suffix for p in cache.iterdir()] == [".json"]  # nothing half-written is left beside it
    forget()
    assert known() is None and not list(cache.iterdir())


def test_an_answer_that_is_not_to_be_kept_serves_this_process_only(cache: Path) -> None:
    remember(BROKEN_AMX, keep=False)
    assert known() == BROKEN_AMX
    assert reread() is None


@pytest.mark.parametrize("part", ["flags", "model name"])
def test_another_processor_has_another_answer(cache: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    remember(AMX)
    before, other = cache_file(), {**answer.cpu(), part: "another"}
    monkeypatch.setattr(answer, "cpu", lambda: other)
    assert cache_file() != before and reread() is None


def test_another_torch_has_another_answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(AMX)
    monkeypatch.setattr(answer, "_torch_version", lambda: "0.0.1")
    assert reread() is None


def test_the_version_of_torch_is_read_without_importing_it() -> None:
    import importlib.metadata

    assert answer._torch_version() == importlib.metadata.version("torch")


def test_an_answer_of_another_machine_under_this_name_is_not_believed(cache: Path) -> None:
    remember(AMX)
    path = Path(cache_file() or "")
    path.write_text(json.dumps({**json.loads(path.read_text()), "key": "another machine"}))
    assert reread() is None


def test_a_file_that_was_cut_short_anywhere_counts_as_absent(cache: Path) -> None:
    remember(AMX)
    path = Path(cache_file() or "")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert reread() is None


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JSON, field=st.sampled_from(["trials", "bandwidth", "uncapped", "bf16", "sound", "flops"]))
def test_a_file_with_a_wrong_value_anywhere_counts_as_absent(cache: Path, junk: object, field: str) -> None:
    remember(AMX)
    path = Path(cache_file() or "")
    content = json.loads(path.read_text())
    place = {"trials": content, "bandwidth": content, "uncapped": content["trials"], "bf16": content["trials"]["capped"]}.get(field, content["trials"]["capped"]["bf16"])
    if isinstance(junk, (bool, float)) and field in ("bandwidth", "sound"):
        junk = [junk]
    place[field] = junk
    path.write_text(json.dumps(content))
    assert reread() is None


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe", b"[]", b"{}", b"null", b'{"trials": {}, "bandwidth": 0}', b"[" * 100_000])
def test_junk_in_its_place_counts_as_absent(cache: Path, junk: bytes) -> None:
    cache.mkdir()
    Path(cache_file() or "").write_bytes(junk)
    assert reread() is None


def test_a_disk_without_room_leaves_nothing_half_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answer.json, "dump", full)
    remember(AMX)
    assert known() == AMX and not list(cache.iterdir())


@pytest.mark.parametrize(
    "platform,variables,expected",
    [
        ("linux", {"HOME": "/home/ada"}, "/home/ada/.cache/luthier"),
        ("linux", {"HOME": "/home/ada", "XDG_CACHE_HOME": "/fast"}, "/fast/luthier"),
        ("linux", {"HOME": "relative"}, None),
        ("darwin", {"HOME": "/Users/ada"}, "/Users/ada/Library/Caches/luthier"),
        ("win32", {"LOCALAPPDATA": "/c/Users/ada/AppData/Local"}, "/c/Users/ada/AppData/Local/luthier"),
        ("linux", {"HOME": "/home/ada", "LUTHIER_CACHE": "/here"}, "/here"),
    ],
)
def test_the_folder_is_the_platforms_own(monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str | None) -> None:
    for name in ("XDG_CACHE_HOME", "LUTHIER_CACHE", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(answer.sys, "platform", platform)
    assert cache_folder() == expected
