"""Kernels of our own for what stands between a block's products: compiled once for this processor, or done without.

torch spends most of a small model's step in calls for a few thousand numbers each. One kernel does here what takes torch five to
twenty of them, computes dropout's mask twice instead of keeping it, and never stores the weights of attention.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from luthier.machine.answer import cache_folder, cpu

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
TIMEOUT = 120  # seconds
SWITCH = "LUTHIER_KERNELS"
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
# of the arguments: n a number, r a real one, p the memory of a tensor or None
SIGNATURES = {
    "join_forward": "nnpppr" + "pprn" + "ppppp",
    "join_backward": "nnppp" + "ppppn" + "pr" + "pppp",
    "attention_forward": "npnnnnrpp" + "ppr" + "pp",
    "attention_backward": "nnpnnnnrpp" + "ppppr" + "p",
    **dict.fromkeys(("round_rows", "spread_rows"), "nnppp"),  # float32 only
    **dict.fromkeys(ACTIVATIONS, "nppp"),
    **{f"gated_{name}": "nnppp" for name in ACTIVATIONS},
}
_TYPES = {"n": ctypes.c_int64, "r": ctypes.c_double, "p": ctypes.c_void_p}


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The kernel for tensors of this type on the processor; None where there is none, or where kernels cannot be had on this machine."""
    if dtype not in (torch.float32, torch.bfloat16) or (found := library()) is None:
        return None
    function = getattr(found, f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes, function.restype = [_TYPES[kind] for kind in SIGNATURES[name]], None
    return function  # type: ignore[no-any-return]


def memory(x: Tensor | None) -> int | None:
    """Where a tensor's numbers start, for a kernel, which expects them one after the other."""
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr()


def library() -> ctypes.CDLL | None:
    """All kernels; None where LUTHIER_KERNELS is off, no C++ compiler is there, or what it built does not compute as it should: see `outcome`."""
    return _load()[0]


def outcome() -> str:
    """Whether kernels are used, or why not."""
    return _load()[1]


def ensure(say: Callable[[str], None]) -> None:
    """Have them, compiled now where they are not yet, which is said."""
    compiler = _compiler()
    if compiler and not _off() and not ((kept := _file(compiler)) and kept.exists()):
        say("compiling kernels for this machine (once, some seconds)")
    library()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    compiler = _compiler()
    if _off():
        return None, f"none: {SWITCH} is off"
    if compiler is None:
        return None, "none: there is no C++ compiler, with which training and encoding of small models would be faster"
    try:
        kept = _file(compiler)
        if kept is None or not kept.exists():
            with tempfile.TemporaryDirectory(dir=_writable(kept and kept.parent)) as folder:
                built = _build(compiler, Path(folder))
                if kept is None or not _writable(kept.parent):
                    return ctypes.CDLL(str(built)), f"compiled by {compiler}, for this process only"
                os.replace(built, kept)
        return ctypes.CDLL(str(kept)), f"compiled by {compiler}"
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()
        return None, f"none: {said[-1] if said else error}"


def _build(compiler: str, folder: Path) -> Path:
    built = folder / "kernels.so"
    subprocess.run([compiler, *FLAGS, *map(str, sorted(HERE.glob("*.cpp"))), "-o", str(built)], check=True, capture_output=True, timeout=TIMEOUT)
    # in a process of its own, as an instruction that the processor only claims to have would end this one
    subprocess.run([sys.executable, "-P", str(HERE / "check.py"), str(built)], check=True, capture_output=True, timeout=TIMEOUT)
    return built


def _off() -> bool:
    return os.environ.get(SWITCH) == "off" or sys.platform == "win32"


def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)


@functools.cache
def _file(compiler: str) -> Path | None:
    """Of these sources, this compiler and this processor, as a home may be shared by several machines."""
    folder = cache_folder()
    if folder is None:
        return None
    sources = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.[ch]*"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False).stdout
    key = "\0".join([*sources, *FLAGS, version, *sorted(map("=".join, cpu().items()))])
    return Path(folder) / f"kernels-{zlib.crc32(key.encode()):08x}.so"


def _writable(folder: Path | None) -> Path | None:
    with contextlib.suppress(OSError):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return folder if os.access(folder, os.W_OK) else None
    return None
