"""The saved model answers in the scale of the labels, and starts at their mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier import UserError
from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.tasks.base import BaselineContext
from luthier.tasks.regression import Regression
from luthier.training import evaluation

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def scored(by_role):
    return by_role(Regression, [r | {"score": 100 + r["score"]} for r in tiny_rows("regression", 24)])


def answers(task, model, rows, architecture="bert"):
    tokenizer = tiny_tokenizer(architecture)
    return np.array(evaluation.outputs(model, task, [task.encode(row, tokenizer, 48) for row in rows], tokenizer))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "albert", "distilbert", "t5"])
def test_a_new_head_starts_at_the_mean_of_training(architecture, scored, built):
    task = Regression.learn(scored, scored, scored)
    model = built(task, architecture)
    head = [name for name, _ in model.named_parameters() if name.startswith("classif")]
    with torch.no_grad():
        for name in head:
            model.get_parameter(name).zero_()
    assert np.allclose(answers(task.start(model, head), model, scored, architecture), task.mean, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "t5", "gpt2", "llama"])
def test_a_settled_model_answers_in_the_scale_of_the_labels_by_itself(architecture, scored, built):
    task = Regression.learn(scored, scored, scored)
    model = built(task, architecture)
    head = [name for name, _ in model.named_parameters() if name.startswith(("classif", "score"))]
    training = task.start(model, head)
    before = answers(training, model, scored, architecture)
    settled = training.settle(model, head)
    assert settled == task and training != task
    assert np.allclose(answers(task, model, scored, architecture), before, rtol=1e-5, atol=1e-5)  # float32 holds the mean, 106, to 8e-6
    assert Regression.from_facts(training.facts()) == task


def test_a_head_that_exists_is_left_alone(scored, built):
    task = Regression.learn(scored, scored, scored)
    model = built(task)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert task.start(model, []).settle(model, []) == task
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_loss_is_the_squared_error_in_units_of_the_labels_spread(scored, built):
    task = Regression.learn(scored, scored, scored)
    model = built(task)
    batch = task.collate([task.encode(row, TOKENIZER, 48) for row in scored], range(24), TOKENIZER)
    with torch.no_grad():
        found, predicted = task.loss(model, batch), model(**batch.inputs).logits[:, 0].double().numpy()
    truth = np.array(scored.column("label"))
    assert float(found.sum) / found.count == pytest.approx(((predicted - truth) ** 2).mean() / truth.var(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6], ids=["small", "one", "large"])
def test_it_learns_numbers_of_any_scale(scale, by_role, built):
    rows = by_role(Regression, [r | {"score": scale * (100 + r["score"])} for r in tiny_rows("regression", 24)])
    task = Regression.learn(rows, rows, rows)
    model = built(task)
    head = ["classifier.weight", "classifier.bias"]
    task = task.start(model, head)
    batch = task.collate([task.encode(row, TOKENIZER, 48) for row in rows], range(24), TOKENIZER)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        term = task.loss(model, batch)
        (term.sum / term.count).backward()
        optimizer.step()
    task = task.settle(model, head)
    assert task.measure(answers(task, model, rows), rows)["r2"].value > 0.9


def test_one_number_is_refused(by_role):
    same = by_role(Regression, [{"text": f"boat {i}", "score": 1.5} for i in range(80)])
    with pytest.raises(UserError, match="nothing to learn"):
        Regression.learn(same, same, same)


def test_baselines_are_finite_and_the_mean_explains_nothing(scored):
    task = Regression.learn(scored, scored, scored)
    lengths = lambda texts: np.array([[len(t.split())] for t in texts], dtype=float)  # noqa: E731
    baselines = task.baselines(BaselineContext(scored, scored, lengths, list))
    assert baselines["mean"].keys() == {"mae", "r2"} and baselines["mean"]["r2"].value == pytest.approx(0, abs=1e-9)
    assert baselines["frozen embeddings"]["pearson"].value > 0.99
