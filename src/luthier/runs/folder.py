"""A run folder: complete or absent. While it is made it lies beside, as `OUT.partial`; finishing renames it."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from luthier.errors import UserError
from luthier.recipe import Recipe

FILES = ("run.json", "recipe.yaml")
OURS = ("run.json", "config.json")  # what a folder that may be replaced holds: a run, or an exported model
PARTS = ("task", "method", "data", "metrics", "resources")  # of run.json, that a reader relies on


class RunFolder:
    """Checks come first and write nothing; `start` makes `OUT.partial`; `finish` publishes it."""

    def __init__(self, out: str | Path):
        self.path = Path(out)
        if self.path.name in ("", ".."):
            self.path = self.path.resolve()
        self.partial = self.path.parent / (self.path.name + ".partial")
        self.lock = self.partial / "lock"
        self._held: TextIO | None = None

    def check(self, overwrite: bool = False, resume: bool = False, reads: Iterable[str | Path] = ()) -> None:
        """Raises UserError where the folder cannot be made, or would take the place of what it is made from (`reads`), before anything is."""
        for source in reads:
            if Path(str(source).removeprefix("python:")).resolve().is_relative_to(self.path.resolve()):
                raise UserError(f"{self.path} holds {source}, from which it would be made. Give --out another name.")
        if Path.cwd().is_relative_to(self.path.resolve()):
            raise UserError(f"{self.path} is the folder that you are in, or one above it. Give --out another name.")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file. A run is a folder: give --out another name.")
        self._check_free(overwrite, resume)
        if self.path.exists() and not any((self.path / name).is_file() for name in OURS) and any(self.path.iterdir()):
            raise UserError(f"{self.path} is no run or model folder, so --overwrite does not replace it. Give --out another name.")
        if self.partial.exists() and not (overwrite or resume):
            raise UserError(f"{self.partial} is an unfinished run. Give --resume to go on with it, or --overwrite to start anew.")
        if resume and not self.partial.exists():
            raise UserError(f"There is nothing to resume: {self.partial} does not exist.")
        if self.lock.exists():
            self._take().close()
        place = self.path.absolute().parent
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK):
            raise UserError(f"{place} cannot be written to. Give --out in a folder that can.")

    def start(self, overwrite: bool = False, resume: bool = False) -> None:
        """Lock the folder; without `resume`, empty it."""
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._held = self._take()
            self._check_free(overwrite, resume)  # another process may have finished since the first look
            for item in [] if resume else [p for p in self.partial.iterdir() if p != self.lock]:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        except OSError as error:
            raise UserError(f"{self.partial} cannot be written: {error.strerror}. Give another --out.") from error

    def abandon(self) -> None:
        """Take away what holds nothing to resume from."""
        if self._held and not (self.partial / "checkpoints").exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    def release(self) -> None:
        if self._held:
            self.lock.unlink(missing_ok=True)
            self._held.close()
            self._held = None

    def _take(self) -> TextIO:
        """The lock, which the system takes back from a process however it ends. Raises UserError where another process holds it."""
        file = self.lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            file.close()
            raise UserError(f"Process {owner} is working on {self.partial}. Wait for it, or give another --out.") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def _check_free(self, overwrite: bool, resume: bool) -> None:
        if self.path.exists() and not overwrite:
            done = " It is a finished run: nothing is left to resume." if resume and (self.path / "run.json").exists() else ""
            raise UserError(f"{self.path} exists.{done} Give --overwrite to replace it (the old one goes only when the new one is complete), or another --out.")

    def write_recipe(self, recipe: Recipe) -> None:
        (self.partial / "recipe.yaml").write_text(recipe.anchored().dump(), encoding="utf-8")

    def write_json(self, name: str, content: Any) -> None:
        (self.partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_outcomes(self, fingerprint: str, outcomes: list[float]) -> None:
        """One number per test row, by which two runs are compared in pairs."""
        self.write_json("test_outcomes.json", {"rows": fingerprint, "outcomes": outcomes})

    def finish(self) -> Path:
        """Publish: the partial folder takes the name, and only then go an old run of that name and the checkpoints, so that a kill loses nothing."""
        self.release()
        old = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.old")
        if self.path.exists():
            self.path.rename(old)
        self.partial.rename(self.path)
        for leftover in (old, self.path / "checkpoints"):
            shutil.rmtree(leftover, ignore_errors=True)
        return self.path


class Followed(RunFolder):
    """The folder as the other processes of `torchrun` see it: the first one checks, writes and publishes it."""

    def check(self, overwrite: bool = False, resume: bool = False, reads: Iterable[str | Path] = ()) -> None: ...

    def start(self, overwrite: bool = False, resume: bool = False) -> None: ...

    def write_recipe(self, recipe: Recipe) -> None: ...


@dataclass(frozen=True)
class RunRecord:
    """What a finished run says of itself: `run.json` by its parts, and the recipe that runs it again."""

    path: Path
    content: dict[str, Any]

    @functools.cached_property
    def recipe(self) -> Recipe:
        """Read when it is asked for: a merged model needs no package that its method came from."""
        return Recipe.load(self.path / "recipe.yaml")

    @property
    def task(self) -> dict[str, Any]:
        return self.content["task"]

    @property
    def method(self) -> str:
        return self.content["method"]

    @property
    def data(self) -> dict[str, Any]:
        return self.content["data"]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return self.content["metrics"]

    @property
    def resources(self) -> dict[str, float]:
        return self.content["resources"]


def read_run(path: str | Path) -> RunRecord:
    """Raises UserError for what is no finished run."""
    folder = Path(path)
    if not folder.is_dir():
        hint = f" {folder}.partial is there: an unfinished run (go on with adapt --resume)." if folder.with_name(folder.name + ".partial").exists() else ""
        raise UserError(f"There is no run {folder}.{hint}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no run folder: {' and '.join(missing)} missing. `luthier runs list` shows the runs below a folder.")
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'run.json'} is not valid JSON: {error}") from None
    lost = [name for name in PARTS if not isinstance(content, dict) or name not in content]
    if lost:
        raise UserError(f"{folder / 'run.json'} is no record of a run: it lacks {', '.join(lost)}.")
    return RunRecord(folder, content)
