"""The runs below a folder."""

from __future__ import annotations

from pathlib import Path

from luthier.errors import UserError
from luthier.runs.folder import RunRecord, read_run

DEEPEST = 4


def find_runs(folder: str | Path) -> list[RunRecord]:
    """Finished runs, newest first. Raises UserError where there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"There is no folder {folder}.")
    found = []
    for file in root.rglob("run.json"):
        if len(file.relative_to(root).parts) <= DEEPEST and not any(part.endswith((".partial", ".old")) for part in file.parts):
            try:
                found.append(read_run(file.parent))
            except UserError:
                continue  # a run.json of another program
    return sorted(found, key=lambda run: run.content.get("created", ""), reverse=True)
