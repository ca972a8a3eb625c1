'''The traps that other toolkits fell into (the run ends well and the result is wrong), and the tests that would catch luthier in them.

The number is the trap's in the collection of such reports. What no other file covers is tested below.

 1  loss depends on how a batch is split              training/test_trainer.py::test_a_split_batch_is_the_batch, training/test_trainer.py::test_two_processes_are_one
 2  a loss divides by its own share of the batch      tasks/test_batching.py::test_the_loss_of_a_batch_is_that_of_its_pieces, training/test_trainer.py::test_class_weights_split_too
 3  the merged model answers differently              src/luthier/contract/checks.py::merges_exactly, test_traps.py::test_a_merge_that_changes_answers_is_refused,
                                                      test_traps.py::test_an_export_that_changes_answers_is_refused, test_traps.py::test_merging_is_rounded_once
 5  tied weights: changed at one end, lost on reload  methods/test_planner.py::test_tied_weights, test_traps.py::test_a_tie_holds_at_both_ends
 6  targets match a part of the model in silence      methods/test_planner.py::test_conflicts, methods/test_planner.py::test_uneven_cover_is_told, test_traps.py::test_uneven_cover_is_recorded
 7  a reload gives random weights                     src/luthier/contract/checks.py::round_trips, test_bad_input.py::test_weights_that_do_not_belong_are_not_left_random,
                                                      test_traps.py::test_tensors_that_are_missing_or_unknown_are_refused, test_traps.py::test_a_run_that_reloads_differently_is_not_published
 8  a new head is taken for a pretrained one          test_traps.py::test_a_new_head_learns_in_full_and_is_saved, test_continuing.py::test_a_head_that_was_there_already_is_in_the_adapter_too
14  batch size or padding changes predictions         tasks/test_batching.py::test_one_by_one_equals_batched, src/luthier/contract/checks.py::batches_are_rows
15  a resumed run is another run                      contract/test_contract.py::test_killed_and_resumed_ends_at_the_same_bits, training/test_trainer.py::test_resuming_anywhere_is_exact
16  the best checkpoint is not what is kept           training/test_trainer.py::test_the_best_checkpoint_is_restored_and_patience_stops, test_traps.py::test_the_best_checkpoint_is_what_is_saved
17  what should learn gets no gradient                training/test_trainer.py::test_a_parameter_without_a_gradient_is_named, src/luthier/contract/checks.py::acts
21  inputs are cut without notice                     test_traps.py::test_what_is_cut_off_is_counted_by_every_verb, test_traps.py::test_much_that_would_be_cut_stops_the_run
22  two methods at once cannot be saved as one        test_traps.py::test_three_kinds_at_once_resume_and_save_as_one, methods/test_lora.py::test_a_stack_of_low_ranks_is_one_stock_adapter
23  misspelt options vanish                           methods/test_stack.py::test_mistakes_are_named_with_the_nearest_right_thing, test_recipe.py::test_mistakes_are_named_all_at_once,
                                                      test_traps.py::test_misspelt_flags_are_refused_with_the_nearest, tasks/test_batching.py::test_unknown_options_are_answered
27  defaults that do not learn                        test_evidence.py::test_a_default_rate_comes_from_a_stored_run_that_beat_its_start
29  a method's inputs are kept in float32             test_traps.py::test_under_bf16_a_method_keeps_no_float32_inputs
31  evaluation keeps all logits                       test_traps.py::test_evaluation_keeps_little_of_each_batch
33  all is read and tokenised first, and again        verbs/test_predict.py::test_killed_and_given_again, test_traps.py::test_predicting_reads_no_further_than_it_answers,
                                                      verbs/test_search.py::test_only_what_changed_is_encoded_again, test_traps.py::test_training_tokenises_each_row_once
'''

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import luthier
from luthier import Run, UserError, cli
from luthier.contract import checks
from luthier.contract.texts import tiny_folder, tiny_rows, tiny_tokenizer, write_jsonl
from luthier.contract.tiny import tiny_model
from luthier.data import sources
from luthier.methods import changes, loading
from luthier.methods.planner import plan
from luthier.methods.stack import parse
from luthier.tasks import find, tasks
from luthier.tasks.text_classification import TextClassification
from luthier.training import evaluation
from luthier.training.trainer import Trainer, TrainingInterrupted
from luthier.verbs import predict
from luthier.verbs.console import Console

TESTS = Path(__file__).parent
ROWS = tiny_rows("text-classification", 120)
SETTINGS: dict[str, Any] = {"max_steps": 6, "lr": 1e-2, "batch_size": 8, "baselines": False, "precision": "fp32"}
HEAD = {"classifier.weight", "classifier.bias"}


class Heard(Console):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "model")


def adapt(model: Path, out: Path, rows: Any = ROWS, **settings: Any) -> Run:
    found = luthier.adapt(model, rows, out=out, **{"console": Heard(), **SETTINGS, **settings})
    assert isinstance(found, Run)
    return found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    inputs = tiny_tokenizer()(["the red boat", "a bird", "not in the old house"], padding=True, return_tensors="pt")
    return model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def test_every_trap_names_tests_that_exist() -> None:
    assert __doc__ is not None
    numbers = [int(n) for n in re.findall(r"^ ?(\d+)  ", __doc__, re.MULTILINE)]
    assert numbers == [1, 2, 3, 5, 6, 7, 8, 14, 15, 16, 17, 21, 22, 23, 27, 29, 31, 33]
    named = re.findall(r"(\S+\.py)::(\w+)", __doc__)
    for file, name in named:
        path = TESTS.parent / file if file.startswith("src/") else TESTS / file
        assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{file} has no {name}"
    own = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)) - {"test_every_trap_names_tests_that_exist"}
    assert own == {name for file, name in named if file == "test_traps.py"}


def spoil_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging gives back a little more than what acts."""
    merge = changes.merge

    def spoilt(module: Any) -> None:
        merge(module)
        with torch.no_grad():
            module.weight.add_(torch.linspace(-0.1, 0.1, module.weight.numel()).view_as(module.weight) * torch.linspace(-1, 1, module.weight.shape[1]))

    monkeypatch.setattr(changes, "merge", spoilt)


def test_a_merge_that_changes_answers_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself luthier saves the adapter instead; told to merge, it publishes nothing."""
    spoil_merging(monkeypatch)
    with pytest.raises(UserError, match="Merging changes outputs by"):
        adapt(base, tmp_path / "merged", method="lora", save="merged")
    assert not (tmp_path / "merged").exists()
    run = adapt(base, tmp_path / "auto", method="lora")
    assert run.record.content["saved"]["form"] == "adapter" and (run.path / "adapter_model.safetensors").exists()


def test_an_export_that_changes_answers_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = adapt(base, tmp_path / "run", method="lora|bitfit", save="adapter")
    spoil_merging(monkeypatch)
    with pytest.raises(UserError, match="refused, nothing was written"):
        luthier.export(run, out=tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_merging_is_rounded_once() -> None:
    """Into weights of bf16: the product and the sum are float32, and only their result is rounded."""
    fitted = checks.Subject("lora(r=8)", "bert").fitted(moved=True)
    module = next(m for m in fitted.model.modules() if isinstance(m, changes.Changed)).bfloat16()  # type: ignore[attr-defined]
    (change,) = module.changes()
    with torch.no_grad():
        weight = changes.site_weight(module, None).clone()
        low_rank = 2 * change["b"].float() @ change["a"].float()
    changes.merge(module)
    merged = changes.site_weight(module, None)
    assert torch.equal(merged, (weight.float() + low_rank).bfloat16()) and not torch.equal(merged, weight + low_rank.bfloat16())


@pytest.mark.parametrize("site", ["lm_head", "wte"])
@pytest.mark.parametrize("method", ["lora(sites={})", "peft(type=vera, r=4, sites={})"])
def test_a_tie_holds_at_both_ends(method: str, site: str, tmp_path: Path) -> None:
    """A change of one end is refused by either name; trained in full, both ends move, and stock code finds them tied and moved."""
    with torch.device("meta"):
        model = type(tiny_model("gpt2", "AutoModelForCausalLM"))(tiny_model("gpt2", "AutoModelForCausalLM").config)
    with pytest.raises(UserError, match="is tied to"):
        plan(model, parse(method.format(site)))
    with pytest.raises(UserError, match="is tied to"):
        luthier.apply(tiny_model("gpt2", "AutoModelForCausalLM"), method.format(site))
    if site == "lm_head" and method.startswith("lora"):
        start = tiny_folder(tmp_path / "gpt2", "gpt2", "AutoModelForCausalLM")
        for form in ("auto", "difference"):
            run = adapt(start, tmp_path / form, tiny_rows("text-generation", 60), method="full", save=form)
            assert run.model.get_parameter("lm_head.weight") is run.model.get_parameter("transformer.wte.weight")
        stock: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "auto")
        old = transformers.AutoModelForCausalLM.from_pretrained(start)
        assert stock.lm_head.weight is stock.transformer.wte.weight and not torch.equal(stock.lm_head.weight, old.lm_head.weight)
        for form in ("auto", "difference"):
            torch.testing.assert_close(logits(luthier.load(tmp_path / form).model), logits(stock), rtol=0, atol=1e-6)


def test_uneven_cover_is_recorded(base: Path, tmp_path: Path) -> None:
    heard = Heard()
    run = adapt(base, tmp_path / "run", method="lora(sites=blocks[1:].attention.query)", console=heard)
    note = "  note: lora covers attention.query: 2 of 3 blocks"
    assert note in heard.lines and note in run.record.content["training"]["plan"]


LOST = {
    "an adapter's tensors under other names": ("lora", "adapter", lambda t: {k.replace("layer.1", "layer.9"): v for k, v in t.items()}, "unknown.*layer.9.*missing.*layer.1"),
    "an adapter without some tensors": ("lora", "adapter", lambda t: {k: v for k, v in t.items() if "layer.1" not in k}, "missing.*layer.1"),
    "an adapter without its head": ("lora", "adapter", lambda t: {k: v for k, v in t.items() if "classifier" not in k}, "classifier"),
    "an adapter of peft's under other names": ("peft(type=pissa, r=2)", "adapter", lambda t: {k.replace("layer.1", "layer.9"): v for k, v in t.items()}, "unknown.*layer.9"),
    "what an inserted module learnt": ("adapter(reduction=8)", "auto", lambda t: {k: v for k, v in t.items() if "layer.1" not in k}, "missing.*layer.1"),
    "the head of a difference": ("bitfit", "difference", lambda t: {k: v for k, v in t.items() if "classifier" not in k}, "missing.*classifier"),
    "what a selection opened": ("bitfit", "difference", lambda t: {k: v for k, v in t.items() if "layer.1" not in k}, "missing.*layer.1"),
    "more than a difference has": ("bitfit", "difference", lambda t: {**t, "classifier.more": torch.zeros(2)}, "unknown.*classifier.more"),
    "the head of a merged model": ("lora", "auto", lambda t: {k: v for k, v in t.items() if "classifier" not in k}, "classifier.weight"),
    "the body of a merged model": ("lora", "auto", lambda t: {k: v for k, v in t.items() if "layer.1" not in k}, "layer.1"),
}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of a method and form, made once."""
    folder, made = tmp_path_factory.mktemp("finished"), {}

    def make(method: str, form: str) -> Path:
        if (method, form) not in made:
            made[method, form] = adapt(base, folder / str(len(made)), method=method, save=form).path
        return made[method, form]

    return make


@pytest.mark.parametrize("name", LOST)
def test_tensors_that_are_missing_or_unknown_are_refused(name: str, finished: Any, tmp_path: Path) -> None:
    """Instead of a model that is random, or the unchanged one, in these places."""
    method, form, change, expected = LOST[name]
    run = shutil.copytree(finished(method, form), tmp_path / "run")
    (file,) = run.glob("*.safetensors")
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(UserError, match=expected):
        _ = luthier.load(run).model


@pytest.mark.parametrize("method", ["lora", "adapter(reduction=8)"])
def test_a_run_that_reloads_differently_is_not_published(method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading.load

    def careless(*given: Any, **more: Any) -> nn.Module:
        model = load(*given, **more)
        with torch.no_grad():
            nn.init.normal_(model.classifier.weight)  # type: ignore[union-attr, arg-type]
        return model

    monkeypatch.setattr(loading, "load", careless)
    with pytest.raises(UserError, match="does not answer as the trained one"):
        adapt(base, tmp_path / "run", method=method)
    assert not (tmp_path / "run").exists() and list((tmp_path / "run.partial" / "checkpoints").iterdir())


@pytest.mark.parametrize("method", ["lora(sites=*)", "bitfit", "adapter(reduction=8)", "peft(type=vera, r=4)"])
@pytest.mark.parametrize("form", ["auto", "adapter"])
def test_a_new_head_learns_in_full_and_is_saved(method: str, form: str, base: Path, tmp_path: Path) -> None:
    """It is told in the plan, carries no change of its own, every number of it moves, and the saved folder holds it."""
    if method == "bitfit" and form == "adapter":
        form = "difference"
    run = adapt(base, tmp_path / "run", method=method, save=form, dropout=False)
    assert set(run.record.content["training"]["new_heads"]) == HEAD
    tensors = {name: tensor for file in run.path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    own = {name: tensor for name, tensor in tensors.items() if "classifier" in name}
    assert {name.removeprefix("base_model.model.") for name in own} == HEAD
    weight = next(tensor for name, tensor in own.items() if name.endswith("weight"))
    start = loading.load_plain(base, "AutoModelForSequenceClassification", run.task.configure)
    assert weight.shape == start.classifier.weight.shape and (weight != start.classifier.weight).all()  # type: ignore[union-attr]
    for bad in ("lora(r=2, sites=head)", "lora(r=2, sites=classifier)", "peft(type=vera, sites=classifier)"):
        with pytest.raises(UserError, match=r"classifier\.weight is a new head"):
            plan(checks.Subject("full", "bert").base().to("meta"), parse(bad), tuple(sorted(HEAD)))


@pytest.mark.parametrize("method", ["lora", "lora|adapter(reduction=8)", "peft(type=vera, r=4)"])
def test_the_best_checkpoint_is_what_is_saved(method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What learnt is wiped out on the way: the saved run has, on the validation rows, the best value that was seen and not the last."""
    data = write_jsonl(tmp_path / "rows.jsonl", tiny_rows("regression", 120))
    step = Trainer._step

    def ruined(self: Trainer, rows: list[int], number: int) -> dict[str, Any]:
        found = step(self, rows, number)
        if number == 25:
            with torch.no_grad():
                for parameter in self.parameters.values():
                    parameter.add_(10)
        return found

    monkeypatch.setattr(Trainer, "_step", ruined)
    run = adapt(base, tmp_path / "run", str(data), method=method, lr=1e-3, max_steps=30, evaluate_every=0.5, metric="mae", save="adapter", precision="fp32")
    log = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = [entry["validation_mae"] for entry in log if "validation_mae" in entry]
    best = run.record.content["training"]["best"]
    assert best == min(seen) < 0.9 * seen[-1], "the last is the best: nothing is shown"
    assert luthier.evaluate(luthier.load(run.path), split="validation")["metrics"]["mae"]["value"] == pytest.approx(best, rel=1e-5)


def test_what_is_cut_off_is_counted_by_every_verb(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    heard = Heard()
    run = adapt(base, tmp_path / "run", str(data), max_length=6, console=heard)
    for part in ("train", "validation", "test"):
        rows = run.record.data["rows"][part]
        (note,) = [line for line in heard.lines if line.strip().startswith(f"{part}: ") and "cut off" in line]
        count, tokens = (int(n) for n in re.search(rf"(\d+) of {rows} rows .* longer than 6 tokens; (\d+) tokens are cut off", note).groups())  # type: ignore[union-attr]
        assert 0 < count < rows and tokens >= count and note.strip() in run.record.data["notes"]
    longer = [row for row in ROWS if len(row["text"].split()) + 2 > 6]
    assert 0 < len(longer) < len(ROWS)
    assert luthier.evaluate(run, ROWS)["truncated"] == len(longer) and luthier.evaluate(run, longer[:3])["truncated"] == 3
    heard = Heard()
    luthier.predict(run, data, out=tmp_path / "out.jsonl", console=heard)
    assert [line for line in heard.lines if line.startswith(f"{len(longer)} rows are longer than the 6 tokens")]
    monkeypatch.setattr(sys, "argv", ["luthier", "evaluate", str(run.path), "--data", str(write_jsonl(tmp_path / "new.jsonl", longer[:3]))])
    with pytest.raises(SystemExit):
        cli.main()
    assert "3 of them longer" in capsys.readouterr().out


def test_much_that_would_be_cut_stops_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the length was asked for; the error proposes one that keeps everything."""
    monkeypatch.setattr("luthier.verbs.job.LONGEST", 6)
    longest = max(len(row["text"].split()) for row in ROWS) + 2
    with pytest.raises(UserError, match=f"would be cut. Give --max-length {longest} "):
        adapt(base, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    assert luthier.adapt(base, ROWS, out=tmp_path / "run", max_length=6, dry_run=True, console=Heard())


@pytest.mark.parametrize("stack", ["lora(r=2)|adapter(reduction=8)|bitfit", "reinit(top=1)|freeze(bottom=2)|lora(r=2, sites=blocks[:1].attention.query)"])
def test_three_kinds_at_once_resume_and_save_as_one(stack: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record and one file of tensors, which answer as trained; stopped in the middle and resumed, they are the same bits."""
    form = "auto" if "adapter" in stack else "difference"
    whole = adapt(base, tmp_path / "whole", method=stack, save=form, evaluate_every=0.2)
    step = Trainer._step

    def stopped(self: Trainer, rows: list[int], number: int) -> dict[str, Any]:
        self.interrupted = number == 3
        return step(self, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        with pytest.raises(TrainingInterrupted, match="after step 4 of 6"):
            adapt(base, tmp_path / "broken", method=stack, save=form, evaluate_every=0.2)
    broken = adapt(base, tmp_path / "broken", method=stack, save=form, evaluate_every=0.2, resume=True)
    assert [p.name for p in whole.path.glob("*.safetensors")] == ["luthier.safetensors"] and not (whole.path / "adapter_config.json").exists()
    assert json.loads((whole.path / "luthier.json").read_text(encoding="utf-8"))["stack"] == stack
    first, second = load_file(whole.path / "luthier.safetensors"), load_file(broken.path / "luthier.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(whole.model), logits(broken.model))


@pytest.mark.parametrize("words,nearest", [(["adapt", "--bacth-size", "4"], "--batch-size"), (["evaluate", "run", "--splt", "test"], "--split"), (["predict", "run", "--otu", "x"], "--out")])
def test_misspelt_flags_are_refused_with_the_nearest(words: list[str], nearest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["luthier", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and words[-2] in said and nearest in said


@pytest.mark.parametrize("stack,place", [("lora", "query"), ("lora", "value"), ("adapter(reduction=8)", "luthier_adapter.body"), ("he_parallel(reduction=4)", "luthier_he_parallel.body")])
def test_under_bf16_a_method_keeps_no_float32_inputs(stack: str, place: str) -> None:
    """What backward needs of an activation that comes in bf16 stays bf16. On fake tensors: types are followed and nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = checks.Subject(stack, "bert").fitted(moved=True).model.train()
    module = next(m for name, m in model.named_modules() if name.endswith(place))
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = torch.zeros(5, 11, 32, dtype=torch.bfloat16, requires_grad=True)
        assert module(hidden).dtype == torch.bfloat16
    activations = {dtype for shape, dtype in kept if 5 in shape or 55 in shape}
    assert activations == {torch.bfloat16}, kept


@pytest.mark.parametrize("tag", list(tasks()))
def test_evaluation_keeps_little_of_each_batch(tag: str, tmp_path: Path) -> None:
    """Of every batch's logits and hidden states nothing is left when the next is computed, and what a row leaves does not grow with vocabulary, width or padding."""
    architecture = "gpt2" if tag == "text-generation" else "bert"
    run = luthier.adapt(tiny_folder(tmp_path / "model", architecture, find(tag).auto_class if architecture == "gpt2" else "AutoModel"), tiny_rows(tag, 60), task=tag, dry_run=True, out=tmp_path / "run", console=Heard())
    task, features = run.task, run.features["train"]  # type: ignore[union-attr]
    model = tiny_model(architecture, type(task).auto_class, num_labels=len(getattr(task, "labels", (0,))))
    seen: list[weakref.ref[torch.Tensor]] = []

    def watch(module: nn.Module, given: Any, found: Any) -> None:
        gc.collect()
        assert not [ref for ref in seen if ref() is not None], "the outputs of an earlier batch are still there"
        seen.append(weakref.ref(loading.first_output(found)))

    def forget(*_: Any) -> None:
        pass

    if tag == "sentence-similarity":  # a batch goes through the model in parts; they are dropped together
        found = evaluation.outputs(model, task, features, tiny_tokenizer(architecture), batch_size=6, progress=forget)
    else:
        model.register_forward_hook(watch)
        found = evaluation.outputs(model, task, features, tiny_tokenizer(architecture), batch_size=6)
        assert len(seen) == -(-len(features) // 6)
    for value, row in zip(found, features, strict=True):
        owner = value if value.base is None else value.base
        vectors = 3 * 4 * 32 if tag == "sentence-similarity" else 0
        assert value.nbytes <= max(64, 16 * row.length) + vectors and owner.nbytes <= 6 * max(64, 16 * 48) + 6 * vectors


def test_predicting_reads_no_further_than_it_answers(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is read and tokenised when its turn comes; at no time are more than a chunk under way."""
    run = finished("lora", "auto")
    monkeypatch.setattr(predict, "CHUNK", 4)
    read, ahead = [0], []

    def counted(*given: Any, **more: Any) -> Any:
        for row in sources.stream(*given, **more):
            read[0] += 1
            yield row

    encode = TextClassification.encode
    done = [0]

    def watched(self: Any, row: Any, tokenizer: Any, max_length: int) -> Any:
        done[0] += 1
        ahead.append(read[0] - done[0])
        return encode(self, row, tokenizer, max_length)

    monkeypatch.setattr(predict, "stream", counted)
    monkeypatch.setattr(TextClassification, "encode", watched)
    assert luthier.predict(run, write_jsonl(tmp_path / "rows.jsonl", ROWS), out=tmp_path / "out.jsonl", console=Heard()) == done[0] == read[0] == len(ROWS)
    assert max(ahead) <= 4


def test_training_tokenises_each_row_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a pass, an evaluation or a process that measures. (It is not kept between calls: a resumed run tokenises once more.)"""
    seen: list[tuple[str, int | None]] = []
    encode = TextClassification.encode

    def counted(self: Any, row: Any, tokenizer: Any, max_length: int) -> Any:
        seen.append((row.file, row.line))
        return encode(self, row, tokenizer, max_length)

    monkeypatch.setattr(TextClassification, "encode", counted)
    adapt(base, tmp_path / "run", max_steps=None, epochs=3, evaluate_every=0.5)
    assert len(seen) == len(set(seen)) <= len(ROWS)
