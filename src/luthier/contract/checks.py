"""What the suite holds a method to. A check takes a `Subject` and raises AssertionError, saying what does not hold."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contract.tiny import tiny_config, tiny_inputs, tiny_model
from luthier.methods import changes, loading, saving, stock_adapter
from luthier.methods.engine import Fitted
from luthier.methods.planner import plan
from luthier.methods.stack import parse
from luthier.methods.stock_adapter import TASK_TYPES
from luthier.verbs.apply import apply

VISION = ("vit", "dinov2")
DECODERS = ("gpt2", "llama")
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Subject:
    """One stack on one architecture: decoders as language models, the others as classifiers of three classes."""

    stack: str
    architecture: str

    @property
    def auto_class(self) -> str:
        if self.architecture in DECODERS:
            return "AutoModelForCausalLM"
        return "AutoModelForImageClassification" if self.architecture in VISION else "AutoModelForSequenceClassification"

    def base(self) -> nn.Module:
        return tiny_model(self.architecture, self.auto_class, num_labels=3)

    def fitted(self, moved: bool = False) -> Fitted:
        """The stack on a fresh model; `moved` takes what learns away from its start, so that doing nothing cannot pass."""
        model = apply(self.base(), self.stack, seed=1)
        fitted: Fitted = model.luthier  # type: ignore[assignment]
        if moved:
            rng = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for parameter in fitted.trainable.values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
        return fitted

    def inputs(self, rows: int = 3) -> dict[str, Tensor]:
        inputs = tiny_inputs(self.architecture, batch=rows)
        inputs.pop("decoder_input_ids", None)
        if self.architecture == "t5":  # its classifier reads the end-of-text token of each row
            last = inputs["attention_mask"].sum(1) - 1
            inputs["input_ids"][torch.arange(rows), last] = tiny_config("t5").eos_token_id
        return inputs

    def logits(self, model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(**(inputs or self.inputs())).logits

    def train(self, fitted: Fitted, steps: int = 2) -> list[dict[str, Tensor | None]]:
        """A few steps on a fixed probe loss; the gradients of each."""
        optimizer = torch.optim.AdamW(fitted.trainable.values(), lr=LEARNING_RATE)
        seen = []
        fitted.model.train()
        torch.manual_seed(4)
        for _ in range(steps):
            optimizer.zero_grad()
            logits = fitted.model(**self.inputs()).logits
            (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
            seen.append({name: None if p.grad is None else p.grad.clone() for name, p in fitted.trainable.items()})
            optimizer.step()
        return seen


def spells_itself(subject: Subject) -> None:
    """Text, list and YAML of the stack are the same, and print back canonically."""
    stack = parse(subject.stack)
    assert parse(str(stack)) == stack, f"{stack} does not parse to itself"
    assert parse(stack.plain()) == stack, f"the YAML form {stack.plain()} is another stack"


def plans_what_it_does(subject: Subject) -> None:
    """The plan, made on the meta device, counts what is then trained."""
    fitted = subject.fitted()
    with torch.device("meta"):
        bare = type(subject.base())(subject.base().config)
    promised = plan(bare, fitted.stack, fitted.new_heads, TASK_TYPES.get(subject.auto_class))
    if promised.steps and not any("counted once" in note for note in promised.notes):
        counted = sum(p.numel() for p in fitted.trainable.values())
        assert promised.trainable == counted, f"the plan says {promised.trainable:,} trained parameters, there are {counted:,}"


def starts_at_base(subject: Subject) -> None:
    """Before training, outputs are those of the unchanged model."""
    torch.testing.assert_close(subject.logits(subject.fitted().model), subject.logits(subject.base()), rtol=0, atol=1e-6)


def acts(subject: Subject) -> None:
    """Every tensor that learns and is reached gets a gradient other than zero within two steps, and the outputs move."""
    fitted = subject.fitted()
    before = subject.logits(fitted.model)
    first, second = subject.train(fitted)
    stuck = [name for name, g in first.items() if g is not None and not bool((g != 0).any()) and not bool((second[name] != 0).any())]  # type: ignore[operator]
    assert not stuck, f"no gradient in two steps: {', '.join(stuck[:4])}"
    brought = [name for name, g in first.items() if g is None and name in fitted.added]
    assert not brought, f"brought by the method and never reached: {', '.join(brought[:4])}"
    assert (subject.logits(fitted.model) - before).abs().max() > 1e-4, "two steps change no output"


def keeps_base(subject: Subject) -> None:
    """Training leaves every weight of the base as it was, bit for bit; heads aside."""
    fitted = subject.fitted()
    before = {name: tensor.clone() for name, tensor in fitted.model.state_dict().items() if name not in fitted.added and name not in fitted.new_heads}
    subject.train(fitted)
    after = fitted.model.state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not moved, f"the base's {', '.join(moved[:4])} changed"


def opens_only_what_it_says(subject: Subject) -> None:
    """What is not open does not change in training."""
    fitted = subject.fitted()
    closed = {name: p.detach().clone() for name, p in fitted.model.named_parameters() if not p.requires_grad}
    subject.train(fitted)
    moved = [name for name, p in fitted.model.named_parameters() if name in closed and not torch.equal(p, closed[name])]
    assert not moved, f"not open, and yet changed: {', '.join(moved[:4])}"


def merges_exactly(subject: Subject) -> None:
    """The merged model answers as the unmerged one."""
    fitted = subject.fitted(moved=True)
    apart = subject.logits(fitted.model)
    assert (apart - subject.logits(subject.base())).abs().max() > 1e-4, "the method does nothing"
    fitted.merge()
    assert set(fitted.model.state_dict()) == set(subject.base().state_dict()), "merging left tensors of its own"
    torch.testing.assert_close(subject.logits(fitted.model), apart, rtol=0, atol=1e-5)


def forward_is_effective(subject: Subject) -> None:
    """A WeightChange's own forward is its effective weight applied, in float64."""
    fitted = subject.fitted(moved=True)
    rng = torch.Generator().manual_seed(5)
    for module in [m for m in fitted.model.modules() if isinstance(m, changes.Changed) and not isinstance(m, nn.Embedding)]:
        module.double()  # type: ignore[attr-defined]
        for change in module.changes():
            weight = changes.site_weight(module, change.rows)  # type: ignore[arg-type]
            x = torch.randn(5, weight.shape[1], generator=rng, dtype=torch.float64)
            base = changes.Linear(weight, None, lambda z, w=weight: z @ w.T)
            torch.testing.assert_close(change.method.forward(x, base, change, False), x @ change.method.effective(weight, change).T)


def survives_a_copy(subject: Subject) -> None:
    """A deep copy answers the same, and training the copy leaves the original alone."""
    fitted = subject.fitted(moved=True)
    twin = copy.deepcopy(fitted)
    before = subject.logits(fitted.model)
    torch.testing.assert_close(subject.logits(twin.model), before, rtol=0, atol=0)
    subject.train(twin)
    torch.testing.assert_close(subject.logits(fitted.model), before, rtol=0, atol=0)


def batches_are_rows(subject: Subject) -> None:
    """One by one is the same as batched."""
    fitted = subject.fitted(moved=True)
    inputs = subject.inputs()
    together = subject.logits(fitted.model, inputs)
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum()) if "attention_mask" in inputs else None
        alone = {name: value[row : row + 1] if length is None else value[row : row + 1, :length] for name, value in inputs.items()}
        expected = together[row : row + 1] if together.dim() == 2 else together[row : row + 1, :length]
        torch.testing.assert_close(subject.logits(fitted.model, alone), expected, rtol=0, atol=2e-5)


def round_trips(subject: Subject) -> None:
    """Saved in every form that can hold it, and loaded by the one loader, it answers the same."""
    for form in saving.FORMS:
        fitted = subject.fitted(moved=True)
        before = subject.logits(fitted.model)
        try:
            saving.check_form(fitted.stack, form)
        except saving.UserError:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder, base = Path(name) / "run", _save_base(subject, Path(name))
            folder.mkdir()
            saved = saving.save(fitted, folder, base, form, subject.logits)
            after = subject.logits(loading.load(folder, subject.auto_class, _three))
            worst = float((after - before).abs().max())
            assert worst <= (1e-5 if saved.form == "model" else 2e-6), f"saved as {form} ({saved.form}) it answers differently by {worst:.1e}"


def reloads_in_stock_transformers(subject: Subject) -> None:
    """`from_pretrained` of transformers or peft opens the saved folder with equal outputs."""
    import peft
    import transformers

    # a change of a weight without factors is no LoRA: apart from its base only luthier can hold it, merged it is a stock folder
    low_rank = stock_adapter.low_rank(subject.fitted().model, None) is not None
    forms = ["auto"] + (["adapter"] if low_rank else [])
    for form in forms:
        fitted = subject.fitted(moved=True)
        before = subject.logits(fitted.model)
        with tempfile.TemporaryDirectory() as name:
            folder, base = Path(name) / "run", _save_base(subject, Path(name))
            folder.mkdir()
            saved = saving.save(fitted, folder, base, form, subject.logits)
            assert saved.form != "luthier", f"saved as {form} it is no stock folder"
            with saving.quiet():
                opened = getattr(transformers, subject.auto_class).from_pretrained(base.path if saved.form == "adapter" else str(folder), local_files_only=True)
                if saved.form == "adapter":
                    opened = peft.PeftModel.from_pretrained(opened, str(folder))
            worst = float((subject.logits(opened) - before).abs().max())
            assert worst <= 1e-5, f"saved as {form} ({saved.form}), stock code gets outputs that differ by {worst:.1e}"


def keeps_shapes(subject: Subject) -> None:
    """Names and shapes of the model's own tensors are those of the base (after merging, where there is something to merge)."""
    fitted = subject.fitted(moved=True)
    if fitted.mergeable:
        fitted.merge()
    own = {name: tuple(tensor.shape) for name, tensor in subject.base().state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in fitted.model.state_dict().items()}
    assert own == found, f"differ in {sorted(set(own) ^ set(found))[:4]}"


def _three(config: Any) -> None:
    config.num_labels = 3


def _save_base(subject: Subject, folder: Path) -> saving.Base:
    path = folder / "base"
    with saving.quiet():
        subject.base().save_pretrained(str(path))  # type: ignore[operator]
    return saving.Base(str(path), loading.sha256(path), subject.auto_class)


ALWAYS: tuple[Callable[[Subject], None], ...] = (spells_itself, plans_what_it_does, acts, opens_only_what_it_says, forward_is_effective, survives_a_copy, batches_are_rows, round_trips)
PROMISED: dict[str, Callable[[Subject], None]] = {f.__name__: f for f in (starts_at_base, merges_exactly, keeps_base, keeps_shapes, reloads_in_stock_transformers)}

