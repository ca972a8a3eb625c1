"""Texts that are the same text are never each other's wrong answer, in training and in the ranks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import UserError
from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.tasks.base import BaselineContext
from luthier.tasks.sentence_similarity import SCALE, SentenceSimilarity, _bm25_ranks, allowed_candidates
from luthier.training import evaluation

TOKENIZER = tiny_tokenizer()
WORDS = ("red", "blue", "green", "small", "large", "old")


def pairs(count=10, seed=0, negatives=0.5, few=WORDS):
    """Pairs that meet again: equal queries, equal documents, negatives that are another row's document."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        row = {"query": str(rng.choice(few)), "document": f"the {rng.choice(few)}"}
        if rng.random() < negatives:
            row["negative"] = f"the {rng.choice(few)}"
        made.append(row)
    return made


def slow_loss(queries, documents, negatives, rows, symmetric=False):
    """Row by row and candidate by candidate, by the texts themselves."""
    right = {}
    for row in rows:
        right.setdefault(row["query"], set()).add(row["document"])
    total = 0.0
    for i, row in enumerate(rows):
        own = SCALE * float(queries[i] @ documents[i])
        scores = [own]
        scores += [SCALE * float(queries[i] @ documents[j]) for j, other in enumerate(rows) if j != i and other["document"] not in right[row["query"]]]
        scores += [SCALE * float(queries[i] @ vector) for text, vector in negatives if text not in right[row["query"]]]
        forward = math.log(sum(math.exp(s - own) for s in scores))
        back = [own, *(SCALE * float(queries[j] @ documents[i]) for j, other in enumerate(rows) if j != i and row["document"] not in right[other["query"]])]
        total += (forward + math.log(sum(math.exp(s - own) for s in back))) / 2 if symmetric else forward
    return total


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_equals_a_slow_reference_that_knows_the_texts(seed, symmetric, rows, built):
    found = rows(pairs(seed=seed))
    task = SentenceSimilarity.learn(found, found, found, symmetric=symmetric)
    model = built(task)
    features = [task.encode(row, TOKENIZER, 48) for row in found]
    batch = task.collate(features, range(len(found)), TOKENIZER)

    def vector(text):
        with torch.no_grad():
            hidden = model(**TOKENIZER(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return (hidden / hidden.norm()).double().numpy()

    queries, documents = ([vector(row[part]) for row in found] for part in ("query", "document"))
    negatives = [(row["negative"], vector(row["negative"])) for row in found if row.get("negative")]
    with torch.no_grad():
        term = task.loss(model, batch)
    assert float(term.sum) == pytest.approx(slow_loss(queries, documents, negatives, found, symmetric), rel=1e-4)
    assert (term.count, term.per) == (len(found), "batch")


def test_a_batch_in_which_nothing_is_wrong_teaches_nothing(rows, built):
    task = SentenceSimilarity()
    found = rows([{"query": "red", "document": "the boat"}, {"query": "blue", "document": "the boat"}, {"query": "red", "document": "the tree"}, {"query": "blue", "document": "the tree"}])
    term = task.loss(built(task), task.collate([task.encode(row, TOKENIZER, 48) for row in found], range(4), TOKENIZER))
    assert float(term.sum) == pytest.approx(0, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8), negatives=st.lists(st.integers(0, 4), max_size=4))
def test_candidates_compete_by_a_definition_in_words(rows, negatives):
    """A text competes in a row unless it is the row's own document, or one that a row of the same query gives; the row's own place counts."""
    queries, documents = [q for q, _ in rows], [d for _, d in rows] + negatives
    allowed = allowed_candidates(torch.tensor(queries), torch.tensor(documents))
    for i, query in enumerate(queries):
        right = {d for q, d in rows if q == query}
        assert allowed[i].tolist() == [j == i or text not in right for j, text in enumerate(documents)]


def test_masking_is_by_text_never_by_likeness(rows, built):
    """Two different texts that the model cannot tell apart are still each other's wrong answer."""
    task = SentenceSimilarity()
    found = rows([{"query": "red", "document": "unknownone"}, {"query": "blue", "document": "unknowntwo"}])  # both read [UNK]
    term = task.loss(built(task), task.collate([task.encode(row, TOKENIZER, 48) for row in found], range(2), TOKENIZER))
    assert float(term.sum) / 2 == pytest.approx(math.log(2), rel=1e-4)


def slow_cosent(cosines, scores):
    return math.log(1 + sum(math.exp(SCALE * (cosines[j] - cosines[i])) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]))


def test_scored_pairs_learn_their_order_by_cosent(rows, built):
    found = rows({"query": q, "document": d, "score": s} for q, d, s in (("red", "blue", 1.0), ("old boat", "new boat", 4.0), ("the tree", "runs", 1.0), ("river", "a river", 3.5)))
    task = SentenceSimilarity.learn(found, found, found)
    assert task.scored and task.measured_by == "spearman"
    model = built(task)
    features = [task.encode(row, TOKENIZER, 48) for row in found]
    outputs = evaluation.outputs(model, task, features, TOKENIZER)
    cosines = [float(v[0] @ v[1]) for v in outputs]
    with torch.no_grad():
        term = task.loss(model, task.collate(features, range(4), TOKENIZER))
    assert float(term.sum) / term.count == pytest.approx(slow_cosent(cosines, found.column("score")), rel=1e-4)

    from scipy.stats import spearmanr

    assert task.measure(outputs, found)["spearman"].value == pytest.approx(spearmanr(cosines, found.column("score")).statistic)


def test_ranks_merge_equal_documents_and_forgive_other_right_ones(rows):
    found = rows([{"query": "a", "document": "X"}, {"query": "a", "document": "Y"}, {"query": "b", "document": "X"}, {"query": "c", "document": "Z"}])
    unit = {"X": [1, 0, 0], "Y": [0, 1, 0], "Z": [0, 0, 1]}
    asks = {"a": [0.6, 0.8, 0], "b": [0, 0.8, 0.6], "c": [0, 0, 1]}
    outputs = [np.array([asks[row["query"]], unit[row["document"]]]) for row in found]
    per_row = SentenceSimilarity().per_row(outputs, found)
    # a: X is beaten by Y only, which is right for a too; b: Y and Z stand before X
    assert per_row == pytest.approx([1, 1, 1 / 3, 1])
    assert SentenceSimilarity().measure(outputs, found)["mrr"].value == pytest.approx(np.mean(per_row))


def test_prefixes_stand_before_the_text_they_belong_to(rows):
    task = SentenceSimilarity(query_prefix="old ", document_prefix="new ")
    (row,) = rows([{"query": "boat", "document": "tree", "negative": "bird"}])
    parts = task.encode(row, TOKENIZER, 48).parts
    assert {name: TOKENIZER.decode(part.inputs["input_ids"], skip_special_tokens=True) for name, part in parts.items()} == {"query": "old boat", "document": "new tree", "negative": "new bird"}


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_reads_real_tokens_only(pooling, rows, built):
    task = SentenceSimilarity(pooling=pooling)
    model = built(task)
    found = rows([{"query": "the old boat runs"}, {"query": "boat"}])
    outputs = evaluation.outputs(model, task, [task.encode(row, TOKENIZER, 48) for row in found], TOKENIZER)
    for row, vectors in zip(found, outputs, strict=True):
        with torch.no_grad():
            hidden = model(**TOKENIZER(row["query"], return_tensors="pt")).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        np.testing.assert_allclose(vectors[0], expected / expected.norm(), atol=1e-5)


@pytest.mark.parametrize(
    ("written", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls", "embedding_dimension": 32}, "first"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling_and_prefixes_come_from_the_models_own_folder(written, pooling, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(written))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: ", "passage": "passage: "}}))
    assert SentenceSimilarity.model_options(tmp_path) == {"pooling": pooling, "query_prefix": "query: ", "document_prefix": "passage: "}


@pytest.mark.parametrize("written", [{"pooling_mode_max_tokens": True}, {"pooling_mode": "weightedmean"}, {"pooling_mode": ["cls", "mean"]}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}])
def test_a_pooling_that_luthier_lacks_is_refused_and_can_be_overridden(written, tmp_path, rows):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(written))
    found = rows(pairs())
    asked = SentenceSimilarity.model_options(tmp_path)
    with pytest.raises(UserError, match="--set pooling"):
        SentenceSimilarity.learn(found, found, found, **asked)
    assert SentenceSimilarity.learn(found, found, found, **{**asked, "pooling": "first"}).pooling == "first"


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_sentence_transformers_opens_the_folder_and_says_the_same(pooling, tmp_path, rows, built):
    library = pytest.importorskip("sentence_transformers")
    task = SentenceSimilarity(pooling=pooling, query_prefix="old ", document_prefix="new ")
    model = built(task)
    model.save_pretrained(str(tmp_path))
    TOKENIZER.save_pretrained(str(tmp_path))
    task.companions(tmp_path, 40)
    opened = library.SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    found = rows({"query": r["query"], "document": r["document"]} for r in tiny_rows("sentence-similarity", 5))
    ours = np.stack(evaluation.outputs(model, task, [task.encode(row, TOKENIZER, 48) for row in found], TOKENIZER))
    np.testing.assert_allclose(opened.encode(found.column("query"), prompt_name="query"), ours[:, 0], atol=1e-5)
    np.testing.assert_allclose(opened.encode(found.column("document"), prompt_name="document"), ours[:, 1], atol=1e-5)
    assert SentenceSimilarity.model_options(tmp_path) == {"pooling": pooling, "query_prefix": "old ", "document_prefix": "new "}


def test_bm25_finds_by_words_inside_names_and_survives_rows_without_words(rows):
    code = rows([{"query": "read file lines", "document": "def readLines(path): return open_file(path)"}, {"query": "close socket", "document": "def shut_down(socket): socket.close()"}, {"query": "x", "document": "y"}])
    assert _bm25_ranks(code)[:2].tolist() == [1, 1]
    assert _bm25_ranks(rows([{"query": "?", "document": "!!"}, {"query": "!", "document": "??"}])).shape == (2,)


def test_baselines_are_bm25_and_the_unchanged_model(rows, built):
    found = rows(tiny_rows("sentence-similarity", 12))
    task = SentenceSimilarity()
    model = built(task)
    outputs = evaluation.outputs(model, task, [task.encode(row, TOKENIZER, 48) for row in found], TOKENIZER)
    baselines = task.baselines(BaselineContext(found, found, np.array, lambda: outputs))
    assert baselines["unchanged model"] == task.measure(outputs, found)
    assert baselines["BM25"]["mrr"].value > 0.5  # the documents are the queries' words in another order


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([{"query": "a", "document": "b", "score": 1.0}, {"query": "a", "document": "c"}], {}, r"rows\.jsonl:2: the score is missing"),
        ([{"query": "a", "document": "b", "score": 1.0}, {"query": "a", "document": "c", "score": 2.0}], {"symmetric": True}, "symmetric"),
        ([{"query": "a", "document": "b"}], {"symmetric": "yes"}, "true or false"),
        ([{"query": "a", "document": "b"}], {"pooling": "max"}, "mean, first, last"),
    ],
)
def test_mistakes_are_named(values, options, message, rows):
    found = rows(values)
    with pytest.raises(UserError, match=message):
        SentenceSimilarity.learn(found, found, found, **options)
