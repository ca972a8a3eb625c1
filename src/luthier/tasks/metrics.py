"""Point values as scikit-learn and seqeval define them, with bootstrap 95 % intervals over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from luthier.tasks.base import Metric

RESAMPLES = 1000
LEVEL = (2.5, 97.5)


def resampled_sums(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """(rows, k) -> (RESAMPLES, k): the sums over rows drawn with replacement. Some resamples at a time, so that memory stays bounded on many rows."""
    rng = np.random.default_rng(seed)
    rows = len(values)
    shares = np.full(rows, 1 / rows)
    at_once = max(1, min(RESAMPLES, 4_000_000 // rows))
    counts = (min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once))
    return np.concatenate([rng.multinomial(rows, shares, size=count).astype(np.float64) @ values for count in counts])


def interval(value: float, draws: np.ndarray) -> Metric:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return Metric(float(value), float("nan"), float("nan"))
    low, high = np.percentile(finite, LEVEL)
    return Metric(float(value), float(low), float(high))


@dataclass(frozen=True)
class Count:
    """A metric as a function of what adds over rows. numbers (rows, k); score (n, k) -> (n,)."""

    numbers: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


def mean(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> Count:
    """The (weighted) mean of one number per row."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    return Count(np.stack([values * weights, weights], axis=1), lambda s: s[:, 0] / s[:, 1])


def measured(counts: Mapping[str, Count]) -> dict[str, Metric]:
    """All by the same resamples, which are drawn once: with many rows the draws are what takes time."""
    drawn = resampled_sums(np.concatenate([count.numbers for count in counts.values()], axis=1))
    found, start = {}, 0
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, count in counts.items():
            width = count.numbers.shape[1]
            found[name] = interval(float(count.score(count.numbers.sum(0, keepdims=True))[0]), count.score(drawn[:, start : start + width]))
            start += width
    return found


def classification(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, Metric]:
    """Accuracy and macro-F1 over the classes that occur. truth, predicted (rows,) class numbers."""
    onehot_true, onehot_predicted = np.eye(classes)[truth], np.eye(classes)[predicted]
    counts = np.concatenate([onehot_true * onehot_predicted, onehot_true, onehot_predicted], axis=1)

    def macro_f1(sums: np.ndarray) -> np.ndarray:
        hits, true, guessed = np.split(sums, 3, axis=1)
        occurs = (true + guessed) > 0
        f1 = np.where(occurs, 2 * hits / np.maximum(true + guessed, 1e-12), 0.0)
        return f1.sum(1) / np.maximum(occurs.sum(1), 1)

    return measured({"accuracy": mean(truth == predicted), "macro_f1": Count(counts, macro_f1)})


def regression(truth: np.ndarray, predicted: np.ndarray) -> dict[str, Metric]:
    """Pearson, Spearman, mean absolute error and R^2."""
    error, centred = predicted - truth, truth - truth.mean()
    sums = np.stack([error**2, centred**2, centred, np.ones_like(truth)], axis=1)

    def r2(s: np.ndarray) -> np.ndarray:
        spread = s[:, 1] - s[:, 2] ** 2 / s[:, 3]
        return 1 - s[:, 0] / np.where(spread > 0, spread, np.nan)

    found = measured({"pearson": Count(_moments(truth, predicted), _pearson), "mae": mean(np.abs(error)), "r2": Count(sums, r2)})
    return {"pearson": found["pearson"], "spearman": spearman(truth, predicted), "mae": found["mae"], "r2": found["r2"]}


def spearman(truth: np.ndarray, predicted: np.ndarray) -> Metric:
    """Rank correlation; each resample is ranked anew."""
    from scipy.stats import rankdata

    def of(a: np.ndarray, b: np.ndarray) -> float:
        return float(_pearson(_moments(rankdata(a), rankdata(b)).sum(0, keepdims=True))[0])

    rng = np.random.default_rng(0)
    draws = (rng.integers(len(truth), size=len(truth)) for _ in range(RESAMPLES))
    return interval(of(truth, predicted), np.array([of(truth[chosen], predicted[chosen]) for chosen in draws]))


def _moments(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(rows, 6): what correlation needs of each row. Standardised first, so that no digits are lost to a far mean or a small scale."""
    a, b = _standardised(a), _standardised(b)
    return np.stack([np.ones_like(a), a, b, a * b, a * a, b * b], axis=1)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std() if np.ptp(values) > 0 else np.zeros_like(values)


def _pearson(sums: np.ndarray) -> np.ndarray:
    """(n, 6) sums of `_moments` -> (n,) correlations; nan where one side is constant."""
    n, a, b, ab, aa, bb = sums.T
    variances = np.stack([aa / n - (a / n) ** 2, bb / n - (b / n) ** 2])
    return (ab / n - a * b / n**2) / np.sqrt(np.where(variances > 1e-12, variances, np.nan).prod(0))


def f1_from_counts(sums: np.ndarray) -> np.ndarray:
    """(n, 3) of hits, true and predicted -> F1, 0 where there is neither."""
    return np.where(sums[:, 1] + sums[:, 2] > 0, 2 * sums[:, 0] / np.maximum(sums[:, 1] + sums[:, 2], 1e-12), 0.0)


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The rank (from 1) of each row's right column; other columns of equal score count against it. scores (rows, columns)."""
    own = scores[np.arange(len(scores)), right][:, None]
    better = (scores > own).sum(1)
    tied = (scores == own).sum(1) - 1
    return 1 + better + tied


def retrieval(found: np.ndarray) -> dict[str, Metric]:
    """MRR, nDCG@10 and top-1 of ranks (rows,), with one right answer a row."""
    return measured({
        "mrr": mean(1 / found),
        "ndcg@10": mean(np.where(found <= 10, 1 / np.log2(found + 1), 0.0)),
        "top1": mean(found == 1),
    })
