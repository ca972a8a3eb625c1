"""Site expressions: what they name, in which order, and what is said where they name nothing."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier import Anatomy, UserError
from luthier.anatomy.anatomy import POINTS
from luthier.contract.tiny import CONFIGS, tiny_config, tiny_model


def labels(architecture: str, expression: str, auto_class: str = "AutoModel") -> list[str]:
    return [site.label for site in Anatomy.of(tiny_config(architecture), auto_class=auto_class).sites(expression)]


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "albert"])  # shared blocks have no sites of their own
def test_a_label_is_an_expression_for_its_site(architecture: str) -> None:
    anatomy = Anatomy.of(tiny_model(architecture))
    everything = [site for block in anatomy.blocks for site in block.sites.values()]
    assert len({site.label for site in everything}) == len(everything)
    for site in everything:
        assert anatomy.sites(site.label) == [site]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_wildcard_means_each_matrix_once_and_no_point(architecture: str) -> None:
    anatomy = Anatomy.of(tiny_model(architecture))
    found = anatomy.sites("attention.*+cross_attention.*+mlp.*" if architecture == "t5" else "attention.*+mlp.*")
    matrices = [m for block in anatomy.blocks for m in block.module.modules() if isinstance(m, (nn.Linear, Conv1D))]
    assert {site.module for site in found} == set(matrices) and len(found) == len(matrices)
    assert not {site.role for site in found} & set(POINTS)


@pytest.mark.parametrize(
    "expression,expected",
    [
        ("attention.query", [f"blocks[{i}].attention.query" for i in range(3)]),
        ("blocks[-1:].attention.query+blocks[0].mlp.up", ["blocks[0].mlp.up", "blocks[2].attention.query"]),
        ("blocks[-1].mlp.up + blocks[1:].mlp.up", ["blocks[1].mlp.up", "blocks[2].mlp.up"]),
        ("blocks[0].*.out", ["blocks[0].attention.out", "blocks[0].mlp.out"]),
        ("blocks[0].*.norm", ["blocks[0].attention.norm", "blocks[0].mlp.norm"]),
        ("*.query", [f"blocks[{i}].attention.query" for i in range(3)]),
        ("encoder.layer.1.output.dense", ["blocks[1].mlp.down"]),
        ("encoder.layer.[12].output.dense", ["blocks[1].mlp.down", "blocks[2].mlp.down"]),
        ("intermediate.dense", [f"blocks[{i}].mlp.up" for i in range(3)]),
        ("embeddings", ["embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"]),
        ("pooler+blocks[0].mlp.up+embeddings.word_embeddings", ["embeddings.word_embeddings", "blocks[0].mlp.up", "pooler.dense"]),
    ],
)
def test_expressions(expression: str, expected: list[str]) -> None:
    assert sorted(labels("bert", expression)) == sorted(expected)


def test_sites_come_in_the_order_of_the_forward_pass() -> None:
    assert labels("gpt2", "attention.output+mlp.up")[:3] == ["blocks[0].attention.output", "blocks[0].mlp.up", "blocks[1].attention.output"]


def test_norm_means_every_norm_of_the_trunk() -> None:
    assert labels("llama", "norm") == ["blocks[0].attention.norm", "blocks[0].mlp.norm", "blocks[1].attention.norm", "blocks[1].mlp.norm", "norm"]
    bert = Anatomy.of(tiny_model("bert", "AutoModelForMaskedLM"))
    assert {site.module for site in bert.sites("norm")} == {m for m in bert.trunk.modules() if isinstance(m, nn.LayerNorm)}


def test_the_head_is_what_lies_outside_the_trunk() -> None:
    assert labels("bert", "head", "AutoModelForSequenceClassification") == ["classifier"]
    assert labels("roberta", "head", "AutoModelForSequenceClassification") == ["classifier.dense", "classifier.out_proj"]
    assert labels("t5", "head", "AutoModelForSeq2SeqLM") == ["lm_head"]


def test_stacks_of_an_encoder_decoder() -> None:
    assert len(labels("t5", "encoder.attention.query")) == 2 and len(labels("t5", "decoder.attention.query")) == 3 and len(labels("t5", "attention.query")) == 5
    assert labels("t5", "decoder.blocks[0].cross_attention.value") == ["decoder.blocks[0].cross_attention.value"]
    assert labels("t5", "blocks[-1:].mlp.up") == ["encoder.blocks[1].mlp.up", "decoder.blocks[2].mlp.up"]
    with pytest.raises(UserError, match="2 encoder blocks"):
        labels("t5", "blocks[2].mlp.up")


def test_shared_blocks_cannot_be_taken_apart() -> None:
    assert len(labels("albert", "mlp.up")) == 3
    with pytest.raises(UserError, match="one set of weights"):
        labels("albert", "blocks[1:].mlp.up")


@pytest.mark.parametrize(
    "expression,expected",
    [
        ("q_lin", "linear modules here: dense (10), query (3), key (3), value (3)"),
        ("atention.query", "Did you mean 'attention.query'?"),
        ("attention.query+mlp.gate", "sites='mlp.gate' matches no module"),
        ("cross_attention.query", "roles here: attention.query, attention.key"),
        ("decoder.attention.query", "matches no module"),
        ("attention.query+", "sites=''"),
        ("head", "sites='head' matches no module"),
        ("blocks[7].mlp.up", "3 blocks"),
        ("blocks[3:].mlp.up", "is empty"),
        ("blocks[one].mlp.up", "blocks[-2:]"),
    ],
)
def test_what_matches_nothing_says_what_there_is(expression: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        labels("bert", expression)
    assert expected in str(error.value)


def test_cover_counts_blocks_by_role_and_stack() -> None:
    bert, t5 = Anatomy.of(tiny_config("bert")), Anatomy.of(tiny_config("t5"))
    assert bert.cover(bert.sites("blocks[1:].mlp.up+attention.query+pooler")) == ["attention.query: 3 of 3 blocks", "mlp.up: 2 of 3 blocks", "pooler.dense"]
    assert t5.cover(t5.sites("attention.query+decoder.blocks[:1].mlp.up")) == [
        "encoder.attention.query: 2 of 2 blocks",
        "decoder.attention.query: 3 of 3 blocks",
        "decoder.mlp.up: 1 of 3 blocks",
    ]
