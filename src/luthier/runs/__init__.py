"""The folder that a training leaves."""

from luthier.runs.folder import Followed, RunFolder, RunRecord, read_run

__all__ = ["Followed", "RunFolder", "RunRecord", "read_run"]
