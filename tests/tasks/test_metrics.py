"""Point values equal scikit-learn, SciPy and slow loops; intervals behave as intervals do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from luthier.tasks import metrics

rng = np.random.default_rng(1)


def test_classification_equals_scikit_learn_with_a_class_that_never_occurs():
    truth, predicted = rng.integers(0, 4, 300), rng.integers(0, 5, 300)  # class 4 is only predicted, class 5 occurs nowhere
    found = metrics.classification(truth, predicted, 6)
    assert found["accuracy"].value == pytest.approx(sklearn.accuracy_score(truth, predicted))
    assert found["macro_f1"].value == pytest.approx(sklearn.f1_score(truth, predicted, average="macro"))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-6, 0.0), (1.0, 1e5)])
def test_regression_equals_scikit_learn_and_scipy_at_every_scale(scale, shift):
    truth = rng.normal(size=200).round(1) * scale + shift
    predicted = truth + rng.normal(size=200) * scale
    found = {name: m.value for name, m in metrics.regression(truth, predicted).items()}
    expected = {
        "pearson": stats.pearsonr(truth, predicted).statistic,
        "spearman": stats.spearmanr(truth, predicted).statistic,
        "mae": sklearn.mean_absolute_error(truth, predicted),
        "r2": sklearn.r2_score(truth, predicted),
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_constant_prediction_has_no_correlation():
    found = metrics.regression(np.arange(10.0), np.full(10, 4.5))
    assert np.isnan(found["pearson"].value) and np.isnan(found["spearman"].value) and found["r2"].value == pytest.approx(0)


def test_resampled_sums_equal_a_loop_over_resamples_and_do_not_depend_on_the_chunk():
    values = rng.normal(size=(7, 2))
    draws = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=metrics.RESAMPLES)
    slow = np.array([sum((np.repeat(values[i : i + 1], n, axis=0).sum(0) for i, n in enumerate(draw)), np.zeros(2)) for draw in draws])
    assert np.allclose(metrics.resampled_sums(values), slow)
    many = rng.normal(size=(10_000, 1))  # more than one chunk
    whole = np.random.default_rng(0).multinomial(10_000, np.full(10_000, 1e-4), size=metrics.RESAMPLES) @ many
    assert np.allclose(metrics.resampled_sums(many), whole)


def mean_of(values, weights=None):
    return metrics.measured({"mean": metrics.mean(values, weights)})["mean"]


def test_metrics_measured_together_are_those_measured_alone():
    counts = {"a": metrics.mean(rng.normal(size=80)), "b": metrics.Count(rng.integers(0, 5, (80, 3)).astype(float), metrics.f1_from_counts)}
    together = metrics.measured(counts)
    for name, count in counts.items():
        alone = metrics.measured({name: count})[name]
        assert np.allclose([alone.value, alone.low, alone.high], [together[name].value, together[name].low, together[name].high])


def test_intervals_hold_the_value_and_are_as_wide_as_the_standard_error_says():
    values = rng.normal(3, 2, size=400)
    found = mean_of(values)
    error = values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert mean_of(values) == found  # seeded


def test_intervals_cover_the_true_value_as_often_as_they_say():
    draws = np.random.default_rng(2)
    covers = [found.low <= 0.7 <= found.high for found in (mean_of(draws.random(150) < 0.7) for _ in range(200))]
    assert 0.88 <= np.mean(covers) <= 0.99


def test_spearman_interval_covers_the_true_correlation():
    draws = np.random.default_rng(3)
    pairs = draws.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=500)
    found = metrics.spearman(pairs[:, 0], pairs[:, 1])
    assert found.low < 6 / np.pi * np.arcsin(0.4) < found.high


def test_a_weighted_mean_is_the_mean_of_what_the_weights_count():
    shares, weights = rng.random(30), rng.integers(1, 9, 30)
    assert mean_of(shares, weights).value == pytest.approx(np.repeat(shares, weights).mean())


def test_ranks_count_better_and_equal_columns():
    scores = np.array([[0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [3.0, 2.0, 1.0]])
    assert metrics.ranks(scores, np.array([2, 0, 0])).tolist() == [2, 3, 1]


def test_retrieval_equals_scikit_learns_ndcg():
    scores, right = rng.normal(size=(50, 30)), rng.integers(0, 30, 50)
    found = metrics.retrieval(metrics.ranks(scores, right))
    relevant = np.eye(30)[right]
    assert found["ndcg@10"].value == pytest.approx(sklearn.ndcg_score(relevant, scores, k=10))
    assert found["mrr"].value == pytest.approx(sklearn.label_ranking_average_precision_score(relevant, scores))
    assert found["top1"].value == pytest.approx((scores.argmax(1) == right).mean())
