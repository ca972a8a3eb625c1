"""Roles, shapes and places of every family, held against forward passes of tiny random models."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import forward_inputs, pairs
from torch import nn
from transformers.pytorch_utils import Conv1D

import luthier
from luthier import Anatomy, UserError
from luthier.anatomy import Site
from luthier.anatomy.anatomy import POINTS
from luthier.contract.tiny import CONFIGS, tiny_config, tiny_inputs, tiny_model

# width, inner width, query outputs, key outputs, blocks
SHAPES = {
    "bert": (32, 48, 32, 32, 3),
    "roberta": (24, 40, 24, 24, 2),
    "albert": (32, 56, 32, 32, 3),
    "distilbert": (32, 72, 32, 32, 2),
    "gpt2": (32, 128, 32, 32, 3),
    "llama": (32, 56, 32, 16, 2),
    "t5": (32, 48, 32, 32, 5),
    "vit": (32, 48, 32, 32, 2),
    "dinov2": (24, 48, 24, 24, 3),
}
EXTRA = {
    "gpt2": {"attention.qkv": (96, 32)},
    "llama": {"mlp.gate": (56, 32)},
    "dinov2": {"attention.scale": (24, 24), "mlp.scale": (24, 24)},
}
OUTSIDE = {
    "bert": (["embeddings"], ["pooler"]),
    "roberta": (["embeddings"], ["pooler"]),
    "albert": (["embeddings", "encoder.embedding_hidden_mapping_in"], ["pooler"]),
    "distilbert": (["embeddings"], []),
    "gpt2": (["wte", "wpe"], []),
    "llama": (["embed_tokens"], []),
    "t5": (["shared", "encoder.embed_tokens", "decoder.embed_tokens"], []),
    "vit": (["embeddings"], ["pooler"]),
    "dinov2": (["embeddings"], []),
}
POST_NORM = ("bert", "roberta", "albert", "distilbert")


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_role_has_its_shape(architecture: str) -> None:
    width, inner, query, key, blocks = SHAPES[architecture]
    anatomy = Anatomy.of(tiny_model(architecture))
    assert anatomy.width == width and len(anatomy.blocks) == blocks
    for block in anatomy.blocks:
        attentions = ["attention", "cross_attention"] if block.stack == "decoder" else ["attention"]
        expected = {f"{part}.{leaf}": (width, width) for part in [*attentions, "mlp"] for leaf in ("norm", "out")}
        for part in attentions:
            expected |= {f"{part}.query": (query, width), f"{part}.key": (key, width), f"{part}.value": (key, width), f"{part}.output": (width, query)}
        expected |= {"mlp.up": (inner, width), "mlp.down": (width, inner)} | EXTRA.get(architecture, {})
        if architecture == "t5" and block.index == 0:
            expected["attention.bias"] = (4, 32)  # heads, distances
        assert {role: (site.outputs, site.inputs) for role, site in block.sites.items()} == expected
    assert ([site.name for site in anatomy.embeddings], [site.name for site in anatomy.pooler]) == OUTSIDE[architecture]


@pytest.mark.parametrize("architecture,head", pairs())
def test_a_forward_pass_goes_through_the_roles_of_each_block_in_turn(architecture: str, head: str) -> None:
    model = tiny_model(architecture, head)
    blocks = Anatomy.of(model).blocks
    roles = [{site.module: site for site in block.sites.values() if site.rows is None} for block in blocks]
    calls: list[tuple[nn.Module, int, int]] = []
    for module in {module for block in roles for module in block}:
        module.register_forward_hook(lambda m, args, output: calls.append((m, args[0].shape[-1] if args else -1, output.shape[-1])))
    with torch.no_grad():
        model(**forward_inputs(architecture, head))
    turn, seen = 0, set()
    for module, inputs, outputs in calls:
        if module in seen or module not in roles[turn]:  # the next block has begun
            assert seen == set(roles[turn]), f"block {turn} was left before all of it was used"
            turn, seen = turn + 1, set()
        seen.add(module)
        site = roles[turn][module]
        assert outputs == (site.outputs if site.role != "attention.bias" else 4)
        assert not isinstance(module, (nn.Linear, Conv1D)) or site.role in POINTS or inputs == site.inputs
    assert turn == len(blocks) - 1 and seen == set(roles[turn])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_points_are_what_the_residual_stream_takes_in(architecture: str) -> None:
    """With stream x: pre-norm x' = x + point(entry = norm(x)); post-norm x' = norm(x + point(entry = x)). So what is added at a point is added to the stream."""
    model = tiny_model(architecture).train()  # a point before its sublayer's dropout is found out
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    anatomy = Anatomy.of(model)
    met: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    sublayers = [(block, role.partition(".")[0]) for block in anatomy.blocks for role in block.sites if role in POINTS]
    final = [site.module for site in anatomy.norms if site.role == "norm"]
    entries = {site.entry for block in anatomy.blocks for site in block.sites.values() if site.entry}
    watched = {site.module for block in anatomy.blocks for role, site in block.sites.items() if role in POINTS or role.endswith(".norm")} | entries | set(final)
    for module in watched:
        module.register_forward_hook(lambda m, args, kwargs, out: met.setdefault(m, []).append((args[0] if args else next(iter(kwargs.values())), out)), with_kwargs=True)
    with torch.no_grad():
        model(**tiny_inputs(architecture))

    def at(module: nn.Module, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        return met[module][turn if len(met[module]) > 1 else 0]

    def norm(i: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Input and output of the norm of sublayer i; past a stack's end, of its last norm."""
        if i < len(sublayers):
            block, part = sublayers[i]
            return at(block.sites[f"{part}.norm"].module, block.index)
        return at(final[-1], 0) if final else None

    for i, (block, part) in enumerate(sublayers):
        site = block.sites[f"{part}.out"]
        assert site.entry is not None
        entry, point, (before, after) = at(site.entry, block.index)[0], at(site.module, block.index)[1], norm(i) or (None, None)
        assert point.std() > 1e-3
        if architecture in POST_NORM:
            torch.testing.assert_close(before, entry + point)
        else:
            ends = i + 1 < len(sublayers) and sublayers[i + 1][0].stack != block.stack
            following = at(final[0], 0) if ends else norm(i + 1)
            torch.testing.assert_close(entry, after)
            torch.testing.assert_close(following[0], before + point)  # type: ignore[index]


@pytest.mark.parametrize("architecture,head", pairs())
def test_every_parameter_has_one_place(architecture: str, head: str) -> None:
    model = tiny_model(architecture, head)
    anatomy = Anatomy.of(model)
    tensors = anatomy.tensors()
    assert [t.name for t in tensors] == [name for name, _ in model.named_parameters()]
    # a mask token belongs to the embeddings' container, so nothing at all is left over
    assert not [t.name for t in tensors if t.role == "other"]
    assert anatomy.parameters == sum(p.numel() for p in model.parameters())
    if "Classification" in head:
        assert {t.name.split(".")[0] for t in tensors if t.role == "head"} <= {"classifier", "score", "pre_classifier", "classification_head"}
        assert any(t.role == "head" for t in tensors)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_an_adapted_model_has_the_anatomy_of_its_base(architecture: str) -> None:
    """Sites may carry other classes (subclasses) and children of methods; neither is part of the anatomy."""
    model = tiny_model(architecture)

    def seen(anatomy: Anatomy) -> tuple:
        sites = [(s.label, s.name, s.inputs, s.outputs) for expression in ("attention.*+mlp.*", "attention.out", "norm", "embeddings") for s in anatomy.sites(expression)]
        return sites, [(t.name, t.role) for t in anatomy.tensors()], anatomy.parameters, anatomy.macs(luthier.Workload()), anatomy.memory(luthier.Workload(), 0)

    before = seen(Anatomy.of(model))
    luthier.apply(model, "lora(sites=attention.query+attention.output+mlp.up)|adapter(reduction=4)")
    assert any("luthier_" in name for name, _ in model.named_parameters())
    assert type(Anatomy.of(model).blocks[0].attention.query.module) not in (nn.Linear, Conv1D)
    assert seen(Anatomy.of(model)) == before


def test_a_fused_weight_is_cut_where_the_forward_pass_cuts_it() -> None:
    model = tiny_model("gpt2")
    block = Anatomy.of(model).blocks[0]
    fused, hidden = block.attention.qkv.module, torch.randn(2, 5, 32)
    thirds = [block.sites[f"attention.{part}"] for part in ("query", "key", "value")]
    parts = [hidden @ fused.weight.T[site.rows].T + fused.bias[site.rows] for site in thirds]  # type: ignore[union-attr, index]
    torch.testing.assert_close(torch.cat(parts, -1), fused(hidden))
    assert [(site.rows.start, site.rows.stop) for site in thirds if site.rows] == [(0, 32), (32, 64), (64, 96)]
    with torch.no_grad():  # without values attention says nothing but its output's bias
        fused.weight[:, thirds[2].rows] = 0  # type: ignore[operator, index]
        fused.bias[thirds[2].rows] = 0  # type: ignore[operator, index]
    said: list[torch.Tensor] = []
    block.sites["attention.out"].module.register_forward_hook(lambda m, a, out: said.append(out))
    model(**tiny_inputs("gpt2"))
    torch.testing.assert_close(said[0], block.attention.output.module.bias.expand_as(said[0]))


def test_shared_blocks_are_one_module_with_many_turns() -> None:
    albert = Anatomy.of(tiny_model("albert"))
    assert len(albert.blocks) == 3 and len({id(block.module) for block in albert.blocks}) == 1
    assert albert.blocks[0].attention.query.calls == 3 and Anatomy.of(tiny_model("bert")).blocks[0].attention.query.calls == 1
    config = tiny_config("albert")
    config.inner_group_num = 2
    assert [block.name[-1] for block in Anatomy.of(config).blocks] == list("010101")


def test_a_map_that_reaches_only_some_blocks_is_refused() -> None:
    config = tiny_config("albert")
    config.num_hidden_groups = 2
    with pytest.raises(UserError, match=r"misses encoder\.albert_layer_groups\.1"):
        Anatomy.of(config)


def test_tied_tensors_are_listed_and_counted_once() -> None:
    anatomy = Anatomy.of(tiny_model("gpt2", "AutoModelForCausalLM"))
    assert anatomy.tied == [("transformer.wte.weight", "lm_head.weight")] and [site.name for site in anatomy.head] == ["lm_head"]
    assert Anatomy.of(tiny_config("gpt2"), auto_class="AutoModelForCausalLM").tied == anatomy.tied
    assert not Anatomy.of(tiny_model("llama", "AutoModelForCausalLM")).tied
    assert len(Anatomy.of(tiny_model("t5", "AutoModelForSeq2SeqLM")).tied[0]) == 4


def test_a_config_is_read_without_weights() -> None:
    config = tiny_config("bert")
    assert {p.device.type for p in Anatomy.of(config).model.parameters()} == {"meta"}
    config.architectures = ["BertForTokenClassification"]
    assert type(Anatomy.of(config).model) is transformers.BertForTokenClassification
    assert type(Anatomy.of(config, auto_class="AutoModelForMaskedLM").model) is transformers.BertForMaskedLM


@pytest.mark.parametrize("architecture,kind,pooling", [("bert", "encoder", "first"), ("llama", "decoder", "last"), ("t5", "encoder-decoder", "last"), ("dinov2", "vision", "first")])
def test_architecture_and_pooling(architecture: str, kind: str, pooling: str) -> None:
    anatomy = Anatomy.of(tiny_config(architecture))
    assert (anatomy.architecture, anatomy.pooling) == (kind, pooling)


def test_a_role_that_a_block_lacks_is_named() -> None:
    block = Anatomy.of(tiny_config("bert")).blocks[0]
    assert isinstance(block.attention.query, Site)
    with pytest.raises(AttributeError, match=r"Did you mean 'query'\? It has: query, key"):
        block.attention.qery  # noqa: B018
    with pytest.raises(AttributeError, match="It has: attention, mlp"):
        block.cross_attention  # noqa: B018
