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
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from luthier.machine.answer import cache_folder, cpu

HERE = Path(__file__).parent
FLAGS = ("-O3", "-fno-math-errno", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
TIMEOUT = 120  # seconds
SWITCH = "LUTHIER_KERNELS"
FAILED, BUILDING = ".failed", "kernels-building-"
LANES = 16  # numbers in a vector
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
# of the arguments: n a number, r a real one, p the memory of a tensor or None
SIGNATURES = {
    "join_forward": "nnpppr" + "pprn" + "ppppp",
    "join_backward": "nnppp" + "ppppn" + "pr" + "pppp",
    "attention_forward": "npnnnnrpp" + "np" + "pnpn" + "pr" + "pp",
    "attention_backward": "npnnnnrpp" + "np" + "pnpn" + "pr" + "pp" + "ppp",
    "head_norms_forward": "nnnn" + "pppr" + "pp",
    "head_norms_backward": "nnnn" + "ppppp" + "ppp",
    "cross_entropy": "nnpppp",
    **dict.fromkeys(("round_rows", "spread_rows"), "nnppp"),  # float32 only, as are the next two
    "squares": "npppp",
    "adamw": "npp" + "pppppppp" + "rrrrrr",
    "drop": "nppr" + "p",
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


def strided(x: Tensor) -> tuple[int, int]:
    """Where the numbers of x (N, d) start, and how many lie between the starts of two of its rows."""
    assert x.dim() == 2 and x.stride(1) == 1
    return x.data_ptr(), x.stride(0)


def library() -> ctypes.CDLL | None:
    """All kernels; None where they are switched off, no C++ compiler is there, or what it built does not compute as it should: see `outcome`."""
    return _load()[0]


def outcome() -> str:
    """Whether kernels are used, or why not."""
    return _load()[1]


def ensure(say: Callable[[str], None]) -> None:
    """Have them, compiled now where they are not yet; that is said, and how it ended where it did not end well."""
    compiler = _compiler()
    new = compiler is not None and not _off() and not any(path.exists() for path in _files(compiler))
    if new:
        say("compiling kernels for this machine (once, some seconds)")
    if not library() and new:
        say(f"kernels: {outcome()}")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    compiler = _compiler()
    if reason := _off():
        return None, f"none: {reason}"
    if compiler is None:
        return None, "none: there is no C++ compiler, with which training and encoding of small models would be faster"
    kept = next(iter(_files(compiler)), None)
    try:
        if kept is not None:
            failed = kept.with_suffix(FAILED)
            if failed.exists():
                return None, f"none: {failed.read_text(encoding='utf-8')} (to try again, delete {failed})"
            if kept.exists():
                with contextlib.suppress(OSError):  # cut short: built anew
                    return ctypes.CDLL(str(kept)), f"compiled by {compiler}"
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=kept and kept.parent) as folder:
            try:
                built = _build(compiler, Path(folder))
            except subprocess.CalledProcessError as error:
                reason = _reason(error)
                if kept is not None:
                    kept.with_suffix(FAILED).write_text(reason, encoding="utf-8")
                return None, f"none: {reason}"
            if kept is None:
                return ctypes.CDLL(str(built)), f"compiled by {compiler}, for this process only"
            os.replace(built, kept)
        _clear(kept.parent)
        return ctypes.CDLL(str(kept)), f"compiled by {compiler}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"none: {error}"


def _build(compiler: str, folder: Path) -> Path:
    built = folder / "kernels.so"
    subprocess.run([compiler, *FLAGS, *map(str, sorted(HERE.glob("*.cpp"))), "-o", str(built)], check=True, capture_output=True, timeout=TIMEOUT)
    # in a process of its own, as an instruction that the processor only claims to have would end this one
    subprocess.run([sys.executable, "-P", str(HERE / "check.py"), str(built)], check=True, capture_output=True, timeout=TIMEOUT)
    with built.open("rb") as stream:
        os.fsync(stream.fileno())
    return built


def _reason(error: subprocess.CalledProcessError) -> str:
    """The first line of what was said that names an error, else the last."""
    said = error.stderr.decode(errors="replace").strip().splitlines()
    return next((line.strip() for line in said if "error" in line.lower()), said[-1].strip() if said else str(error))


def _off() -> str:
    """Why there are to be none; empty where there are."""
    if sys.platform == "win32":
        return "they are for Linux and macOS"
    return f"{SWITCH} is off" if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false") else ""


def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)


@functools.cache
def _files(compiler: str) -> tuple[Path, ...]:
    """Where kernels are kept, and why they could not be had: of these sources, this compiler and this processor, as a home may be shared by several machines. Nowhere without a folder to write to."""
    folder = cache_folder()
    try:
        if folder is None or not os.access(_made(Path(folder)), os.W_OK):
            return ()
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=False, env={**os.environ, "LC_ALL": "C"}).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    sources = [path.read_bytes() for path in sorted(HERE.glob("*.[ch]*"))]
    key = b"\0".join([*sources, version, "\0".join([*FLAGS, *sorted(map("=".join, cpu().items()))]).encode()])
    kept = Path(folder) / f"kernels-{zlib.crc32(key):08x}.so"
    return kept, kept.with_suffix(FAILED)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _clear(folder: Path) -> None:
    """What killed builds left."""
    for old in folder.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 10 * TIMEOUT:
                shutil.rmtree(old, ignore_errors=True)
