"""What a verb says while it works: bars on a terminal, plain lines in a file, nothing in a notebook that asked for silence."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from luthier.tasks.base import Metric, Task, ahead

PLAIN_EVERY = 10.0  # seconds between two plain lines of one piece of work
WIDE = 160  # columns of a table that goes to a file


class Console:
    """Writes to standard error, so that results on standard output stay clean. quiet=True says nothing."""

    def __init__(self, quiet: bool = False):
        from rich.console import Console as Rich

        self.rich = Rich(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = WIDE

    @property
    def terminal(self) -> bool:
        return self.rich.is_terminal and not self.rich.quiet

    def say(self, line: str) -> None:
        self.rich.print(line, markup=False)

    @contextlib.contextmanager
    def doing(self, label: str) -> Iterator[None]:
        """A spinner, and how long it took where that was more than two seconds."""
        start = time.monotonic()
        if self.terminal:
            with self.rich.status(label):
                yield
        else:
            yield
        if time.monotonic() - start > 2:
            self.say(f"{label}: {time.monotonic() - start:.0f} s")

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yields `advance(count, text="")`."""
        if self.terminal:
            with self._bar(label, total, done) as advance:
                yield advance
        else:
            lines = _PlainLines(self, label, total, done)
            yield lines
            lines.end()

    @contextlib.contextmanager
    def _bar(self, label: str, total: int | None, done: int) -> Iterator[Callable[[int, str], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=self.rich) as bar:
            task = bar.add_task(label, total=total, completed=done, text="")
            yield lambda count, text="": bar.update(task, advance=count) if not text else bar.update(task, advance=count, text=text)

    def finished(self, path: Path, task: Task, metrics: Mapping[str, Metric], baselines: Mapping[str, Mapping[str, Metric]]) -> None:
        """The result against its baselines, and what to type next."""
        from rich.table import Table

        sides = {**baselines, "this run": metrics}
        table = Table(title="on the test rows, after saving and reloading (95 % intervals)", title_justify="left", box=None, pad_edge=False)
        names = [name for name in metrics if "/" not in name]
        table.add_column("", min_width=max(map(len, names)), no_wrap=True)
        for side in sides:
            table.add_column(side, justify="right", no_wrap=True)
        for name in names:
            table.add_row(name, *(str(found[name]) if name in found else "-" for found in sides.values()))
        self.rich.print(table, soft_wrap=True)
        if better := ahead(task.measured_by, metrics, baselines):
            self.say(f"note: {' and '.join(better)} did better in {task.measured_by} on these rows. More passes (--epochs), another method or more rows may help.")
        self.say(f"run folder {path}   picture {path / 'picture.png'}")
        self.say("next:")
        for command in task.next_commands(str(path)):
            self.say(f"  {command}")


class _PlainLines:
    def __init__(self, console: Console, label: str, total: int | None, done: int):
        self.console, self.label, self.total = console, label, total
        self.done, self.last, self.said, self.text = done, time.monotonic(), done, ""

    def __call__(self, count: int, text: str = "") -> None:
        self.done += count
        self.text = text
        if time.monotonic() - self.last > PLAIN_EVERY:
            self._say()

    def end(self) -> None:
        if self.done != self.said:
            self._say()

    def _say(self) -> None:
        self.last, self.said = time.monotonic(), self.done
        self.console.say(f"{self.label} {self.done:,}{f'/{self.total:,}' if self.total else ''} {self.text}".rstrip())

