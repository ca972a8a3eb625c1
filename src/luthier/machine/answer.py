"""What the trials on this machine said, and the file that remembers it. Read at every `import luthier`, so it imports little."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from typing import Any, NamedTuple

TYPES = ("fp32", "bf16", "int8")
UNCAPPED, CAPPED = "uncapped", "capped"  # matrix units as they come; oneDNN held below AMX
SETTINGS = (UNCAPPED, CAPPED)
FORMAT = 3  # of the file; another one is not read


class Trial(NamedTuple):
    """One number type under one setting.

    sound   it ran, forward and backward, and its numbers were right
    flops   FLOP per second: `linear` products as F.linear takes them, `onednn` the same through oneDNN (in int8 with the rounding of tokens), `training` forward and backward of encoder blocks on one core
    reason  why it is not sound
    """

    sound: bool
    flops: dict[str, float] = {}
    reason: str = ""


class Answer(NamedTuple):
    """trials[setting][type]; bandwidth: bytes read and written per second by a copy."""

    trials: dict[str, dict[str, Trial]]
    bandwidth: float = 0.0

    @property
    def needs_no_cap(self) -> bool:
        """Whether every type is sound with the matrix units as they come; int8, whose kernels some machines lack, where the cap would make it so."""
        kinds = self.trials[UNCAPPED].items()
        return all(trial.sound or (kind == "int8" and not self.trials[CAPPED][kind].sound) for kind, trial in kinds)


_found: Answer | None = None  # by this process


def known() -> Answer | None:
    """The answer of this process or of the cache; None where there is none, or none that can be read."""
    global _found
    if _found is None:
        _found = _read()
    return _found


def remember(answer: Answer, *, keep: bool = True) -> None:
    """For this process, and with `keep` in the cache, complete or not at all; a disk without room for it is no error."""
    global _found
    _found = answer
    path = cache_file()
    if not keep or path is None:
        return
    content = {"key": _key(), "bandwidth": answer.bandwidth, "trials": {s: {t: trial._asdict() for t, trial in types.items()} for s, types in answer.trials.items()}}
    partial = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
        os.replace(partial, path)
    except OSError:
        _remove(partial)


def forget() -> None:
    """Here and in the cache."""
    global _found
    _found = None
    path = cache_file()
    if path is not None:
        _remove(path)


def cache_file() -> str | None:
    """The file of this CPU, its flags and this version of torch; None where the user has no home."""
    folder = cache_folder()
    return folder and os.path.join(folder, f"machine-{zlib.crc32(_key().encode()):08x}.json")


def cache_folder() -> str | None:
    if os.environ.get("LUTHIER_CACHE"):
        return os.environ["LUTHIER_CACHE"]
    if sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    elif sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~\\AppData\\Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "luthier") if os.path.isabs(base) else None


def cpu() -> dict[str, str]:
    """What the system tells of the processor: its name, flags and revision."""
    wanted = ("model name", "flags", "stepping", "microcode", "Features", "CPU implementer", "CPU part")
    found = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if not line.strip():
                    break  # the first processor says it for all
                name, _, value = line.partition(":")
                if name.strip() in wanted:
                    found[name.strip()] = value.strip()
    except OSError:
        pass  # no Linux
    if found:
        return found
    import platform

    return {"model name": platform.processor() or platform.machine(), "flags": platform.machine()}


def _read() -> Answer | None:
    """A file that is not as written (cut short, of another machine, edited) counts as absent."""
    path = cache_file()
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        if content["key"] != _key():
            return None
        return Answer({s: {t: _trial(t, content["trials"][s][t]) for t in TYPES} for s in SETTINGS}, float(content["bandwidth"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _trial(kind: str, content: dict[str, Any]) -> Trial:
    sound, flops = content["sound"], {name: float(value) for name, value in content["flops"].items()}
    if not isinstance(sound, bool) or (sound and not ({"onednn"} if kind == "int8" else {"linear", "training"}) <= set(flops)) or not all(value > 0 for value in flops.values()):
        raise ValueError(f"no trial: {content}")
    return Trial(sound, flops, str(content["reason"]))


def _key() -> str:
    return "|".join([f"format {FORMAT}", *(f"{name}: {value}" for name, value in sorted(cpu().items())), f"torch {_torch_version()}"])


def _torch_version() -> str:
    """From the name of its metadata folder: to ask importlib.metadata costs more than all the rest of `import luthier`."""
    for place in sys.path:
        try:
            names = os.listdir(place or ".")
        except OSError:
            continue
        for name in names:
            if name.startswith("torch-") and name.endswith((".dist-info", ".egg-info")):
                return name.removeprefix("torch-").rpartition(".")[0]
    return "not found"


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)
