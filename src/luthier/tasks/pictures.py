"""The pictures of a run, in one style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.tasks.base import Metric

BLUE, GREY, RED = "#2f6f9f", "#9a9a9a", "#c0504d"


def _figure(width: float = 6.0, height: float = 4.5) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)


def confusion(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Rows: the true class; each row's shares add to one, counts are written where there is room."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (truth, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(2.5 + 0.55 * len(names), 14)
    figure, axes = _figure(size + 1, size)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:
        for i in range(len(names)):
            for j in range(len(names)):
                if counts[i, j]:
                    axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.55 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{np.trace(counts)} of {counts.sum()} test rows right", loc="left", fontsize=10)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    _save(figure, path)


def residuals(truth: np.ndarray, predicted: np.ndarray, name: str, path: Path) -> None:
    figure, axes = _figure(5.5, 5)
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, label="exact")
    axes.scatter(truth, predicted, s=9, alpha=0.4, color=BLUE, linewidths=0)
    axes.set_xlabel(f"true {name}")
    axes.set_ylabel(f"predicted {name}")
    axes.set_title(f"{len(truth)} test rows, mean absolute error {np.abs(truth - predicted).mean():.3f}", loc="left", fontsize=10)
    axes.legend(frameon=False)
    _save(figure, path)


def bars(metrics: Mapping[str, Metric], label: str, title: str, path: Path) -> None:
    names = list(metrics)
    figure, axes = _figure(6, 1.2 + 0.45 * len(names))
    values = np.array([metrics[n].value for n in names])
    errors = np.array([[max(0, metrics[n].value - metrics[n].low), max(0, metrics[n].high - metrics[n].value)] for n in names]).T
    axes.barh(range(len(names)), values, xerr=errors, color=BLUE, alpha=0.85, error_kw={"ecolor": "black", "elinewidth": 1, "capsize": 3})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, float(np.nanmax(values)) if len(values) else 1.0))
    axes.set_xlabel(label)
    axes.set_title(title, loc="left", fontsize=10)
    _save(figure, path)


def found_within(curves: Mapping[str, np.ndarray], path: Path, deepest: int = 20) -> None:
    """For each set of ranks, the share of questions whose right answer is among the first k."""
    figure, axes = _figure(6, 4)
    depths = np.arange(1, deepest + 1)
    for (name, found), color in zip(curves.items(), (BLUE, GREY, RED), strict=False):
        axes.plot(depths, [(found <= k).mean() for k in depths], marker="o", markersize=3, label=name, color=color)
    axes.set_xlabel("looking at the first k answers")
    axes.set_ylabel("share of questions answered")
    axes.set_ylim(0, 1)
    axes.set_xticks([1, *range(5, deepest + 1, 5)])
    axes.set_title(f"{len(next(iter(curves.values())))} questions", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def histogram(groups: Mapping[str, np.ndarray], label: str, title: str, path: Path) -> None:
    figure, axes = _figure(6, 4)
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=40)
    for (name, values), color in zip(groups.items(), (BLUE, GREY, RED), strict=False):
        axes.hist(values, bins=edges, color=color, alpha=0.6, label=f"{name}, mean {np.mean(values):.2f}")
        axes.axvline(float(np.mean(values)), color=color, linewidth=1.5)
    axes.set_xlabel(label)
    axes.set_ylabel("test rows")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)
    _save(figure, path)
