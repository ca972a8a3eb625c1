"""What every task promises on every architecture that has its head: neighbours, padding and splits of a batch change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.contract.tiny import tiny_config
from luthier.tasks import find
from luthier.training import evaluation

ENCODERS, DECODERS, ENCODER_DECODERS = ("bert", "roberta", "albert", "distilbert"), ("gpt2", "llama"), ("t5",)
TAGS = ("text-classification", "regression", "token-classification", "text-generation", "sentence-similarity")
CASES = [
    (tag, architecture)
    for tag in TAGS
    for architecture in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)
    if type(tiny_config(architecture)) in getattr(transformers, find(tag).auto_class)._model_mapping
]


def prepare(tag, architecture, by_role, built, side="right"):
    rows = by_role(find(tag), tiny_rows(tag, 12))
    task = find(tag).learn(rows, rows, rows)
    tokenizer = tiny_tokenizer(architecture)
    tokenizer.padding_side = side
    return task, built(task, architecture), tokenizer, [task.encode(row, tokenizer, 48) for row in rows]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("tag", "architecture"), CASES)
def test_one_by_one_equals_batched(tag, architecture, side, by_role, built):
    task, model, tokenizer, features = prepare(tag, architecture, by_role, built, side)
    alone = evaluation.outputs(model, task, features, tokenizer, batch_size=1)
    together = evaluation.outputs(model, task, features, tokenizer, batch_size=5)
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("tag", "architecture"), [case for case in CASES if find(case[0]).loss_per != "batch"])
def test_the_loss_of_a_batch_is_that_of_its_pieces(tag, architecture, side, by_role, built):
    task, model, tokenizer, features = prepare(tag, architecture, by_role, built, side)

    def terms(*cuts):
        with torch.no_grad():
            found = [task.loss(model, task.collate(features[a:b], range(a, b), tokenizer)) for a, b in zip((0, *cuts), (*cuts, len(features)), strict=True)]
        assert {term.per for term in found} == {type(task).loss_per}
        return sum(float(term.sum) for term in found), sum(term.count for term in found)

    whole = terms()
    assert whole[1] == sum(f.units for f in features)
    for cuts in ((1,), (2, 9), tuple(range(1, 12))):
        assert terms(*cuts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("tag", TAGS)
def test_a_task_comes_back_from_its_facts_through_json(tag, by_role):
    import json

    rows = by_role(find(tag), tiny_rows(tag))
    task = find(tag).learn(rows, rows, rows)
    assert find(tag).from_facts(json.loads(json.dumps(task.facts()))) == task


@pytest.mark.parametrize("tag", TAGS)
def test_measures_outcomes_and_picture_come_from_the_same_outputs(tag, by_role, built, tmp_path):
    rows = by_role(find(tag), tiny_rows(tag, 12))
    task, model, tokenizer, features = prepare(tag, "gpt2" if tag == "text-generation" else "bert", by_role, built)
    outputs = evaluation.outputs(model, task, features, tokenizer)
    found = task.measure(outputs, rows)
    assert task.measured_by in found and {name.partition("/")[0] for name in found} <= set(task.measures)
    assert all(m.low <= m.value + 1e-9 and m.value - 1e-9 <= m.high for m in found.values() if np.isfinite(m.low))
    assert len(task.per_row(outputs, rows)) == len(rows)
    task.picture(outputs, rows, tmp_path / "picture.png", before=outputs)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tag", TAGS)
def test_unknown_options_are_answered(tag, by_role):
    from luthier import UserError

    rows = by_role(find(tag), tiny_rows(tag))
    with pytest.raises(UserError, match="has no such option"):
        find(tag).learn(rows, rows, rows, clas_weights="balanced")
