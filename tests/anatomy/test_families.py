"""Where role maps come from: shipped files, packages, the process, the model's own structure, an override."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import luthier
from luthier import Anatomy, UserError, Workload
from luthier.anatomy import Family, Stack, families, family
from luthier.anatomy.families.bert import FAMILY as BERT
from luthier.anatomy.families.llama import FAMILY as LLAMA
from luthier.contract.tiny import tiny_config, tiny_model

KEYWORDS = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PICTURES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
QWEN3 = transformers.Qwen3Config(**KEYWORDS, num_key_value_heads=2, head_dim=8)
GEMMA = transformers.GemmaConfig(**KEYWORDS, num_key_value_heads=2, head_dim=8)
OPT = transformers.OPTConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
FUSED = transformers.Phi3Config(**KEYWORDS)


@pytest.fixture(autouse=True)
def forget():
    """Every test starts and ends with the shipped families alone."""
    family._shipped.cache_clear()
    yield
    family._registered.clear()
    family._shipped.cache_clear()


def test_a_family_is_one_file() -> None:
    """Qwen3 came as `families/qwen3.py`, a role map, and no other change; every method of the library then runs on it."""
    model = transformers.AutoModelForCausalLM.from_config(QWEN3).eval()
    anatomy = Anatomy.of(model)
    assert anatomy.family == "qwen3" and anatomy.blocks[0].attention.key.outputs == 16 and anatomy.blocks[0].attention.query_norm.outputs == 8
    assert not [t.name for t in anatomy.tensors() if t.role == "other"]
    luthier.apply(model, "lora(r=2)|adapter(reduction=8)")
    assert len(model.luthier.trainable) == 2 * 2 * 2 + 2 * 4  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("whole", [True, False], ids=["module", "family"])
def test_a_package_announces_its_family_by_entry_point(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Family(("gemma",), "decoder", LLAMA.stacks, ("embed_tokens",), name="mine")
    entry = types.SimpleNamespace(name="mine", value="mine", load=lambda: types.SimpleNamespace(FAMILY=mine) if whole else mine)
    monkeypatch.setattr(family, "entry_points", lambda group: [entry] if group == "luthier.families" else [])
    assert Anatomy.of(GEMMA).family == "mine" and "gemma" in family.known()


def test_a_family_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.SimpleNamespace(name="odd", value="odd.module", load=lambda: 1 / 0)
    monkeypatch.setattr(family, "entry_points", lambda group: [broken])
    with pytest.raises(UserError, match=r"odd\.module"):
        family.find("bert")


def test_a_registered_family_wins() -> None:
    families.register(Family(("bert",), "encoder", BERT.stacks, name="mine"))
    assert Anatomy.of(tiny_model("bert")).family == "mine"


def test_a_map_that_does_not_fit_its_model_is_refused() -> None:
    """Not silently thinner: a role that a point leans on has to be there."""
    roles = BERT.stacks[0].roles | {"mlp.up": "intermediat.dense"}
    families.register(Family(("bert",), "encoder", (Stack("encoder.layer", roles),)))
    with pytest.raises(UserError, match=r"no module for mlp\.up \(intermediat\.dense\)\. Did you mean 'intermediate\.dense'\?"):
        Anatomy.of(tiny_config("bert"))


@pytest.mark.parametrize(
    "config,architecture,embeddings",
    [
        (GEMMA, "decoder", {"embed_tokens"}),
        (OPT, "decoder", {"decoder.embed_tokens", "decoder.embed_positions"}),
        (transformers.GPTNeoConfig(vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, attention_types=[[["global"], 2]]), "decoder", {"wte", "wpe"}),
        (transformers.MPNetConfig(**KEYWORDS), "encoder", {"embeddings", "encoder.relative_attention_bias"}),
        (transformers.RemBertConfig(**KEYWORDS, input_embedding_size=16), "encoder", {"embeddings", "encoder.embedding_hidden_mapping_in"}),
        (transformers.CLIPVisionConfig(**PICTURES), "vision", {"embeddings"}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_an_unknown_architecture_is_resolved_by_structure(config: Any, architecture: str, embeddings: set[str]) -> None:
    config._attn_implementation = "eager"
    model = transformers.AutoModel.from_config(config).eval()
    anatomy = Anatomy.of(model)
    assert (anatomy.family, anatomy.architecture, len(anatomy.blocks)) == ("structure", architecture, 2)
    assert anatomy.pooling == ("last" if architecture == "decoder" else "first")
    assert len(anatomy.sites("attention.query+attention.value")) == 4 and anatomy.blocks[0].mlp.down.inputs == 48
    assert {site.name for site in anatomy.embeddings} == embeddings
    assert not [t.name for t in anatomy.tensors() if t.role in ("other", "head")]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**{"pixel_values": torch.randn(1, 3, 16, 16)} if architecture == "vision" else {"input_ids": torch.randint(5, 90, (1, 8))})
    assert anatomy.macs(Workload(1, 8)) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("config", [transformers.Qwen2Config(**KEYWORDS, num_key_value_heads=2), transformers.ElectraConfig(**KEYWORDS, embedding_size=16)], ids=["qwen2", "electra"])
def test_relatives_that_keep_the_modules_share_a_map(config: Any) -> None:
    anatomy = Anatomy.of(config)
    assert anatomy.family in ("llama", "bert") and not [t.name for t in anatomy.tensors() if t.role in ("other", "head")]


@pytest.mark.parametrize(
    "config,found",
    [
        (transformers.GPTNeoXConfig(**KEYWORDS), "attention.query_key_value"),
        (transformers.BartConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48), "encoder_attn.q_proj"),
        (transformers.MixtralConfig(**KEYWORDS, num_key_value_heads=2, num_local_experts=2), "self_attn.q_proj"),
    ],
    ids=["fused", "two stacks", "experts"],
)
def test_an_uncertain_one_is_refused_with_what_was_found(config: Any, found: str) -> None:
    with pytest.raises(UserError) as error:
        Anatomy.of(config)
    assert found in str(error.value) and "roles=" in str(error.value) and "'blocks'" in str(error.value)


FUSED_ROLES = {
    "blocks": "layers",
    **{f"attention.{part}": f"self_attn.qkv_proj[{i}/3]" for i, part in enumerate(("query", "key", "value"))},
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_up_proj[0/2]",
    "mlp.up": "mlp.gate_up_proj[1/2]",
    "mlp.down": "mlp.down_proj",
}


def test_an_override_names_its_roles() -> None:
    config = transformers.Phi3Config(**KEYWORDS)
    config._attn_implementation = "eager"
    model = transformers.AutoModel.from_config(config).eval()
    anatomy = Anatomy.of(model, roles=FUSED_ROLES)
    assert (anatomy.family, anatomy.architecture, anatomy.pooling) == ("given", "decoder", "last")
    assert anatomy.blocks[1].attention.value.rows == slice(64, 96) and anatomy.blocks[1].mlp.up.rows == slice(48, 96)
    assert not [t.name for t in anatomy.tensors() if t.role in ("other", "head")]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(5, 90, (1, 8)))
    assert anatomy.macs(Workload(1, 8)) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize(
    "change,expected",
    [
        ({"mlp.down": None}, "roles= lacks mlp.down"),
        ({"blocks": "layer"}, "finds no blocks at layer in this Phi3Model. Found layers (Phi3DecoderLayer)"),
        ({"attention.output": "self_attn.out_proj"}, "Did you mean 'self_attn.o_proj'?"),
        ({"attention.bias": "self_attn.bias"}, "no module for attention.bias (self_attn.bias)"),
        ({"embeddings": "wte"}, "Phi3Model has embed_tokens, layers, norm"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(change: dict[str, str | None], expected: str) -> None:
    roles = {role: path for role, path in (FUSED_ROLES | change).items() if path is not None}
    with pytest.raises(UserError) as error:
        Anatomy.of(FUSED, roles=roles)
    assert expected in str(error.value)
