"""Tables and cards: what there is, for people."""

from __future__ import annotations

import dataclasses
import io
import typing
from pathlib import Path
from typing import Any

from luthier.methods import registry
from luthier.methods.kinds import PROMISES
from luthier.methods.settings import spell
from luthier.runs.listing import find_runs
from luthier.tasks import tasks


def method_table() -> str:
    rows = [("/".join(registry.kinds(cls)), name, cls.card.use) for name, cls in registry.methods().items()]
    return _table(("kind", "method", "what it does"), sorted(rows)) + "\nluthier methods NAME shows the settings of one."


def method_card(name: str) -> str:
    """Use, settings with defaults, source, aspects and promises."""
    cls = registry.find(name)
    card = cls.card
    lines = [f"{name}: {card.use}", f"  kind      {', '.join(registry.kinds(cls))}", f"  source    {card.source}", f"  writes    {', '.join(sorted(card.writes))}"]
    lines.append(f"  lr        {card.lr:g} at 22 M parameters" if card.lr else "  lr        that of the method beside it")
    lines.append("  settings")
    hints = typing.get_type_hints(cls)
    for f in [f for f in dataclasses.fields(cls) if not f.metadata.get("own")]:
        default = "must be given" if f.default is dataclasses.MISSING else spell(f.default)
        choices = typing.get_args(hints[f.name]) if typing.get_origin(hints[f.name]) is typing.Literal else ()
        lines.append(f"    {f.name} = {default}" + (f"    one of {', '.join(map(str, choices))}" if choices else ""))
    lines += ["  also read " + ", ".join(f"{other} = {own}" for other, own in cls.aliases.items())] if cls.aliases else []
    lines += ["  promises"] + [f"    {promise}: {PROMISES[promise]}" for promise in sorted(card.promises)]
    lines += [f"  gap       {where}: {reason}" for where, reason in card.gaps.items()]
    return "\n".join([*lines, "  examples"] + [f"    {example}" for example in card.examples])


def task_table() -> str:
    lines = []
    for tag, cls in tasks().items():
        lines.append(f"{tag}: {cls.use}; best checkpoint by {cls.metric}")
        for column in cls.columns:
            names = f"; taken by name: {', '.join(column.names)}" if column.names else ""
            lines.append(f"    {column.role}{'' if column.required else ' (optional)'}: {column.use}{names}")
        lines += [f"    --set {name}={default if default is not None else '...'}" for name, default in cls.options.items()]
    return "\n".join(lines)


def run_table(folder: Path) -> str:
    rows = []
    for run in find_runs(folder):
        name, metric = next(iter(run.metrics.items()))
        rows.append((str(run.path), run.task["tag"], run.method, f"{name} {metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]", f"{run.resources['seconds']:.0f} s", run.content["created"][:16]))
    return _table(("run", "task", "method", "test", "training", "made"), rows) if rows else f"There is no finished run below {folder}."


def comparison(found: dict[str, Any]) -> str:
    first, second = found["runs"]
    rows = [(name, *(f"{m['value']:.4f} [{m['low']:.4f}, {m['high']:.4f}]" for m in pair)) for name, pair in found["metrics"].items()]
    rows += [(name, *("-" if v is None else f"{v:,.6g}" for v in pair)) for name, pair in found["resources"].items()]
    difference = found["difference"]
    clear = "the interval leaves zero out" if difference["low"] > 0 or difference["high"] < 0 else "the interval holds zero: not told apart"
    lines = [_table(("", first, second), rows), f"paired difference per test row: {difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}] ({clear})"]
    return "\n".join(lines + [f"recipe {name}: {a} | {b}" for name, (a, b) in found["recipe"].items()])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, pad_edge=False, header_style="")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=160, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
