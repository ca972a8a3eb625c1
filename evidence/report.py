"""Writes docs/evidence.md from evidence/runs.jsonl: what was measured, what is missing, and what follows for the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from run import CARDS, GRID, METHODS, PASSES, RATES, SEEDS, TABLE, card_cells, grid_cells, table_cells

from luthier.runs.compare import paired_difference

PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"
WITHIN = 0.03  # of the best of the grid: what a default may lack
METRIC = {"glue_sst2": "accuracy", "glue_stsb": "pearson", "masakhaner2": "f1", "german_arguments": "accuracy", "turkish_sentiment": "accuracy"}
OUTCOME = {"glue_sst2": "right (1) or wrong (0)", "glue_stsb": "minus the absolute error", "masakhaner2": "F1 of the sentence"}
Cells = Mapping[str, dict[str, Any]]


def write(done: Cells) -> None:
    done = {name: entry for name, entry in done.items() if entry["status"] == 0}
    PAGE.write_text("\n".join([*_head(done), *_table(done), *_differences(done), *_grid(done), *_rule(done), *_cards(done), *_limits()]) + "\n", encoding="utf-8")
    print(PAGE)


def _head(done: Cells) -> list[str]:
    every = [name for cells in (table_cells(), grid_cells(), card_cells()) for name, _ in cells]
    missing = [name for name in every if name not in done]
    machines = sorted({f"{entry['machine']}, {entry['precision']}" for entry in done.values()})
    return [
        "# What was measured",
        "",
        "Every number below is one `luthier adapt` of the command line, kept in `evidence/runs.jsonl`. To run what is missing, and to write this page:",
        "",
        "```bash",
        "export LUTHIER_SHARED=FOLDER_OF_DATA_AND_MODELS",
        "python evidence/run.py table && python evidence/run.py grid && python evidence/run.py cards",
        "python evidence/run.py report",
        "```",
        "",
        f"{len(every) - len(missing)} of {len(every)} cells are there" + (f"; missing: {_summary(missing)}. Where seeds are missing, the tables say how many there are." if missing else "."),
        f"Machines: {'; '.join(machines)}. The precision is what `auto` chose there.",
        "",
    ]


def _summary(missing: list[str]) -> str:
    counts: dict[str, int] = {}
    for name in missing:
        counts["/".join(name.split("/")[:3])] = counts.get("/".join(name.split("/")[:3]), 0) + 1
    return ", ".join(f"`{group}` ({count})" for group, count in counts.items())


def _seeds(done: Cells, prefix: str, suffix: str = "") -> dict[int, dict[str, Any]]:
    return {seed: done[name] for seed in SEEDS if (name := f"{prefix}/{seed}{suffix}") in done}


def _table(done: Cells) -> list[str]:
    lines = ["## Five methods, three sets", ""]
    for data in TABLE:
        metric = METRIC[data]
        command = next(flags for name, flags in table_cells() if name == f"table/{data}/lora/0")
        lines += [f"### {data}: test {metric}", "", f"`{_shown(command)}`, and so for each method and seed.", ""]
        lines += ["| method | mean of seeds | each seed | trained numbers | training, s | rows/s | peak, MB |", "|---|---|---|---|---|---|---|"]
        for method in METHODS:
            entries = _seeds(done, f"table/{data}/{method}")
            if not entries:
                lines.append(f"| {method} | not run | | | | | |")
                continue
            values = [entry["metrics"][metric]["value"] for entry in entries.values()]
            resources = [entry["resources"] for entry in entries.values()]
            lines.append(
                f"| {method} | {fmean(values):.3f}{_few(entries)} | {', '.join(f'{v:.3f}' for v in values)} | {resources[0]['trainable_parameters']:,} "
                f"| {fmean(r['seconds'] for r in resources):.0f} | {fmean(r['examples_per_s'] for r in resources):.0f} | {fmean(r['peak_memory_mb'] for r in resources):,.0f} |"
            )
        reached = [entry["metrics"][metric]["value"] for method in METHODS for entry in _seeds(done, f"table/{data}/{method}").values()]
        ahead = []
        for name, found in next((entry["baselines"] for method in METHODS for entry in _seeds(done, f"table/{data}/{method}").values() if "baselines" in entry), {}).items():
            if metric in found and found[metric]["low"] == found[metric]["low"]:
                lines.append(f"| *{name}* | {found[metric]['value']:.3f} | | | | | |")
                ahead += [name] if found[metric]["value"] > max(reached) else []
        lines += ["", *(f"**No run reaches the baseline \"{name}\".**" for name in ahead), ""]
    return lines


def _few(entries: Mapping[int, Any]) -> str:
    return "" if len(entries) == len(SEEDS) else f" ({len(entries)} of {len(SEEDS)} seeds)"


def _differences(done: Cells) -> list[str]:
    lines = ["### Paired differences", "", "Over the test rows, outcomes averaged over the seeds that both methods have; brackets: bootstrap 95 %.", "", "| set | outcome of a row | full - lora | lora - head | lora - adapter |", "|---|---|---|---|---|"]
    for data in TABLE:
        cells = []
        for first, second in (("full", "lora"), ("lora", "head"), ("lora", "adapter")):
            found = _paired(done, data, first, second)
            cells.append(f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]{found['few']}" if found else "not run")
        lines.append(f"| {data} | {OUTCOME[data]} | {' | '.join(cells)} |")
    checks = [(pair, _paired(done, "glue_sst2", *pair)) for pair in (("full", "lora"), ("lora", "head"))]
    if all(found for _, found in checks):
        against = [f"{first} < {second}" for (first, second), found in checks if found and found["high"] < 0]
        lines += ["", "full >= lora >= head on glue_sst2 " + (f"**is contradicted**: {' and '.join(against)}." if against else "is not contradicted by these intervals.")]
    return [*lines, ""]


def _paired(done: Cells, data: str, first: str, second: str) -> dict[str, Any] | None:
    a, b = _seeds(done, f"table/{data}/{first}"), _seeds(done, f"table/{data}/{second}")
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return None
    return {**paired_difference([a[s]["outcomes"] for s in seeds], [b[s]["outcomes"] for s in seeds]), "few": _few(dict.fromkeys(seeds))}


def _grid(done: Cells) -> list[str]:
    lines = [
        "## Defaults that learn",
        "",
        f"600 training rows. Nothing given, against the best of {len(RATES)} learning rates x {len(PASSES)} passes, which validation chooses (of equals, the smaller rate, then fewer passes). Within 3 points of it on the test rows is what a default must reach.",
        "",
        "| set | method | seed | nothing given: lr, passes | its test accuracy | best of the grid: lr, passes | its test accuracy | behind by | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for data in GRID:
        for method in ("lora", "full"):
            for seed in SEEDS:
                lines.append(_against(done, data, method, seed))
    for data in GRID:
        for method in ("lora", "full"):
            lines += _heat(done, data, method)
    return [*lines, ""]


def _against(done: Cells, data: str, method: str, seed: int) -> str:
    prefix, metric = f"grid/{data}/{method}/{seed}", METRIC[data]
    default = done.get(f"{prefix}/default")
    tried = {(lr, passes): done[name] for lr in RATES for passes in PASSES if (name := f"{prefix}/{lr}/{passes}") in done}
    start = f"| {data} | {method} | {seed} | "
    if default is None:
        return start + f"not run | | {len(tried)} of {len(RATES) * len(PASSES)} run | | | |"
    settings = default["settings"]
    own = default["metrics"][metric]["value"]
    start += f"{settings['lr']:g}, {settings['epochs']:g} | {own:.3f} | "
    if not tried:
        return start + "not run | | | |"
    best = max(tried, key=lambda key: tried[key]["best_validation"])
    value = tried[best]["metrics"][metric]["value"]
    partly = "" if len(tried) == len(RATES) * len(PASSES) else f" (of {len(tried)} run)"
    return start + f"{best[0]}, {best[1]}{partly} | {value:.3f} | {value - own:+.3f} | {'yes' if value - own <= WITHIN else '**no**'} |"


def _heat(done: Cells, data: str, method: str) -> list[str]:
    cells = {(lr, passes): [e for seed in SEEDS if (e := done.get(f"grid/{data}/{method}/{seed}/{lr}/{passes}"))] for lr in RATES for passes in PASSES}
    if not any(cells.values()):
        return []
    lines = ["", f"{data}, {method}: validation accuracy, mean of seeds", "", "| lr | " + " | ".join(f"{p} passes" for p in PASSES) + " |", "|---" * (len(PASSES) + 1) + "|"]
    for lr in RATES:
        shown = [f"{fmean(e['best_validation'] for e in found):.3f}{'' if len(found) == len(SEEDS) else f' ({len(found)})'}" if (found := cells[lr, passes]) else "" for passes in PASSES]
        lines.append(f"| {lr} | {' | '.join(shown)} |")
    return lines


def _rule(done: Cells) -> list[str]:
    return ["", (Path(__file__).parent / "rule.md").read_text(encoding="utf-8").strip(), ""]


def _cards(done: Cells) -> list[str]:
    majority = done["table/glue_sst2/lora/0"]["baselines"]["majority class"]["accuracy"]["value"]
    lines = ["## Every card's default", "", f"glue_sst2, 600 rows, seed 0, nothing given; the majority class has {majority:.3f} of the test rows.", "", "| method | lr | passes | test accuracy |", "|---|---|---|---|"]
    for method in ("full", "lora"):
        lines.append(_card(method, done.get(f"grid/glue_sst2/{method}/0/default")))
    return [*lines, *(_card(method, done.get(f"cards/glue_sst2/{method}/0")) for method in CARDS), ""]


def _card(method: str, entry: dict[str, Any] | None) -> str:
    shown = method.replace("|", "\\|")
    if entry is None:
        return f"| `{shown}` | not run | | |"
    m = entry["metrics"]["accuracy"]
    return f"| `{shown}` | {entry['settings']['lr']:g} | {entry['settings']['epochs']:g} | {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}] |"


def _limits() -> list[str]:
    return [
        "## Limits",
        "",
        "- One encoder a set, and its given test split; intervals say what other rows of the same kind could give, not other data.",
        "- Most cells were run before each step seeded its own random numbers, and before doubles of a validation part cut from train were taken out of train, and those of the glue and masakhaner2 sets before blocks ran fused: they repeat within the spread of seeds, not to the digit.",
        "- Seeds change the head's start, the order of rows, dropout and the cut validation part; three of them show a spread, not its size.",
        "- Seconds are of shared machines of two cores with other work on them, and of different number types where the machines differ. Compare them within a set at most.",
        "- The grid knows no rate between its four and no method but lora and full.",
    ]


def _shown(flags: list[str]) -> str:
    """The command with places named as a reader has them."""
    words = []
    for flag in flags:
        path = Path(flag)
        words.append(f"./{path.parent.name if path.name == 'model' else path.name}" if path.is_absolute() else flag)
    return "luthier adapt " + " ".join(words)
