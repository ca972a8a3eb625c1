"""Lines of results as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from suite import AXES, BESIDE, PLAIN

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """A value of a line. `bigger` is better?"""

    name: str
    unit: str
    digits: int = 0
    bigger: bool = True

    def times(self, ours: dict[str, Any], theirs: dict[str, Any]) -> float:
        """How many times as good ours is."""
        return ours[self.name] / theirs[self.name] if self.bigger else theirs[self.name] / ours[self.name]


EXAMPLES, TOKENS, IMAGES = Measured("examples_per_s", "examples/s"), Measured("tokens_per_s", "tokens/s"), Measured("examples_per_s", "images/s", 1)
SECONDS = Measured("seconds", "seconds", 1, bigger=False)


def of(found: Entries, **wanted: Any) -> Entries:
    return [entry for entry in found if all(entry.get(name) == value for name, value in wanted.items())]


def turns(found: Entries) -> dict[str, dict[int, dict[str, Any]]]:
    """arm -> turn -> line."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in found:
        arms.setdefault(entry["arm"], {})[entry["turn"]] = entry
    return arms


def compared(found: Entries, measured: Measured, extra: str = "", cell: Callable[[str], str] = lambda arm: "") -> list[str]:
    """A line for each arm; ratios are of runs of the same turn. extra, cell: heading and content of one more column."""
    heads = ["", "precision", measured.unit, "luthier is", "peak MB", "luthier's peak is", *([extra] if extra else [])]
    arms = turns(found)
    ours = arms.get("luthier", {})
    rows = []
    for arm, theirs in arms.items():
        pairs = [(ours[turn], entry) for turn, entry in theirs.items() if turn in ours and arm != "luthier"]
        faster, smaller = [measured.times(*pair) for pair in pairs], [mine["peak_mb"] / other["peak_mb"] for mine, other in pairs]
        peaks, values = ([entry[name] for entry in theirs.values()] for name in ("peak_mb", measured.name))
        rows.append([arm, next(iter(theirs.values()))["precision"], spread(values, measured.digits), times(faster), f"{median(peaks):.0f}", f"{median(smaller):.2f}x" if smaller else "", *([cell(arm)] if extra else [])])
    return [*table(heads, rows), ""]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |".replace("|  |", "| |"), "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def times(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else ""


def seeds(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})" if values else "-"


def ceiling(found: Entries, precision: str) -> float:
    """TFLOP/s of large products, by the fastest route. The machine is shared: of all measurements the highest is the nearest."""
    return max(max(trial[precision]["tflops"].get(route, 0) for route in ("linear", "onednn")) for entry in found for trial in entry["machine"]["trials"].values() if trial[precision]["sound"])


def gflop(entry: dict[str, Any]) -> float:
    """Of one example's forward pass; older lines say it of the machine."""
    return entry.get("forward_gflop") or entry["machine"]["forward_gflop"]


def limit(found: Entries, everything: Entries, forwards: int, measured: Measured, what: str = "An example", per: Callable[[dict[str, Any]], float] = lambda entry: 1) -> list[str]:
    """How much luthier reaches of what the machine allows. forwards: products of a step, in forward passes. per: of what an example has many."""
    ours = of(found, arm="luthier")
    if not ours:
        return []
    precision, needed = ours[0]["precision"], gflop(ours[0]) * forwards / per(ours[0])
    top = ceiling(everything, precision)
    allowed = top * 1000 / needed
    reached = median(entry[measured.name] for entry in ours) / allowed
    return [f"{what} takes {needed:.3f} GFLOP when nothing is wasted, so that {top:.2f} TFLOP/s in {precision} allow {allowed:.0f} {measured.unit}; luthier reaches {reached:.0%} of that.", ""]


def encoding(found: Entries, everything: Entries) -> list[str]:
    """Each precision against the peer in the same one, or else in its faster one."""
    arms = turns(found)
    heads = ["precision", "sentence-transformers, sentences/s", "luthier", "luthier is", "peak MB, theirs and ours", "largest cosine distance from theirs in fp32"]
    rate = Measured("texts_per_s", "sentences/s")
    fastest = max((arm for arm in arms if arm.startswith("sentence-transformers")), key=lambda arm: median(entry[rate.name] for entry in arms[arm].values()), default="")
    rows = []
    for precision in ("fp32", "bf16", "int8"):
        same = f"sentence-transformers {precision}"
        peer = same if same in arms else fastest
        theirs, ours = arms.get(peer, {}), arms.get(f"luthier {precision}", {})
        ratios = [rate.times(ours[turn], theirs[turn]) for turn in theirs if turn in ours]
        if ratios:
            named = precision if peer == same else f"{precision}, theirs {peer.split()[-1]}"
            sides = [list(side.values()) for side in (theirs, ours)]
            rates, peaks = [spread([e[rate.name] for e in side]) for side in sides], [f"{median(e['peak_mb'] for e in side):.0f}" for side in sides]
            rows.append([named, *rates, times(ratios), ", ".join(peaks), f"{max(e['cosine_from_fp32'] or 0 for e in ours.values()):.1e}"])
    notes = []
    whole, plain = (arms.get(arm, {}) for arm in ("luthier int8", PLAIN))
    if ratios := [rate.times(whole[turn], plain[turn]) for turn in whole if turn in plain]:
        notes = [f"In int8 luthier is {times(ratios)} as fast as itself in fp32 through `F.linear` ({spread([e[rate.name] for e in plain.values()])} sentences/s).", ""]
    ceilings = {kind: ceiling(everything, kind) for kind in ("fp32", "bf16")}
    needed = gflop(found[0])
    allowed = " and ".join(f"{value:.2f} TFLOP/s in {kind} allow {value * 1000 / needed:.0f} sentences/s" for kind, value in ceilings.items())
    return [*table(heads, rows), "", *notes, f"A sentence takes {needed:.3f} GFLOP when nothing is wasted: {allowed}.", ""]


def busy(found: Entries) -> list[str]:
    """Turn by turn, how much of its quiet speed each arm keeps."""
    quiet, pressed = (turns(of(found, beside=beside)) for beside in BESIDE)
    rows = []
    for arm in quiet:
        both = [turn for turn in quiet[arm] if turn in pressed.get(arm, {})]
        if both:
            rates = [[side[arm][turn]["examples_per_s"] for turn in both] for side in (quiet, pressed)]
            kept = [b / a for a, b in zip(*rates, strict=True)]
            ahead = [pressed["luthier"][turn]["examples_per_s"] / pressed[arm][turn]["examples_per_s"] for turn in both if turn in pressed.get("luthier", {})] if arm != "luthier" else []
            rows.append([arm, quiet[arm][both[0]]["precision"], *(spread(side) for side in rates), f"{median(kept):.0%} [{min(kept):.0%}, {max(kept):.0%}]", times(ahead)])
    return [*table(["", "precision", "alone, examples/s", "beside the other", "kept", "luthier is, beside the other"], rows), ""]


# ---- growth


def curve(found: Entries, axis: str) -> tuple[list[float], dict[str, list[float]]]:
    """Places on the axis in order, and there the medians over the turns of seconds and of MB that a step needs."""
    places: dict[float, Entries] = {}
    for entry in of(found, axis=axis):
        places.setdefault(entry["trainable" if axis == "method" else axis], []).append(entry)
    needs: Mapping[str, Callable[[dict[str, Any]], float]] = {"seconds": lambda e: e["seconds"], "MB": lambda e: e["peak_mb"] - e["before_mb"]}
    return sorted(places), {name: [median(map(value, places[x])) for x in sorted(places)] for name, value in needs.items()}


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of logarithms: 1 is growth in proportion."""
    import numpy as np

    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def growth(found: Entries) -> list[str]:
    rows = []
    for axis in AXES:
        xs, ys = curve(found, axis)
        if len(xs) >= 4:
            upper = len(xs) // 2
            fits = [f"{exponent(xs[start:], values[start:]):.2f}" for values in ys.values() for start in (0, upper)]
            rows.append([AXIS_NAMES[axis], f"{xs[0]:,} to {xs[-1]:,}", fits[0], fits[1], fits[2], fits[3], f"{ys['seconds'][0] * 1000:.0f} to {ys['seconds'][-1] * 1000:.0f}", f"{ys['MB'][0]:.0f} to {ys['MB'][-1]:.0f}"])
    return [*table(["", "from, to", "exponent of time", "its upper half", "exponent of memory", "its upper half", "ms a step", "MB"], rows), ""]


AXIS_NAMES = {"length": "tokens a row", "batch": "rows a batch", "width": "width of the model", "method": "parameters that learn"}
