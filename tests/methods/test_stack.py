"""One stack, three spellings; unknown names and fields are errors with the nearest right one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from luthier import UserError
from luthier.methods import registry
from luthier.methods.adapt.lora import LoRA
from luthier.methods.settings import read, spell
from luthier.methods.stack import parse


def test_three_spellings_are_one_stack() -> None:
    text = parse("reinit(top=2)|lora(r=4, sites=attention.query+mlp.*)")
    assert text == parse([{"reinit": {"top": 2}}, {"lora": {"r": 4, "sites": ["attention.query", "mlp.*"]}}])
    assert text == parse(["reinit(top=2)", LoRA(r=4, sites="attention.query+mlp.*")])
    assert str(text) == "reinit(top=2)|lora(r=4, sites=attention.query+mlp.*)"


def test_defaults_are_left_out_and_aliases_become_our_names() -> None:
    assert str(parse("lora(r=8, lora_alpha=32, lora_dropout=0)")) == "lora(alpha=32)"
    assert parse("lora(target_modules=[q_proj, v_proj])").methods[0].sites == "q_proj+v_proj"  # type: ignore[attr-defined]


@example("INF")
@example({"A[": 0})
@example({"nan": "true", "a:b": "c: d"})
@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=8)), max_size=3)))
def test_a_spelled_value_reads_back(value: object) -> None:
    assert read(spell(value)) == value


@pytest.mark.parametrize(
    "text,expected",
    [
        ("lroa", "Did you mean 'lora'"),
        ("lora(rank_=8)", "Did you mean 'rank'"),
        ("lora(r=eight)", "is not a whole number"),
        ("lora(r=8, r=4)", "given twice"),
        ("lora(r=8, rank=4)", "set twice"),
        ("lora(r=8", "do not match"),
        ("lora(8)", "name=value"),
        ("lora||full", "empty step"),
        ("freeze", "bottom must be given, for example freeze(bottom=1)"),
        ("adapter(mode=sideways)", "none of sequential, parallel"),
        ("peft(type=veera)", "Did you mean 'vera'"),
        ("peft(type=vera, rank=3)", "has no setting 'rank'"),
        ("peft", "type must be given"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_thing(text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    assert expected in str(error.value)


@pytest.mark.parametrize("text", [example for method in registry.methods().values() for example in method.card.examples])
def test_every_example_is_canonical(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)
