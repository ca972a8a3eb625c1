"""Blocks that run fused on packed rows answer and learn as the stock ones do."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Qwen3Config

from luthier import Anatomy, compute
from luthier.compute import fusing, kernels, pieces, varlen
from luthier.compute.fusing import Fusing
from luthier.contract.tiny import CONFIGS, tiny_inputs, tiny_model
from luthier.methods.engine import install
from luthier.methods.inserts import Sequential
from luthier.methods.stack import parse

FUSED = ("bert", "roberta", "albert", "distilbert", "gpt2", "vit", "dinov2")
BY_KERNELS = ("llama", "qwen3", "t5")  # fused where kernels are, which know no float64
STACKS = ("full", "lora", "lora(r=3, alpha=5, sites=attention.*+mlp.*)", "bitfit", "lora(sites=mlp.up)|bitfit", "houlsby(reduction=4)", "pfeiffer(reduction=4)|lora(sites=mlp.down)", "he_parallel(reduction=4)", "lora(r=2, dropout=0.5, sites=attention.*)")


needs_kernels = pytest.mark.skipif(not kernels.library(), reason="no kernels on this machine")


@pytest.fixture(autouse=True)
def more_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the contract suite does not run on."""
    qwen3 = Qwen3Config(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12, intermediate_size=56, max_position_embeddings=64, pad_token_id=0)
    monkeypatch.setitem(CONFIGS, "qwen3", lambda: qwen3)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fusing]]:
    """Every `Fusing` that is entered."""
    made: list[Fusing] = []
    monkeypatch.setattr(Fusing, "__enter__", lambda self, enter=Fusing.__enter__: made.append(self) or enter(self))
    yield made


def skip(unread: tuple[str | None, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the block of this stack and number be one that cannot be read."""
    monkeypatch.setattr(fusing.reading, "read", lambda block, *given, read=fusing.reading.read: None if (block.stack, block.index) == unread else read(block, *given))


def moved(model: nn.Module) -> nn.Module:
    """With everything that learns away from its start, where much of it is zero."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype), alpha=0.1)
    return model


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**inputs).last_hidden_state
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is not None:
        out = out * mask.unsqueeze(-1)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def inputs_for(architecture: str, **more: int) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(architecture, **more)
    if architecture == "t5":  # answers of other lengths than their rows, in another order
        lengths = torch.arange(len(inputs["input_ids"])) * 3 % 5 + 1
        inputs["decoder_attention_mask"] = (torch.arange(5) < lengths[:, None]).long()
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("architecture,dtype", [*((name, torch.float64) for name in FUSED), *((name, torch.float32) for name in (*FUSED, *BY_KERNELS))], ids=str)
def test_answers_and_gradients_are_the_same(architecture: str, dtype: torch.dtype, stack: str, fused: list[Fusing]) -> None:
    """By torch's own kernels and by ours."""
    if dtype == torch.float32 and not kernels.library():
        pytest.skip("no kernels on this machine")
    if architecture in BY_KERNELS and "bitfit" in stack:
        pytest.skip("it has no biases")
    model = moved(install(tiny_model(architecture).double(), parse(stack)).model)
    inputs = inputs_for(architecture, batch=5, length=9)
    expected = gradients(model, inputs)
    if dtype == torch.float32:
        model, inputs = model.float(), {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    with compute.prepared(model, "cpu", "fp32"):
        found = gradients(model, inputs)
        blocks = len({id(block.module) for block in Anatomy.of(model).blocks})
        assert len(fused[0].found.fused) == blocks
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected)
    else:  # also of the expected numbers, which were computed in float64
        largest = max(float(x.abs().max()) for x in expected[1].values())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest, check_dtype=False)


@pytest.mark.parametrize("architecture", [name for name in FUSED if name not in ("vit", "dinov2")])
def test_a_row_is_the_same_in_any_company(architecture: str) -> None:
    """Packed with others, in any order, or alone."""
    model, inputs = tiny_model(architecture).double(), inputs_for(architecture, batch=6, length=8)
    lengths = inputs["attention_mask"].sum(1)
    with torch.no_grad(), compute.prepared(model, "cpu", "fp32", learning=False):
        together = model(**inputs).last_hidden_state
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        shuffled = model(**{name: x[order] for name, x in inputs.items()}).last_hidden_state
        for row, length in enumerate(lengths):
            alone = model(**{name: x[row : row + 1, :length] for name, x in inputs.items()}).last_hidden_state[0]
            torch.testing.assert_close(together[row, :length], alone)
            torch.testing.assert_close(shuffled[(order == row).nonzero().item(), :length], alone)


@needs_kernels
@pytest.mark.parametrize("unread", [None, ("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)], ids=str)
@pytest.mark.parametrize("stack", ["lora(sites=encoder.blocks[0].mlp.up)", "lora(sites=decoder.blocks[-1].cross_attention.query)", "lora(sites=encoder.blocks[-1].attention.*)|he_parallel(sites=decoder.blocks[1].mlp.out)"])
def test_two_stacks_of_which_only_some_blocks_learn_or_fuse(stack: str, unread: tuple[str, int] | None, fused: list[Fusing], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient comes to the encoder through cross attention alone; the first block of a stack says what the others add for distances."""
    skip(unread, monkeypatch)
    model, inputs = moved(install(tiny_model("t5").double(), parse(stack)).model), inputs_for("t5", batch=4, length=6)
    expected = gradients(model, inputs)
    with compute.prepared(model.float(), "cpu", "fp32"):
        found = gradients(model, inputs)
    assert len(fused[0].found.fused) == 5 - (unread is not None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(float(x.abs().max()) for x in expected[1].values()), check_dtype=False)


@needs_kernels
@pytest.mark.parametrize("auto_class,leaves", [("AutoModelForSequenceClassification", "last"), ("AutoModelForSeq2SeqLM", None), ("AutoModelForTokenClassification", None), ("AutoModelForTextEncoding", None)])
def test_an_encoder_decoder_under_any_head(auto_class: str, leaves: str | None, fused: list[Fusing]) -> None:
    """Without an input of its own a decoder reads its encoder's, with labels those; some heads stand on the encoder alone."""
    model, inputs = tiny_model("t5", auto_class, num_labels=3), {name: x for name, x in tiny_inputs("t5", batch=4, length=6).items() if not name.startswith("decoder")}
    mask, labels = inputs["attention_mask"], inputs["input_ids"].roll(1, 0)[:, :5]
    if auto_class == "AutoModelForSeq2SeqLM":
        inputs["labels"] = labels.masked_fill(torch.arange(5) >= torch.tensor([[5], [2], [4], [3]]), -100)
    if auto_class == "AutoModelForSequenceClassification":
        inputs["input_ids"][torch.arange(4), mask.sum(1) - 1] = model.config.eos_token_id

    def learnt() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(**inputs)
        if "labels" in inputs:
            loss = out.loss
        else:
            answer = out.logits if "logits" in out else out.last_hidden_state
            answer = answer if len(answer.shape) == 2 else answer * mask.unsqueeze(-1)
            loss = (answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(0))).sum()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = learnt()
    with compute.prepared(model, "cpu", "fp32"):
        found = learnt()
    assert len(fused[0].found.fused) == len(Anatomy.of(model).blocks) and fused[0].found.leaves == leaves
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(float(x.abs().max()) for x in expected))


@needs_kernels
def test_an_encoder_decoder_writes_the_same_text(fused: list[Fusing]) -> None:
    """It writes token by token, from what it has read once."""
    model, inputs = tiny_model("t5", "AutoModelForSeq2SeqLM", num_decoder_layers=2), tiny_inputs("t5", batch=4, length=6)  # transformers makes room for as many as the encoder has
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**given, max_new_tokens=6, do_sample=False)
    with torch.no_grad(), compute.prepared(model, "cpu", "fp32", learning=False):
        model(**inputs)
        assert fused[0].found.fused
        assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), expected)


def test_what_a_row_says_reaches_no_other() -> None:
    model, inputs = tiny_model("bert").double(), inputs_for("bert", batch=4, length=6)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][2] = (other["input_ids"][2] + 7) % 90
    with torch.no_grad(), compute.prepared(model, "cpu", "fp32"):
        a, b = model(**inputs).last_hidden_state, model(**other).last_hidden_state
    assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]]) and not torch.allclose(a[2], b[2])


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("stack", ["freeze(bottom=1)", "lora(sites=blocks[-1:].mlp.up)"])
def test_blocks_of_which_only_some_learn(architecture: str, stack: str) -> None:
    model, inputs = moved(install(tiny_model(architecture).double(), parse(stack)).model), inputs_for(architecture)
    expected = gradients(model, inputs)
    with compute.prepared(model, "cpu", "fp32"):
        torch.testing.assert_close(gradients(model, inputs), expected)


@pytest.mark.parametrize("by", ["our kernel", "one length at a time", "jagged rows"])
@pytest.mark.parametrize("architecture,stack", [("bert", "he_parallel"), ("bert", "lora"), ("distilbert", "he_parallel|lora"), ("gpt2", "full"), ("llama", "lora")])
def test_blocks_that_do_not_fuse_run_by_themselves_on_packed_rows(architecture: str, stack: str, by: str, fused: list[Fusing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing.reading, "read", lambda *_: None)
    if by == "our kernel" and not kernels.library():
        pytest.skip("no kernels on this machine")
    if by == "jagged rows":
        if architecture in ("gpt2", "llama"):
            pytest.skip("torch has causal attention over jagged rows on GPUs alone")
        monkeypatch.setattr(varlen, "_by_length", varlen._jagged)
    model = moved(install(tiny_model(architecture).double(), parse(stack)).model)
    inputs, shapes = inputs_for(architecture, batch=5, length=8), set()
    expected = gradients(model, inputs)
    model = model.float() if by == "our kernel" else model
    of_model = {block.module for block in Anatomy.of(model).blocks}
    with compute.prepared(model, "cpu", "fp32"):
        model(**inputs)
        with Anatomy.of(model).blocks[0].sites["mlp.down"].module.register_forward_hook(lambda _, __, y: shapes.add(tuple(y.shape[:-1]))):
            found = gradients(model, inputs)
    assert not fused[0].found.fused and fused[0].found.packed == of_model
    assert shapes == {(1, 32)}, "30 tokens and two spare ones instead of 40"
    largest = max(float(x.abs().max()) for x in expected[1].values())
    torch.testing.assert_close(found, expected, **({"rtol": 1e-4, "atol": 1e-5 * largest, "check_dtype": False} if by == "our kernel" else {}))


def test_a_block_in_which_tokens_meet_elsewhere_keeps_its_padding(fused: list[Fusing], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention is that of packed rows, but something else in it looks at the whole row."""
    model, inputs = install(tiny_model("bert").double(), parse("he_parallel")).model, inputs_for("bert")
    monkeypatch.setattr(fusing.reading, "read", lambda *_: None)
    for layer in model.encoder.layer:
        layer.output.dropout.forward = lambda x: x + x.mean(1, keepdim=True)
    expected = gradients(model, inputs)
    with compute.prepared(model, "cpu", "fp32"):
        torch.testing.assert_close(gradients(model, inputs), expected)
    assert not fused[0].found.fused and not fused[0].found.packed


def test_an_insert_draws_the_same_on_the_way_back(fused: list[Fusing]) -> None:
    """Where nothing else draws, both ways draw alike."""
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = moved(install(BertModel(config).double(), parse("houlsby(reduction=4)")).model).train()
    for insert in [m for m in model.modules() if isinstance(m, Sequential)]:
        insert.body = nn.Sequential(insert.body, nn.Dropout(0.5))
    inputs = {"input_ids": torch.arange(5, 29).view(3, 8)}  # without padding, as numbers are drawn for it too
    torch.manual_seed(0)
    expected = gradients(model, inputs)
    with compute.prepared(model, "cpu", "fp32"):
        model(**inputs)
        assert len(fused[0].found.fused) == 2
        torch.manual_seed(0)
        torch.testing.assert_close(gradients(model, inputs), expected)


@pytest.mark.parametrize("unread", [0, 1, 2])
def test_some_blocks_fused_and_some_not(unread: int, fused: list[Fusing], monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows go from one kind to the other."""
    skip((None, unread), monkeypatch)
    model = moved(install(tiny_model("bert").double(), parse("lora")).model)
    expected = gradients(model, inputs_for("bert"))
    with compute.prepared(model, "cpu", "fp32", leave=[]):
        found = gradients(model, inputs_for("bert"))
    assert len(fused[0].found.fused) == 2 and len(fused[0].found.packed) == 1
    torch.testing.assert_close(found, expected)


def test_a_model_that_would_answer_otherwise_is_left_alone(fused: list[Fusing], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read off a block is tried: here it was read wrongly."""
    right = fusing.reading.read

    def wrong(*args: object) -> object:
        found = right(*args)  # type: ignore[arg-type]
        found.sublayers[1].pieces[1].__dict__.update(pieces.local(nn.ReLU()).__dict__)  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(fusing.reading, "read", wrong)
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    expected = model(**inputs).last_hidden_state
    with compute.prepared(model, "cpu", "fp32"):
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected)
    assert not fused[0].found.fused


def test_dropout_is_where_the_block_has_it() -> None:
    """Attention weights, attention output and feed-forward output each drop their own share, and eval mode none."""
    model = BertModel(BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    inputs = tiny_inputs("bert", batch=2, length=4)
    layer = model.encoder.layer[0]
    drops = {"weights": layer.attention.self, "attention output": layer.attention.output.dropout, "feed-forward output": layer.output.dropout}
    with torch.no_grad(), compute.prepared(model, "cpu", "fp32"):
        still = model.eval()(**inputs).last_hidden_state
        for name, module in drops.items():
            model.eval()
            module.train()
            assert not torch.allclose(model(**inputs).last_hidden_state, still), name
        model.eval()
        torch.testing.assert_close(model(**inputs).last_hidden_state, still)


@pytest.mark.parametrize("unusual", [{"output_attentions": True}, {"output_hidden_states": True}])
def test_what_only_the_stock_blocks_give_comes_from_them(unusual: dict[str, bool]) -> None:
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    model.set_attn_implementation("eager")
    with torch.no_grad(), compute.prepared(model, "cpu", "fp32"):
        model(**inputs)
        found = model(**inputs, **unusual)
    assert len(found.attentions if "output_attentions" in unusual else found.hidden_states) >= 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_found_out_is_remembered_until_the_model_changes(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, looks = tiny_model("bert"), tiny_inputs("bert"), []
    monkeypatch.setattr(Fusing, "_find_out", lambda self, given, find_out=Fusing._find_out: looks.append(1) or find_out(self, given))

    def answer(model: nn.Module, remember: bool = True) -> torch.Tensor:
        with torch.inference_mode(), compute.running(model, "cpu", precision, remember=remember):
            return model(**inputs).last_hidden_state

    def anew(model: nn.Module) -> torch.Tensor:
        found = answer(model, remember=False)
        looks.pop()
        return found

    first = answer(model)
    assert torch.equal(answer(model), first) and len(looks) == 1
    layer = model.encoder.layer[1]
    layer.intermediate.dense.weight.data.mul_(1.5)  # torch does not count this
    assert torch.equal(answer(model), anew(model)) and len(looks) == 2
    layer.output.LayerNorm.weight.data.mul_(1.5)  # read anew in each pass
    assert torch.equal(answer(model), anew(model)) and len(looks) == 2
    layer.intermediate.dense = nn.Linear(layer.intermediate.dense.in_features, layer.intermediate.dense.out_features)
    assert torch.equal(answer(model), anew(model)) and len(looks) == 3
    layer.intermediate.intermediate_act_fn = nn.ReLU()
    assert torch.equal(answer(model), anew(model)) and len(looks) == 4
    model.config.output_hidden_states = True
    assert torch.equal(answer(model), anew(model)) and len(looks) == 5
    alive = len(fusing._remembered)
    del model, layer
    gc.collect()
    assert len(fusing._remembered) == alive - 1


def test_rows_of_one_token_tell_nothing(fused: list[Fusing]) -> None:
    model, inputs = tiny_model("bert"), tiny_inputs("bert", batch=3, length=6)
    short = {name: x[:, :1] for name, x in inputs.items()}
    with torch.no_grad(), compute.prepared(model, "cpu", "fp32"):
        model(**short)
        assert not fused[-1].known
        model(**inputs)
        assert fused[-1].known and fused[-1].found.fused


def test_every_architecture_is_known_to_fuse_or_not(fused: list[Fusing]) -> None:
    found = set()
    for architecture in CONFIGS:
        model = tiny_model(architecture)
        with torch.no_grad(), compute.prepared(model, "cpu", "fp32"):
            model(**tiny_inputs(architecture))
            if fused[-1].found.fused:
                found.add(architecture)
    assert found == {*FUSED, *(BY_KERNELS if kernels.library() else ())}


@pytest.mark.parametrize("stack", ["full", "lora", "bitfit"])
@pytest.mark.parametrize("architecture,leaves", [("bert", "first"), ("roberta", "first"), ("distilbert", "first"), ("albert", "first"), ("vit", "first"), ("gpt2", "last")])
def test_of_the_last_block_only_the_pooled_token_is_computed(architecture: str, leaves: str, stack: str, fused: list[Fusing]) -> None:
    """Where a stock head reads one token of each row, with the same logits and gradients."""
    vision = architecture == "vit"
    model = tiny_model(architecture, "AutoModelForImageClassification" if vision else "AutoModelForSequenceClassification", num_labels=3).double()
    heads = tuple(name for name, _ in model.named_parameters() if name.split(".")[0] in ("classifier", "score", "pre_classifier"))
    model, inputs = moved(install(model, parse(stack), new_heads=heads).model), inputs_for(architecture, batch=4, length=6)

    def learnt() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(**inputs).logits
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)).sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = learnt()
    with compute.prepared(model, "cpu", "fp32"):
        found = learnt()
    assert fused[0].found.fused and fused[0].found.leaves == leaves
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1].get(name, torch.zeros_like(gradient)), gradient)


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForTokenClassification"])
def test_where_every_token_matters_every_token_is_computed(auto_class: str, fused: list[Fusing]) -> None:
    model = tiny_model("bert", auto_class)
    with torch.no_grad(), compute.prepared(model, "cpu", "fp32"):
        model(**tiny_inputs("bert"))
    assert fused[0].found.fused and fused[0].found.leaves is None


def test_rows_of_one_token_do_not_tell_which_token_matters(fused: list[Fusing]) -> None:
    """They come first here; what is decided on them must hold for the longer rows after them."""
    model, inputs = tiny_model("bert", "AutoModelForSequenceClassification", num_labels=2).double(), inputs_for("bert", batch=3, length=6)
    model.bert.pooler.forward = lambda states: states.mean(1)  # a head that reads every token
    short = {name: x[:, :1] for name, x in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        with compute.prepared(model, "cpu", "fp32"):
            model(**short)
            full = {name: x[:1, :6] for name, x in inputs.items()}
            torch.testing.assert_close(model(**full).logits, expected[:1])
    assert fused[0].found.fused and fused[0].found.leaves is None


@pytest.mark.parametrize("stack", ["full", "lora(dropout=0.1)", "he_parallel"])
@pytest.mark.parametrize("architecture", ["bert", "albert", "llama", "t5", "dinov2"])
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(architecture: str, stack: str) -> None:
    """To the bit, with dropout, fused or not."""
    model = moved(install(tiny_model(architecture), parse(stack)).model).train()
    inputs = tiny_inputs(architecture, batch=5, length=9)
    kept: list[int] = []

    def learnt(recompute: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with compute.prepared(model, "cpu", "fp32", recompute=recompute):
            with torch.no_grad():
                model(**inputs)
            model.zero_grad()
            torch.manual_seed(0)
            held = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
                out = model(**inputs).last_hidden_state
            kept.append(sum(held))
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, found = learnt(False), learnt(True)
    assert torch.equal(found[0], expected[0]) and set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name
    assert kept[1] < kept[0]
