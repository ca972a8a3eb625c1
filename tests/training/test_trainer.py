"""The loop against a plain reference, however a batch is split; guards that name rows; checkpoints that survive everything."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier import UserError, compute
from luthier.compute import packed_pass
from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.contract.tiny import tiny_model
from luthier.data.rows import Row, Rows
from luthier.tasks.base import Task
from luthier.tasks.text_classification import TextClassification
from luthier.tasks.text_generation import TextGeneration
from luthier.tasks.token_classification import TokenClassification
from luthier.training import checkpoints
from luthier.training.batching import epoch_batches, micro_batches, rows_at_once, steps_per_epoch
from luthier.training.schedule import factor
from luthier.training.trainer import Trainer, TrainingInterrupted, TrainingSettings
from luthier.verbs.console import Console
from luthier.verbs.job import encode

TOKENIZER = tiny_tokenizer()


def make_rows(task: type[Task], count: int = 24) -> Rows:
    names = {"tokens": "words"}
    values = [{names.get(k, k): v for k, v in row.items()} for row in tiny_rows(task.tag, count)]
    return Rows.of([Row(v, "rows.jsonl", i + 1) for i, v in enumerate(values)])


TASKS: dict[type[Task], str] = {TextClassification: "AutoModelForSequenceClassification", TokenClassification: "AutoModelForTokenClassification", TextGeneration: "AutoModelForCausalLM"}


def setup(kind: type[Task] = TextClassification, dtype: torch.dtype = torch.float32, dropout: bool = False, count: int = 24) -> tuple[nn.Module, Task, Rows, Any]:
    rows = make_rows(kind, count)
    task = kind.learn(rows, rows, rows)
    architecture = "gpt2" if kind is TextGeneration else "bert"
    model = tiny_model(architecture, TASKS[kind], num_labels=len(getattr(task, "labels", (0, 1)))).to(dtype)
    if not dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for module in model.modules():
            if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
                module.attention_dropout = 0.0
    return model, task, rows, encode(task, rows, TOKENIZER, 48)


def train(folder: Path, settings: TrainingSettings, kind: type[Task] = TextClassification, dtype: torch.dtype = torch.float64, resume: bool = False, validation: bool = False, **more: Any):
    model, task, rows, features = setup(kind, dtype, more.pop("dropout", False))
    folder.mkdir(exist_ok=True)
    trainer = Trainer(model, task, features, (features, rows) if validation else None, TOKENIZER, settings, folder, rows=rows, **more)
    result = trainer.fit(resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, result


SETTINGS = TrainingSettings(max_steps=5, batch_size=8, lr=1e-3, warmup=0.2)


def test_the_loop_is_a_plain_adamw_loop(tmp_path: Path) -> None:
    """Five steps in float64 against twenty lines of torch."""
    found, _ = train(tmp_path, SETTINGS)
    model, task, _, features = setup(dtype=torch.float64)
    model.train()
    matrices, vectors = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}])
    lengths = [f.length for f in features]
    batches = epoch_batches(lengths, 8, 0, 0) + epoch_batches(lengths, 8, 0, 1)
    for step in range(5):
        batch = task.collate([features[i] for i in batches[step]], batches[step], TOKENIZER)
        loss = nn.functional.cross_entropy(model(**batch.inputs).logits.float(), batch.targets["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1.0 if step == 0 else (5 - step) / 4)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("micro", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_size": 7}, {"micro_batch_tokens": 40}], ids=str)
def test_a_split_batch_is_the_batch(kind: type[Task], micro: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 x 1, 3 + 3 + 2, 7 + 1 and pieces of up to 40 tokens give what 1 x 8 gives, where rows have unequal numbers of supervised units."""
    whole, result = train(tmp_path / "a", SETTINGS, kind)
    pieces: list[int] = []
    monkeypatch.setattr(kind, "loss", lambda self, model, batch, loss=kind.loss: pieces.append(len(batch.inputs["input_ids"])) or loss(self, model, batch))
    split, again = train(tmp_path / "b", replace(SETTINGS, **micro), kind)  # type: ignore[arg-type]
    assert sum(pieces) == 5 * 8 and len(pieces) > 5, "batches went through in pieces"
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=1e-6)
    for one, other in zip(result.history, again.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_class_weights_split_too(tmp_path: Path) -> None:
    def weighted(folder: Path, micro: int | None) -> dict[str, torch.Tensor]:
        model, task, _, features = setup(dtype=torch.float64)
        folder.mkdir()
        heavy = replace(task, weights=(0.3, 2.0))  # type: ignore[type-var]
        Trainer(model, heavy, features, None, TOKENIZER, replace(SETTINGS, micro_batch_size=micro), folder).fit()
        return dict(model.named_parameters())

    whole, split = weighted(tmp_path / "a", None), weighted(tmp_path / "b", 3)
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=0, atol=1e-6)


def test_batches_hold_every_row_once_and_repeat_themselves() -> None:
    lengths = [3 + (7 * i) % 40 for i in range(205)]
    batches = epoch_batches(lengths, 16, seed=3, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(205)) and sorted(map(len, batches)) == [13] + [16] * 12
    assert batches == epoch_batches(lengths, 16, 3, 1) != epoch_batches(lengths, 16, 3, 2)
    wasted = sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)
    assert wasted < 0.15 * sum(lengths)


def test_pieces_of_a_batch_hold_so_many_rows_and_padded_tokens() -> None:
    lengths = [9, 3, 4, 5, 9, 30, 2]
    assert micro_batches([1, 2, 3, 4, 5], lengths, 2) == [[1, 2], [3, 4], [5]]
    assert micro_batches([1, 2, 3, 4, 5, 6], lengths, 8, 12) == [[1, 2], [3], [4], [5], [6]], "a row that is longer goes alone"
    assert micro_batches([1, 2, 3, 6], lengths, 8, 15) == [[1, 2, 3], [6]]
    assert micro_batches([6, 1, 2, 3], lengths, 2, 1000) == [[6, 1], [2, 3]]
    assert rows_at_once(10, 8, 25) == 2 and rows_at_once(10, 8) == 8 and rows_at_once(100, 8, 25) == 1


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 18, 33, 16 * 32 + 1])
@pytest.mark.parametrize("smallest", [1, 2])
def test_a_batch_is_never_smaller_than_asked_where_there_are_rows_enough(rows: int, smallest: int) -> None:
    batches = epoch_batches([5] * rows, 16, seed=0, epoch=0, smallest=smallest)
    assert sorted(i for batch in batches for i in batch) == list(range(rows)) and len(batches) == steps_per_epoch(rows, 16, smallest)
    assert min(map(len, batches)) >= min(smallest, rows) and max(map(len, batches)) < 16 + smallest


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_rise_then_fall(schedule: str) -> None:
    rates = [factor(step, 100, 0.1, schedule) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and min(rates) > 0
    assert rates[10:] == sorted(rates[10:], reverse=True) and (rates[-1] == 1.0) == (schedule == "constant")


def test_an_infinite_loss_names_the_rows_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model, task, rows, features = setup()
    trainer = Trainer(model, task, features, None, TOKENIZER, replace(SETTINGS, max_steps=30, checkpoint_every=0.0), tmp_path, rows=rows)
    step = trainer._step

    def poisoned(batch: list[int], number: int):
        if number == 4:
            with torch.no_grad():
                model.classifier.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
        return step(batch, number)

    trainer._step = poisoned  # type: ignore[method-assign]
    with pytest.raises(UserError) as error:
        trainer.fit()
    assert "Step 5: the loss is nan" in str(error.value) and "rows.jsonl:" in str(error.value) and "smaller --lr" in str(error.value)
    tensors, record = checkpoints.read(checkpoints.latest(tmp_path / "checkpoints"))  # type: ignore[arg-type]
    assert record["state"]["step"] == 4 and all(torch.isfinite(t).all() for name, t in tensors.items() if name.startswith("model/"))


def test_a_parameter_without_a_gradient_is_named(tmp_path: Path) -> None:
    model, task, rows, features = setup()
    model.register_parameter("forgotten", nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match="no gradient in 2 steps: forgotten"):
        Trainer(model, task, features, None, TOKENIZER, SETTINGS, tmp_path, rows=rows).fit()


def test_rows_that_move_nothing_raise_no_alarm(tmp_path: Path) -> None:
    """Pairs of which two batches hold one each would never show a gradient."""

    class Still(type(setup()[1])):  # type: ignore[misc]
        def loss(self, model: nn.Module, batch: Any) -> Any:
            term = super().loss(model, batch)
            return replace(term, sum=term.sum * (0.0 if trainer.state["step"] in (0, 2) else 1.0))

    model, task, rows, features = setup()
    trainer = Trainer(model, Still(task.labels), features, None, TOKENIZER, SETTINGS, tmp_path, rows=rows)  # type: ignore[attr-defined]
    assert trainer.fit().steps == 5 and trainer.state["moves"] == 2


def test_batch_losses_refuse_to_be_split(tmp_path: Path) -> None:
    from luthier.tasks.sentence_similarity import SentenceSimilarity

    with pytest.raises(UserError, match="cannot be split"):
        Trainer(tiny_model("bert"), SentenceSimilarity(), [], None, TOKENIZER, replace(SETTINGS, micro_batch_size=2), tmp_path)


def test_the_best_checkpoint_is_restored_and_patience_stops(tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=200, lr=0.3, evaluate_every=1, patience=2)
    found, result = train(tmp_path, settings, dtype=torch.float32, validation=True)
    assert result.reason == "early stopping" and result.steps < 200
    best, record = checkpoints.read(tmp_path / "checkpoints" / "best")
    assert record["step"] == result.best_step and all(torch.equal(found[name], best[name]) for name in found)
    again, resumed = train(tmp_path, settings, dtype=torch.float32, validation=True, resume=True)  # killed between its end and what follows
    assert (resumed.reason, resumed.steps) == ("early stopping", result.steps) and all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("settings", [replace(SETTINGS, max_steps=11, micro_batch_size=3, checkpoint_every=0.0), replace(SETTINGS, max_steps=11, checkpoint_every=0.0)])
def test_resuming_anywhere_is_exact(settings: TrainingSettings, tmp_path: Path) -> None:
    """With dropout on, stopped after a step in the middle of an epoch, by Ctrl-C."""
    whole, result = train(tmp_path / "whole", settings, dtype=torch.float32, dropout=True)

    model, task, rows, features = setup(dropout=True)
    (tmp_path / "broken").mkdir()
    trainer = Trainer(model, task, features, None, TOKENIZER, settings, tmp_path / "broken", rows=rows)
    step = trainer._step
    trainer._step = lambda batch, number: (os.kill(os.getpid(), signal.SIGINT) if number == 6 else None, step(batch, number))[1]  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted, match="after step 7 of 11"):
        trainer.fit()
    resumed, again = train(tmp_path / "broken", settings, dtype=torch.float32, dropout=True, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [h["loss"] for h in result.history] == [h["loss"] for h in again.history]


def test_a_run_that_needed_too_much_goes_on_with_gradient_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with dropout on, and each block of each step runs once more."""
    again: list[object] = []
    monkeypatch.setattr(packed_pass, "recomputed", lambda function, plain=packed_pass.recomputed: again.append(function) or plain(function))
    settings = replace(SETTINGS, max_steps=8, checkpoint_every=0.0)
    whole, _ = train(tmp_path / "whole", settings, dtype=torch.float32, dropout=True)
    model, task, rows, features = setup(dropout=True)
    (tmp_path / "broken").mkdir()
    trainer = Trainer(model, task, features, None, TOKENIZER, settings, tmp_path / "broken", rows=rows)
    step = trainer._step
    trainer._step = lambda batch, number: step(batch, number) if number < 4 else (_ for _ in ()).throw(MemoryError)  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        trainer.fit()
    assert not again
    resumed, _ = train(tmp_path / "broken", replace(settings, gradient_checkpointing=True), dtype=torch.float32, dropout=True, resume=True)
    assert len(again) == 4 * 3, "four steps, three blocks"
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_checkpoints_do_not_change_the_numbers(tmp_path: Path) -> None:
    often, _ = train(tmp_path / "a", replace(SETTINGS, checkpoint_every=0.0), dtype=torch.float32, dropout=True, validation=True)
    seldom, _ = train(tmp_path / "b", replace(SETTINGS, checkpoint_every=1e9, evaluate_every=1e9), dtype=torch.float32, dropout=True, validation=True)
    a, b = ((tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in "ab")
    assert [line for line in a if "loss" in line] == [line for line in b if "loss" in line] and often.keys() == seldom.keys()


def test_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path, replace(SETTINGS, checkpoint_every=0.0))
    with pytest.raises(UserError, match="another lr"):
        train(tmp_path, replace(SETTINGS, lr=5e-3), resume=True)
    with pytest.raises(UserError, match="another base model"):
        train(tmp_path, SETTINGS, resume=True, identity={"base model": "other"})


@pytest.mark.parametrize("moved", [False, True])
def test_going_on_elsewhere_is_said(tmp_path: Path, moved: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, replace(SETTINGS, checkpoint_every=0.0))
    if moved:
        monkeypatch.setattr(compute, "route", lambda device: "another processor")
    train(tmp_path, SETTINGS, resume=True, console=Console())
    told = "".join(capsys.readouterr())
    assert "resumed after step" in told and ("another processor" in told) == ("last bits may differ" in told) == moved


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    save = checkpoints.save_file

    def full(*args: Any, **kwargs: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="full"):
        train(tmp_path, replace(SETTINGS, checkpoint_every=0.0))
    kept = checkpoints.latest(tmp_path / "checkpoints")
    assert kept is not None and checkpoints.read(kept)[1]["state"]["step"] == 2
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_half_written_checkpoint_is_not_met(tmp_path: Path) -> None:
    train(tmp_path, replace(SETTINGS, checkpoint_every=0.0))
    half = tmp_path / "checkpoints" / "step-9"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-5"  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_padding_that_is_computed_is_told(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Attention that does not come by transformers' interface cannot be told which tokens are a row."""
    model, task, rows, features = setup(dtype=torch.float32)
    model.set_attn_implementation(way)  # type: ignore[operator]
    Trainer(model, task, features, None, TOKENIZER, SETTINGS, tmp_path, rows=rows, console=Console()).fit()
    said = capsys.readouterr()
    assert ("3 of 3 blocks cannot run on packed rows here" in said.out + said.err) == (way == "eager")


def test_rehearsing_the_longest_batch_changes_nothing(tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "a", SETTINGS, dtype=torch.float32, dropout=True)
    rehearsed, _ = train(tmp_path / "b", SETTINGS, dtype=torch.float32, dropout=True, rehearse_longest=True)
    assert all(torch.equal(plain[name], rehearsed[name]) for name in plain)


def test_a_lack_of_memory_is_met_before_the_first_step(tmp_path: Path) -> None:
    model, task, rows, features = setup()
    trainer = Trainer(model, task, features, None, TOKENIZER, SETTINGS, tmp_path, rows=rows, rehearse_longest=True)
    task_loss = type(task).loss
    try:
        type(task).loss = lambda self, model, batch: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory"))  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"--micro-batch-tokens \d+ .*--gradient-checkpointing"):
            trainer.fit()
    finally:
        type(task).loss = task_loss  # type: ignore[method-assign]


TWO = """
import sys, torch
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_trainer import SETTINGS, TOKENIZER, setup
from luthier.training.trainer import Trainer
from safetensors.torch import save_file
torch.set_num_threads(1)
model, task, rows, features = setup(dtype=torch.float64)
trainer = Trainer(model, task, features, None, TOKENIZER, SETTINGS, Path({folder!r}), rows=rows)
trainer.fit()
if trainer.main:
    save_file({{name: p.detach().contiguous() for name, p in model.named_parameters()}}, {out!r})
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    """torchrun with gloo: each process has half of every batch; parameters agree with one process to rounding."""
    from safetensors.torch import load_file

    alone, _ = train(tmp_path / "alone", SETTINGS)
    (tmp_path / "pair").mkdir()
    script = tmp_path / "script.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "pair"), out=str(tmp_path / "pair.safetensors")), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(20000 + os.getpid() % 20000), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    together = load_file(tmp_path / "pair.safetensors")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-8)


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    """Where no signal handler can be set."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            train(tmp_path, SETTINGS)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and time.monotonic() > 0
