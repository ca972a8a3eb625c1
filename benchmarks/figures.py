"""The pictures of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from tables import AXIS_NAMES, Entries, curve, exponent, of


def speeds(found: Entries, path: Path) -> None:
    methods = [method for method in ("lora", "full") if of(found, what="speed", method=method)]
    figure, axes = _figure(1, len(methods), 4.5, 2.6)
    for axis, method in zip(axes[0], methods, strict=True):
        rates: dict[str, list[float]] = {}
        for entry in of(found, what="speed", method=method):
            rates.setdefault(entry["arm"], []).append(entry["examples_per_s"])
        names = sorted(rates, key=lambda arm: median(rates[arm]))
        middle = [median(rates[arm]) for arm in names]
        spread = [[value - min(rates[arm]) for arm, value in zip(names, middle, strict=True)], [max(rates[arm]) - value for arm, value in zip(names, middle, strict=True)]]
        axis.barh(names, middle, xerr=spread, color=["tab:blue" if arm == "luthier" else "lightgray" for arm in names], ecolor="gray")
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("training examples per second")
    _save(figure, path)


def growth(found: Entries, path: Path) -> None:
    """Seconds above, memory below, each to one scale; dots are measured, the line is fitted to the upper half."""
    import numpy as np

    curves = {axis: curve(found, axis) for axis in AXIS_NAMES}
    shown = [axis for axis, (xs, _) in curves.items() if len(xs) >= 4]
    figure, axes = _figure(2, len(shown), 2.8, 2.4)
    for column, name in enumerate(shown):
        xs, ys = curves[name]
        upper = len(xs) // 2
        for axis, (unit, values) in zip(axes[:, column], ys.items(), strict=True):
            slope = exponent(xs[upper:], values[upper:])
            middle = np.exp(np.mean(np.log(values[upper:])) - slope * np.mean(np.log(xs[upper:])))
            axis.loglog(xs, values, "o", color="tab:blue", markersize=4)
            axis.loglog(xs[upper:], middle * np.array(xs[upper:], dtype=float) ** slope, color="gray", linewidth=1)
            if name != "method":
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter("{x:.0f}")
            axis.set_title(f"grows by power {slope:.2f}", fontsize=9)
            axis.set_ylabel({"seconds": "seconds a step", "MB": "MB"}[unit] if column == 0 else "")
        axes[1, column].set_xlabel(AXIS_NAMES[name])
    _save(figure, path)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharey="row" if rows > 1 else "none")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
