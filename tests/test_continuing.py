"""`--model RUN`: any run is the start of another, and the chain reloads as it was measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

import luthier
from luthier import UserError
from luthier.contract.texts import tiny_folder, tiny_rows
from luthier.verbs.console import Console

QUIET = Console(quiet=True)
ROWS = tiny_rows("text-classification", 120)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "model")


def adapt(model: Path, out: Path, method: str, rows=ROWS, **settings):
    return luthier.adapt(model, rows, out=out, method=method, **{"max_steps": 4, "baselines": False, "batch_size": 8, **settings}, console=QUIET)


def logits(run) -> torch.Tensor:
    inputs = run.tokenizer(["red boat in the river", "a tree"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return run.model(**inputs).logits


FIRST = ["lora(r=2)", "adapter(reduction=4)", "peft(type=pissa, r=2)", "full", "lora(r=2)|adapter(reduction=4)"]
SECOND = ["lora(r=2)", "adapter(reduction=4)", "full", "bitfit"]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("second", SECOND)
def test_a_run_starts_from_what_the_earlier_one_learnt(first: str, second: str, base: Path, tmp_path: Path) -> None:
    """With a rate of zero the second run answers as the first did; with a real one it does not, and reloads as it was measured."""
    one = adapt(base, tmp_path / "one", first, lr=0.02, save="adapter" if first in ("lora(r=2)",) else "auto")
    still = adapt(one.path, tmp_path / "still", second, lr=1e-30)
    assert torch.allclose(logits(one), logits(still), atol=1e-5)
    two = adapt(one.path, tmp_path / "two", second, lr=0.02)
    assert not torch.allclose(logits(one), logits(two), atol=1e-3)
    assert torch.equal(logits(two), logits(luthier.load(two.path)))


def test_the_plan_of_a_continued_run_counts_its_inserted_modules(base: Path, tmp_path: Path) -> None:
    one = adapt(base, tmp_path / "one", "adapter(reduction=4)")
    job = luthier.adapt(one.path, ROWS, method="full", dry_run=True, out=tmp_path / "two", console=QUIET)
    assert job.new_heads == () and job.plan.total == sum(p.numel() for p in one.model.parameters())


def test_inserted_modules_of_the_start_cannot_be_merged_later(base: Path, tmp_path: Path) -> None:
    one = adapt(base, tmp_path / "one", "adapter(reduction=4)")
    with pytest.raises(UserError, match="adapter cannot be merged"):
        adapt(one.path, tmp_path / "two", "lora", save="merged")
    assert not list(tmp_path.glob("two*"))


def test_other_labels_need_a_stock_model(base: Path, tmp_path: Path) -> None:
    """A stock folder takes a new head; an adapter run has learnt its own."""
    other = [row | {"label": row["label"] if i % 3 else "third"} for i, row in enumerate(ROWS)]
    one = adapt(base, tmp_path / "one", "lora", save="adapter")
    with pytest.raises(UserError, match=r"other labels.*luthier export"):
        adapt(one.path, tmp_path / "two", "lora", rows=other)
    with pytest.raises(UserError, match="Go on with its own task"):
        adapt(one.path, tmp_path / "two", "lora", rows=tiny_rows("token-classification", 120))
    assert not list(tmp_path.glob("two*"))
    merged = luthier.export(one, out=tmp_path / "merged")
    assert adapt(merged, tmp_path / "two", "lora", rows=other).model.config.num_labels == 3


def test_class_names_keep_the_order_in_which_the_model_knows_them(tmp_path: Path) -> None:
    """The rows of a trained head belong to its names."""
    folder = tiny_folder(tmp_path / "model", auto_class="AutoModelForSequenceClassification", num_labels=2)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.id2label, config.label2id = {0: "plain", 1: "color"}, {"plain": 0, "color": 1}
    config.save_pretrained(folder)
    before = luthier.adapt(folder, ROWS, method="lora", lr=1e-30, max_steps=2, baselines=False, out=tmp_path / "run", console=QUIET)
    assert before.task.labels == ("plain", "color")
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = before.tokenizer(["red boat in the river"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(stock(**inputs).logits, before.model(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("method", ["lora(r=2)", "peft(type=pissa, r=2)"])
def test_a_head_that_was_there_already_is_in_the_adapter_too(method: str, base: Path, tmp_path: Path) -> None:
    """peft asks for one, whether it learnt or not."""
    one = adapt(base, tmp_path / "one", "full")
    two = adapt(one.path, tmp_path / "two", method, save="adapter", lr=0.02)
    from peft import PeftModel

    stock = PeftModel.from_pretrained(transformers.AutoModelForSequenceClassification.from_pretrained(one.path), str(two.path)).eval()
    inputs = two.tokenizer(["red boat in the river"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(stock(**inputs).logits, two.model(**inputs).logits, atol=1e-5)


def test_a_run_cannot_take_the_place_of_what_it_is_made_from(base: Path, tmp_path: Path) -> None:
    one = adapt(base, tmp_path / "one", "lora", save="adapter")
    with pytest.raises(UserError, match="from which it would be made"):
        adapt(one.path, one.path, "lora", overwrite=True)
    with pytest.raises(UserError, match="from which it would be made"):
        adapt(one.path, base, "lora", overwrite=True)
    assert logits(luthier.load(one.path)) is not None


def test_a_chain_can_move(base: Path, tmp_path: Path) -> None:
    """Each link takes the new place of the one below it, and those above still know it."""
    stock = shutil.copytree(base, tmp_path / "stock")
    one = adapt(stock, tmp_path / "one", "adapter(reduction=4)")
    two = adapt(one.path, tmp_path / "two", "lora", save="adapter")
    before = logits(two)
    stock.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="which is not there"):
        logits(luthier.load(two.path))
    record = tmp_path / "one" / "luthier.json"
    record.write_text(record.read_text(encoding="utf-8").replace(str(stock), str(tmp_path / "moved")), encoding="utf-8")
    assert torch.equal(logits(luthier.load(two.path)), before)
