"""Sentence embedding: a query near the document that answers it, or pairs as near as their scores say."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.batch import Batch
from luthier.data.columns import Column
from luthier.data.rows import Row, Rows
from luthier.errors import UserError
from luthier.tasks import metrics, pictures
from luthier.tasks.base import BaselineContext, Features, Metric, Task, Term, as_floats, encode_texts, hidden_states, padded

SCALE = 20.0  # inverse temperature of the cosine similarities
POOLINGS = ("mean", "first", "last")


@dataclass(frozen=True)
class SentenceSimilarity(Task):
    """scored: rows carry a number for how alike their two texts are, and Spearman's correlation is measured; otherwise retrieval is.

    symmetric  also ask each document for its query, at half the weight each way
    """

    scored: bool = False
    pooling: str = "mean"
    query_prefix: str = ""
    document_prefix: str = ""
    symmetric: bool = False

    tag = "sentence-similarity"
    use = "vectors: near for a question and its answer; search"
    columns = (
        Column("query", "text", names=("query", "question", "docstring", "anchor", "sentence1", "text"), use="what is asked"),
        Column("document", "text", names=("document", "answer", "code", "positive", "sentence2", "text_pair"), use="what should be found"),
        Column("negative", "text", required=False, names=("negative", "hard_negative"), use="what should not be found"),
        Column("score", "number", required=False, names=("score", "similarity"), use="how alike the two are, instead of pairs that all belong together"),
    )
    metric = "mrr"
    measures = ("mrr", "ndcg@10", "top1", "spearman")
    auto_class = "AutoModel"
    options = {"pooling": "mean", "query_prefix": "", "document_prefix": "", "symmetric": False}
    reads = ("query",)
    loss_per = "batch"

    @classmethod
    def claims(cls, columns, given, config):
        lower = {name.lower() for name in columns if "text" in columns[name]}
        for first, second in (("query", "document"), ("query", "positive"), ("anchor", "positive"), ("question", "answer"), ("docstring", "code")):
            if {first, second} <= lower or {"query", "document"} <= set(given):
                return f"columns {first!r} and {second!r} are texts that belong together"
        return None

    @classmethod
    def model_options(cls, folder: Path) -> dict[str, Any]:
        """Pooling and prefixes that the model's own sentence-transformers files ask for."""
        found: dict[str, Any] = {}
        pooling = folder / "1_Pooling" / "config.json"
        if pooling.is_file():
            found["pooling"] = _pooling(json.loads(pooling.read_text(encoding="utf-8")))
        prompts = folder / "config_sentence_transformers.json"
        if prompts.is_file():
            given = json.loads(prompts.read_text(encoding="utf-8")).get("prompts") or {}
            found |= {f"{part}_prefix": given[name] for part, names in (("query", ("query",)), ("document", ("document", "passage"))) for name in names if given.get(name)}
        return found

    @classmethod
    def configured(cls, scored: bool = False, **options: Any) -> SentenceSimilarity:
        """Raises UserError for a pooling that luthier does not have."""
        given = cls.take_options(options)
        if given["pooling"] not in POOLINGS:
            raise UserError(f"The pooling {given['pooling']!r} (of --set pooling, or of the model's 1_Pooling/config.json) is not one of luthier's: {', '.join(POOLINGS)}. Choose with --set pooling=NAME.")
        if not isinstance(given["symmetric"], bool):
            raise UserError(f"--set symmetric={given['symmetric']!r}: choose true or false.")
        if scored and given["symmetric"]:
            raise UserError("--set symmetric=true is for pairs that belong together; these rows have scores, which read the same from both sides.")
        return cls(scored, given["pooling"], str(given["query_prefix"]), str(given["document_prefix"]), given["symmetric"])

    @classmethod
    def learn(cls, train, validation, test, **options):
        task = cls.configured("score" in train.columns, **options)
        for rows in (train, validation, test):
            task.check(rows)
        return task

    @property
    def measured_by(self) -> str:
        return self.metrics[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("spearman",) if self.scored else ("mrr", "ndcg@10", "top1")

    def check(self, rows: Rows) -> None:
        for row in rows if self.scored else ():
            if row.get("score") is None:
                raise UserError(f"{row.where}: the score is missing, which other rows have. Fill it in, or leave the row out.")

    def facts(self):
        return {"scored": self.scored, "pooling": self.pooling, "query_prefix": self.query_prefix, "document_prefix": self.document_prefix, "symmetric": self.symmetric}

    def encode(self, row: Row, tokenizer: Any, max_length: int) -> Features:
        parts: dict[str, Features] = {}
        for part in ("query", "document", "negative"):
            if row.get(part) is not None:
                parts[part] = self.encode_text(row[part], part, tokenizer, max_length)
        return Features(target=(row.get("query"), row.get("document"), row.get("negative"), row.get("score")), truncated=sum(p.truncated for p in parts.values()), parts=parts)

    def prefix(self, part: str) -> str:
        """What stands before the texts of a part: query, document or negative."""
        return self.query_prefix if part == "query" else self.document_prefix

    def encode_text(self, text: str, part: str, tokenizer: Any, max_length: int) -> Features:
        inputs, cut = encode_texts(tokenizer, self.prefix(part) + text, None, max_length)
        return Features(inputs, truncated=cut)

    def collate(self, features: Sequence[Features], rows: Sequence[int], tokenizer: Any) -> Batch:
        # a negative is wrong for every row of the batch, so that not every row needs one of its own
        having = {name: [i for i, f in enumerate(features) if name in f.parts] for name in ("query", "document", "negative")}
        parts = {
            name: Batch(padded([features[i].parts[name] for i in places], tokenizer), rows=tuple(rows[i] for i in places))
            for name, places in having.items()
            if len(places) == len(features) or (places and name == "negative")
        }
        targets = {}
        if "document" in parts:
            # which texts are the same text: a row's own document must not count as wrong where another row holds it too
            numbers: dict[str, int] = {}
            for place, name in enumerate(("query", "document", "negative")):
                if name in parts:
                    targets[f"{name}_text"] = torch.tensor([numbers.setdefault(features[i].target[place], len(numbers)) for i in having[name]])
            if self.scored:
                targets["score"] = torch.tensor([f.target[3] for f in features], dtype=torch.float32)
        return Batch({}, targets, tuple(rows), parts)

    def vectors(self, model: nn.Module, part: Batch) -> Tensor:
        """(B, d) of unit length."""
        pooled = getattr(part, self.pooling)(hidden_states(model, part))
        return nn.functional.normalize(pooled.float(), dim=-1)

    def loss(self, model: nn.Module, batch: Batch) -> Term:
        query, document = self.vectors(model, batch.parts["query"]), self.vectors(model, batch.parts["document"])
        if self.scored:
            return Term(_ordered(query, document, batch.targets["score"]) * len(query), len(query), per="batch")
        candidates, texts = [document], [batch.targets["document_text"]]
        if "negative" in batch.parts:
            candidates.append(self.vectors(model, batch.parts["negative"]))
            texts.append(batch.targets["negative_text"])
        allowed = allowed_candidates(batch.targets["query_text"], torch.cat(texts))
        scores = (query @ torch.cat(candidates).T * SCALE).masked_fill(~allowed, float("-inf"))
        own = torch.arange(len(query), device=query.device)
        total = nn.functional.cross_entropy(scores, own, reduction="sum")
        if self.symmetric:
            total = (total + nn.functional.cross_entropy(scores[:, : len(query)].T, own, reduction="sum")) / 2
        return Term(total, len(query), per="batch")

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """(parts, d) of each row: the vectors of its query and, where there is one, its document."""
        found = [as_floats(self.vectors(model, batch.parts[name])) for name in ("query", "document") if name in batch.parts]
        return list(np.stack(found, axis=1))

    def predictions(self, outputs: Sequence[Any], rows: Rows, top: int = 1) -> list[dict[str, Any]]:
        return [{"embedding": [round(float(x), 6) for x in vectors[0]]} for vectors in outputs]

    def measure(self, outputs: Sequence[Any], rows: Rows) -> dict[str, Metric]:
        if self.scored:
            return {"spearman": metrics.spearman(np.array([row["score"] for row in rows]), _cosines(outputs))}
        return metrics.retrieval(self._ranks(outputs, rows))

    def per_row(self, outputs: Sequence[Any], rows: Rows) -> list[float]:
        if self.scored:
            from scipy.stats import rankdata

            truth, found = rankdata([row["score"] for row in rows]), rankdata(_cosines(outputs))
            return (-np.abs(truth - found) / len(rows)).tolist()
        return (1 / self._ranks(outputs, rows)).tolist()

    def baselines(self, context: BaselineContext) -> dict[str, dict[str, Metric]]:
        unchanged = self.measure(context.unchanged(), context.test)
        return {"unchanged model": unchanged} if self.scored else {"BM25": metrics.retrieval(_bm25_ranks(context.test)), "unchanged model": unchanged}

    def picture(self, outputs: Sequence[Any], rows: Rows, path: Path, before: Sequence[Any] | None = None) -> None:
        if self.scored:
            pictures.residuals(np.array([row["score"] for row in rows]), _cosines(outputs), "similarity", path)
        else:
            unchanged = {} if before is None else {"unchanged model": self._ranks(before, rows)}
            pictures.found_within({"this run": self._ranks(outputs, rows), **unchanged, "BM25 (words alone)": _bm25_ranks(rows)}, path)

    def describe(self, row: Row, features: Features, tokenizer: Any) -> str:
        return "  ->  ".join(tokenizer.decode(part.inputs["input_ids"])[:120].replace("\n", " ") for part in features.parts.values())

    def companions(self, folder: Path, max_length: int) -> None:
        """The files by which sentence-transformers opens the folder: pooling, normalisation, prefixes."""
        if not (folder / "model.safetensors").exists():
            return
        width = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = width.get("hidden_size") or width.get("dim") or width.get("d_model") or width.get("n_embd")
        modes = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
        _write(folder / "modules.json", [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))])
        _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": size, **{mode: name == self.pooling for name, mode in modes.items()}})
        (folder / "2_Normalize").mkdir(exist_ok=True)
        _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
        prompts = {name: prefix for name, prefix in (("query", self.query_prefix), ("document", self.document_prefix)) if prefix}
        _write(folder / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"})

    def next_commands(self, run: str) -> list[str]:
        return [f'luthier search {run} --over SOURCE "your question"', f"luthier evaluate {run} --json"]

    def _ranks(self, outputs: Sequence[Any], rows: Rows) -> np.ndarray:
        """Ranks of the right documents among all different test documents; other right ones of an equal query do not count against it."""
        vectors = np.stack(outputs)
        return _ranks(rows, lambda queries, documents: vectors[queries, 0] @ vectors[documents, 1].T)


def allowed_candidates(query_text: Tensor, candidate_text: Tensor) -> Tensor:
    """(B, C) bool: which candidates compete in a row. query_text (B,) and candidate_text (C,), documents first, number the texts.

    False negatives by identity of text are left out: the row's own document met again, and documents that another row gives for the same query.
    """
    rows = len(query_text)
    own = candidate_text[:rows]
    same_document = candidate_text[None, :] == own[:, None]
    same_query = query_text[:, None] == query_text[None, :]
    right_for = same_query.float() @ same_document.float() > 0
    allowed = ~(same_document | right_for)
    allowed[torch.arange(rows), torch.arange(rows)] = True
    return allowed


def _pooling(written: dict[str, Any]) -> str:
    """How sentence-transformers' pooling file says to pool, in luthier's words where luthier has one: one name since version 5, flags before."""
    flags = [name.removeprefix("pooling_mode_") for name, on in written.items() if name.startswith("pooling_mode_") and on]
    mode = written.get("pooling_mode") or (flags[0] if len(flags) == 1 else "+".join(flags) or "mean_tokens")
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first", "lasttoken": "last"}
    return known.get(mode, str(mode)) if isinstance(mode, str) else "+".join(map(str, mode))


def _ordered(query: Tensor, document: Tensor, score: Tensor) -> Tensor:
    """CoSENT (Su 2022): log(1 + sum of exp(scale * (cos_j - cos_i)) over pairs where row i should be nearer than row j)."""
    cosine = (query * document).sum(-1) * SCALE
    difference = cosine[None, :] - cosine[:, None]
    wrong = difference[score[:, None] > score[None, :]]
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), dim=0)


def _cosines(outputs: Sequence[Any]) -> np.ndarray:
    vectors = np.stack(outputs)
    return (vectors[:, 0] * vectors[:, 1]).sum(-1).astype(np.float64)


def _ranks(rows: Rows, scorer: Any) -> np.ndarray:
    """scorer(query rows, document rows) -> (queries, documents)."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(row["document"], i)
    documents = list(first.values())
    place = {text: n for n, text in enumerate(first)}
    right: dict[str, set[int]] = {}
    for row in rows:
        right.setdefault(row["query"], set()).add(place[row["document"]])
    found = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), 512):
        chunk = list(range(start, min(start + 512, len(rows))))
        scores = np.array(scorer(chunk, documents), dtype=np.float64)
        own = np.array([place[rows[i]["document"]] for i in chunk])
        for n, i in enumerate(chunk):
            others = list(right[rows[i]["query"]] - {own[n]})
            scores[n, others] = -np.inf
        found[chunk] = metrics.ranks(scores, own)
    return found


def _bm25_ranks(rows: Rows) -> np.ndarray:
    from rank_bm25 import BM25Okapi

    documents = list(dict.fromkeys(row["document"] for row in rows))
    index = BM25Okapi([_tokens(text) or [text] for text in documents])  # the index needs one word at least
    return _ranks(rows, lambda queries, _: np.stack([index.get_scores(_tokens(rows[i]["query"])) for i in queries]))


def _tokens(text: str) -> list[str]:
    """Words, those inside identifiers (snake_case, camelCase) too."""
    return [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|\d+", text)]


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
