"""`import luthier` in a fresh interpreter: what it imports, and which cap it leaves, for every state of cache and environment."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import pytest
from machines import AMX, BROKEN_AMX, NO_AMX, NO_BF16, python

from luthier.machine import setting
from luthier.machine.answer import Answer, remember
from luthier.machine.setting import CAP, MARK, pristine_environment

REPORT = """
import json, os, sys
{before}
import luthier
from luthier.machine.setting import in_force
{after}
print(json.dumps({{"cap": os.environ.get("ONEDNN_MAX_CPU_ISA"), "in_force": in_force(), "heavy": sorted({{"torch", "numpy", "transformers"}} & set(sys.modules))}}))
"""
WITH_TORCH = "import types; sys.modules['torch'] = types.ModuleType('torch')"  # stands for a torch that may have computed


def report(before: str = "", after: str = "", **environment: str | None) -> dict:
    return json.loads(python(REPORT.format(before=before, after=after), **environment).stdout)


@pytest.mark.parametrize("found,cap", [(None, CAP), (BROKEN_AMX, CAP), (NO_BF16, CAP), (AMX, None), (NO_AMX, None)])
def test_the_cap_is_set_unless_amx_is_known_to_be_sound(cache: Path, found: Answer | None, cap: str | None) -> None:
    if found:
        remember(found)
    assert report() == {"cap": cap, "in_force": ["capped" if cap else "uncapped"], "heavy": []}


@pytest.mark.parametrize("given", ["AVX2", "AVX512_CORE_AMX", "", CAP])
@pytest.mark.parametrize("found", [BROKEN_AMX, AMX])
def test_what_the_user_set_stays(cache: Path, found: Answer, given: str) -> None:
    remember(found)
    assert report(ONEDNN_MAX_CPU_ISA=given)["cap"] == given


def test_the_older_name_of_the_variable_is_the_users_too(cache: Path) -> None:
    assert report(DNNL_MAX_CPU_ISA="AVX2") == {"cap": None, "in_force": ["AVX2"], "heavy": []}


def test_a_broken_cache_file_means_the_cap(cache: Path) -> None:
    remember(AMX)
    next(cache.iterdir()).write_text("{")
    assert report()["cap"] == CAP


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", "not/absolute", ""])
def test_without_a_usable_home_it_is_the_cap(home: str) -> None:
    assert report(HOME=home, XDG_CACHE_HOME=None, LUTHIER_CACHE=None)["cap"] == CAP


def test_after_torch_either_setting_may_be_in_force(cache: Path) -> None:
    remember(BROKEN_AMX)
    assert report(before=WITH_TORCH)["in_force"] == ["capped", "uncapped"]
    remember(AMX)
    assert report(before=WITH_TORCH)["in_force"] == ["uncapped"]  # nothing was changed, so nothing came too late


def test_importing_torch_after_luthier_leaves_one_setting(cache: Path) -> None:
    assert report(after=WITH_TORCH)["in_force"] == ["capped"]


def test_a_child_knows_that_the_cap_is_not_the_users(cache: Path) -> None:
    inherited = {"ONEDNN_MAX_CPU_ISA": CAP, MARK: "1"}
    assert report(**inherited)["cap"] == CAP
    remember(AMX)
    assert report(**inherited)["cap"] is None


def test_what_a_program_sets_for_a_child_is_the_users(cache: Path) -> None:
    assert report(ONEDNN_MAX_CPU_ISA="AVX2", **{MARK: "1"})["cap"] == "AVX2"


def test_peers_start_without_what_luthier_set(cache: Path) -> None:
    before = pristine_environment()  # the import of luthier that this test is made of has set something already
    os.environ.clear()
    os.environ.update(before)
    setting.cap()
    setting.share()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == CAP
    assert pristine_environment() == before


def test_peers_keep_what_the_user_set(cache: Path) -> None:
    os.environ["ONEDNN_MAX_CPU_ISA"] = CAP
    setting.cap()
    assert pristine_environment()["ONEDNN_MAX_CPU_ISA"] == CAP


SHARES = "import os, luthier; print(*(os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'OMP_NUM_THREADS')))"
QUOTA = "from luthier.machine import resources, setting; setting.cpus = lambda: 1.6; import os; os.cpu_count = lambda: 8; setting.share()\n"


@pytest.mark.parametrize(
    "given,found", [({}, "6000 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_NUM_THREADS": "5"}, "6000 5")]
)
def test_threads_wait_briefly_unless_the_user_chose(cache: Path, given: dict[str, str], found: str) -> None:
    nothing: dict[str, str | None] = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None, "OMP_NUM_THREADS": None, "LUTHIER_SHARES": None}
    assert python(SHARES, **{**nothing, **given}).stdout.strip() == found


@pytest.mark.parametrize("given,threads", [(None, "1"), ("5", "5")])
def test_threads_are_no_more_than_a_quota_allows(cache: Path, given: str | None, threads: str) -> None:
    assert python(QUOTA + SHARES, OMP_NUM_THREADS=given, LUTHIER_SHARES=None).stdout.split()[1] == threads


def test_the_public_names_are_listed_and_unknown_ones_refused() -> None:
    done = python("import luthier; print(sorted(luthier.__all__) == dir(luthier), luthier.UserError.__mro__[1].__name__)\ntry: luthier.adopt\nexcept AttributeError as e: print(e)")
    assert done.stdout.split("\n")[:2] == ["True Exception", "module 'luthier' has no attribute 'adopt'"]


def test_every_public_name_can_be_imported() -> None:
    import luthier
    from luthier import machine

    for package in (luthier, machine):
        assert {*package._LAZY, "__version__"} == {*package.__all__, "__version__"}
        assert all(getattr(package, name) is not None for name in package.__all__)


FAULTS = """
import resource, torch
from luthier.machine.setting import keep_memory
keep_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 18) for _ in range(32)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(4)][-1])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not GNU's")
def test_freed_memory_stays_unless_the_user_chose() -> None:
    pages = 32 * (1 << 20) // os.sysconf("SC_PAGESIZE")
    assert int(python(FAULTS).stdout) < pages / 20
    assert int(python(FAULTS, MALLOC_TRIM_THRESHOLD_="131072").stdout) > pages / 2
