"""Words and pieces line up, scores are seqeval's, and words that were cut off are counted."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import seqeval.metrics
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from luthier import UserError
from luthier.contract.texts import WORDS, tiny_rows, tiny_tokenizer
from luthier.tasks.base import BaselineContext
from luthier.tasks.token_classification import IGNORED, TokenClassification, spaced
from luthier.training import evaluation

LABELS = ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")


def byte_level(prefix: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([" ".join(WORDS)] * 20, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def tagged():
    """Random tags, broken ones such as I- after O included; some sentences hold no entity."""
    rng = np.random.default_rng(0)
    return [[LABELS[i] for i in rng.choice(5, size=rng.integers(1, 9), p=(0.5, 0.15, 0.15, 0.1, 0.1))] for _ in range(80)]


def as_rows(rows, tags):
    return rows({"words": [f"w{i}" for i in range(len(t))], "tags": t} for t in tags)


def test_scores_equal_seqeval(tagged, rows):
    rng = np.random.default_rng(1)
    guesses = [[tag if rng.random() < 0.7 else LABELS[rng.integers(5)] for tag in tags] for tags in tagged]
    found = TokenClassification(LABELS).measure([np.array([LABELS.index(t) for t in g]) for g in guesses], as_rows(rows, tagged))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = seqeval.metrics.classification_report(tagged, guesses, output_dict=True)
    assert found["f1"].value == pytest.approx(seqeval.metrics.f1_score(tagged, guesses))
    assert found["precision"].value == pytest.approx(seqeval.metrics.precision_score(tagged, guesses))
    assert found["recall"].value == pytest.approx(seqeval.metrics.recall_score(tagged, guesses))
    assert found["accuracy"].value == pytest.approx(seqeval.metrics.accuracy_score(tagged, guesses))
    for kind in ("PER", "LOC"):
        assert found[f"f1/{kind}"].value == pytest.approx(report[kind]["f1-score"])
    assert all(m.low <= m.value <= m.high for m in found.values())


def test_resampled_scores_equal_seqeval_on_the_repeated_rows(tagged, rows):
    """The counts of a row, added, are the counts of the rows: seqeval on a list with repeats says the same."""
    chosen = np.random.default_rng(2).integers(len(tagged), size=len(tagged))
    guesses = [tags[::-1] for tags in tagged]
    repeated = as_rows(rows, [tagged[i] for i in chosen])
    found = TokenClassification(LABELS).measure([np.array([LABELS.index(t) for t in guesses[i]]) for i in chosen], repeated)
    assert found["f1"].value == pytest.approx(seqeval.metrics.f1_score([tagged[i] for i in chosen], [guesses[i] for i in chosen]))


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), byte_level(), byte_level(prefix=True)], ids=["words", "byte-level", "byte-level with prefix"])
def test_a_sentence_reads_as_running_text_with_one_label_a_word(tokenizer, rows):
    words, tags = ["the", "old", "riverboat", "sings", "over", "the", "tree"], ["O", "O", "B-LOC", "O", "O", "O", "B-PER"]
    (row,) = rows([{"words": words, "tags": tags}])
    features = TokenClassification(LABELS).encode(row, tokenizer, 96)
    assert features.inputs["input_ids"] == tokenizer(" ".join(words))["input_ids"]
    labels, places, count = features.target
    assert [LABELS[label] for label in labels if label != IGNORED] == tags
    assert [place for place in places if place >= 0] == list(range(7)) and (count, features.units) == (7, 7)


def test_spaces_are_added_only_where_they_are_missing():
    assert spaced(["a", "b"], tiny_tokenizer()) == ["a", "b"]
    assert spaced(["a", "b"], byte_level(prefix=True)) == ["a", "b"]
    assert spaced(["a", "b"], byte_level()) == ["a", " b"]


def test_only_first_pieces_are_supervised_and_the_count_is_of_words(rows, built):
    tokenizer = byte_level()
    found = rows([{"words": ["riverboat", "tree"], "tags": ["B-LOC", "O"]}, {"words": ["greenish"], "tags": ["O"]}])
    task = TokenClassification(("O", "B-LOC"))
    model = built(task, "gpt2", vocab_size=300)
    batch = task.collate([task.encode(row, tokenizer, 48) for row in found], (0, 1), tokenizer)
    with torch.no_grad():
        term, logits = task.loss(model, batch), model(**batch.inputs).logits
    expected = 0.0
    for row, tags in enumerate(found.column("tags")):
        firsts = [i for i, place in enumerate(batch.targets["words"][row].tolist()) if place >= 0]
        expected += sum(float(nn.functional.cross_entropy(logits[row, i], torch.tensor(task.labels.index(tag)))) for i, tag in zip(firsts, tags, strict=True))
    assert float(term.sum) == pytest.approx(expected, rel=1e-5) and term.count == 3


def test_words_cut_off_are_predicted_outside_and_counted(rows, built):
    tokenizer = tiny_tokenizer()
    found = rows([{"words": ["the", "boat", "red", "red", "red"], "tags": ["O", "O", "B-PER", "B-PER", "B-PER"]}])
    task = TokenClassification(("O", "B-PER"))
    model = built(task)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # always B-PER
    features = [task.encode(row, tokenizer, 5) for row in found]
    assert (features[0].truncated, features[0].units) == (2, 3)
    outputs = evaluation.outputs(model, task, features, tokenizer)
    assert outputs[0].tolist() == [1, 1, 1, 0, 0]
    assert task.measure(outputs, found)["recall"].value == pytest.approx(1 / 3)


def test_entities_are_given_with_type_text_and_place(rows):
    found = rows([{"words": ["Anna", "Maria", "lives", "in", "Bonn"], "tags": ["O"] * 5}])
    (answer,) = TokenClassification(LABELS).predictions([np.array([2, 4, 0, 0, 1])], found)
    assert answer["predicted"] == ["B-PER", "I-PER", "O", "O", "B-LOC"]
    assert answer["entities"] == [{"type": "PER", "text": "Anna Maria", "start": 0, "end": 2}, {"type": "LOC", "text": "Bonn", "start": 4, "end": 5}]


@pytest.mark.parametrize("tag", ["NOUN", "3", "PER", "B-", "b-PER"])
def test_tags_that_spell_no_entities_are_refused(tag, rows):
    good, bad = rows([{"words": ["a"], "tags": ["B-PER"]}]), rows([{"words": ["a", "b"], "tags": ["O", tag]}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the tag .* is not BIO"):
        TokenClassification.learn(bad, good, good)


def test_mistakes_in_rows_are_named_with_their_place(rows):
    good = rows([{"words": ["a", "b"], "tags": ["B-PER", "O"]}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 2 words, but 1 tags"):
        TokenClassification.learn(good, rows([{"words": ["a", "b"], "tags": ["O"]}]), good)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the tag 'B-PRE'.*Did you mean 'B-PER'"):
        TokenClassification.learn(good, rows([{"words": ["a"], "tags": ["B-PRE"]}]), good)
    with pytest.raises(UserError, match="nothing to find"):
        TokenClassification.learn(rows([{"words": ["a"], "tags": ["O"]}]), good, good)


def test_the_baseline_is_each_words_most_frequent_tag(rows):
    train = rows([{"words": ["Bonn", "is", "Bonn"], "tags": ["B-LOC", "O", "O"]}, {"words": ["Bonn"], "tags": ["B-LOC"]}])
    test = rows([{"words": ["Bonn", "Anna"], "tags": ["B-LOC", "B-PER"]}])
    task = TokenClassification(("O", "B-LOC", "B-PER"))
    found = task.baselines(BaselineContext(train, test, np.array, list))["most frequent tag"]
    assert (found["precision"].value, found["recall"].value) == (1.0, 0.5)


def test_words_that_were_cut_off_are_outside_whatever_order_the_tags_have(by_role, built) -> None:
    rows = by_role(TokenClassification, tiny_rows("token-classification", 6))
    task = dataclasses.replace(TokenClassification.learn(rows, rows, rows), labels=("B-COL", "B-SIZE", "O"))
    model = built(task)
    features = [task.encode(row, tiny_tokenizer(), 4) for row in rows]
    outputs = evaluation.outputs(model, task, features, tiny_tokenizer())
    for feature, tags in zip(features, outputs, strict=True):
        read = {word for word in feature.target[1] if word >= 0}
        assert all(tags[word] == 2 for word in range(len(tags)) if word not in read)
