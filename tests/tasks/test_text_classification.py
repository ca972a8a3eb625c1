"""Labels keep their order and names, weights weigh, pairs are read together, and decoders know their padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from luthier import UserError
from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.tasks.base import BaselineContext, pad_token
from luthier.tasks.text_classification import TextClassification
from luthier.training import evaluation

TOKENIZER = tiny_tokenizer()
END = tiny_tokenizer("t5").eos_token


def labelled(rows, *labels):
    return rows({"text": "the boat", "label": label} for label in labels)


def test_the_order_of_labels_does_not_depend_on_the_rows(rows):
    names = ["b", "a", "10", "9", "a"]
    for order in (names, names[::-1]):
        found = labelled(rows, *order)
        assert TextClassification.learn(found, found, found).labels == ("9", "10", "a", "b")


def test_names_are_kept_in_the_config(rows, built):
    found = labelled(rows, "spam", "ham")
    config = built(TextClassification.learn(found, found, found)).config
    assert config.id2label == {0: "ham", 1: "spam"} and config.label2id == {"ham": 0, "spam": 1} and config.num_labels == 2


def test_a_label_outside_training_is_named_with_its_place(rows):
    train, other = labelled(rows, "spam", "ham"), labelled(rows, "ham", "spm")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the label 'spm'.*Did you mean 'spam'"):
        TextClassification.learn(train, other, train)
    with pytest.raises(UserError, match="one label"):
        TextClassification.learn(labelled(rows, "spam", "spam"), train, train)


def test_weighted_loss_is_torchs_weighted_mean_however_it_is_split(rows, built):
    found = rows(r | {"label": "rare" if i < 3 else r["label"]} for i, r in enumerate(tiny_rows("text-classification", 24)))
    task = TextClassification.learn(found, found, found, class_weights="balanced")
    model = built(task)
    features = [task.encode(row, TOKENIZER, 48) for row in found]
    batch = task.collate(features, range(24), TOKENIZER)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(**batch.inputs).logits, batch.targets["labels"], weight=torch.tensor(task.weights))
        terms = [task.loss(model, task.collate(features[a:b], range(a, b), TOKENIZER)) for a, b in ((0, 2), (2, 13), (13, 24))]
    assert sum(float(t.sum) for t in terms) / sum(t.count for t in terms) == pytest.approx(float(expected), rel=1e-5)
    counts = np.array([sum(row["label"] == name for row in found) for name in task.labels])
    assert np.allclose(np.array(task.weights) * counts, len(found) / len(counts))  # each class weighs the same


def test_weights_other_than_balanced_are_refused(rows):
    found = labelled(rows, "spam", "ham")
    with pytest.raises(UserError, match="balanced"):
        TextClassification.learn(found, found, found, class_weights="heavy")


def test_a_pair_is_read_as_the_tokenizer_reads_pairs_and_the_longer_text_is_cut(rows):
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = TextClassification(("a", "b"))
    (row,) = rows([{"text": "the boat", "text_pair": "red tree", "label": "a"}])
    features = task.encode(row, tokenizer, 48)
    assert features.inputs == dict(tokenizer("the boat", "red tree"))
    assert features.inputs["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    (long,) = rows([{"text": "the boat " * 10, "text_pair": "red tree", "label": "a"}])
    cut = task.encode(long, tokenizer, 10)
    assert cut.truncated == 15 and tokenizer.decode(cut.inputs["input_ids"]).endswith("[SEP] red tree [SEP]")


def test_scores_are_probabilities_and_top_is_sorted(rows):
    task = TextClassification(("a", "b", "c"))
    logits = [np.array([0.0, 2.0, 1.0], dtype=np.float32)]
    (answer,) = task.predictions(logits, labelled(rows, "a"), top=3)
    expected = torch.softmax(torch.tensor(logits[0]), 0)
    assert answer["predicted"] == "b" and [entry["label"] for entry in answer["top"]] == ["b", "c", "a"]
    assert [entry["score"] for entry in answer["top"]] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)
    assert "top" not in task.predictions(logits, labelled(rows, "a"))[0]


@pytest.mark.parametrize("config_pad", [None, 0, 4])
def test_a_decoder_is_read_at_its_last_real_token_whoever_names_the_padding(config_pad, rows, built):
    """No padding token in the tokenizer, in the config, or two different ones: batches answer as rows alone do."""
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.pad_token = None
    found = rows(tiny_rows("text-classification", 12))
    task = TextClassification.learn(found, found, found)
    model = built(task, "gpt2", pad_token_id=config_pad)
    assert model.config.pad_token_id == (1 if config_pad is None else config_pad) and pad_token(tokenizer) == 1
    features = [task.encode(row, tokenizer, 48) for row in found]
    with torch.no_grad():
        alone = [model.score(model.transformer(torch.tensor([f.inputs["input_ids"]])).last_hidden_state[0, -1]).numpy() for f in features]
    together = evaluation.outputs(model, task, features, tokenizer, batch_size=6)
    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=1e-5)


def test_baselines_are_the_majority_and_a_probe_that_learns(rows):
    found = rows(tiny_rows("text-classification", 60))
    task = TextClassification.learn(found, found, found)
    colours = [[float(word in text.split()) for word in ("red", "blue", "green")] for text in found.column("text")]
    by_text = dict(zip(found.column("text"), colours, strict=True))
    context = BaselineContext(found, found, lambda texts: np.array([by_text[t] for t in texts]), list)
    baselines = task.baselines(context)
    share = max(found.column("label").count(name) for name in task.labels) / len(found)
    assert baselines["majority class"]["accuracy"].value == pytest.approx(share)
    assert baselines["frozen embeddings"]["accuracy"].value == 1.0


@pytest.mark.parametrize("texts", [[("the boat", None), ("the boat", "a tree")], [("the boat", None), (f"the {END} boat {END} runs", None), ("a tree", None)]], ids=["pair", "end of text in a text"])
def test_rows_with_unequal_ends_of_text_go_together(texts, rows, built):
    """T5's head takes only rows with equally many of them at once."""
    tokenizer = tiny_tokenizer("t5")
    found = rows({"text": text, **({"text_pair": pair} if pair else {}), "label": "ab"[i % 2]} for i, (text, pair) in enumerate(texts))
    task = TextClassification.learn(found, found, found)
    model = built(task, "t5")
    features = [task.encode(row, tokenizer, 48) for row in found]
    assert len({f.inputs["input_ids"].count(model.config.eos_token_id) for f in features}) > 1
    together = evaluation.outputs(model, task, features, tokenizer)
    alone = [evaluation.outputs(model, task, [f], tokenizer)[0] for f in features]
    assert np.allclose(together, alone, atol=1e-5)
