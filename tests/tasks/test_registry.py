"""The catalogue of tasks, and the rule by which columns and model name one."""

from __future__ import annotations

from types import ModuleType

import pytest

from luthier import UserError, offers
from luthier.contract.texts import tiny_rows
from luthier.contract.tiny import tiny_config
from luthier.data.columns import assign
from luthier.data.sources import read
from luthier.tasks import ALIASES, find, infer, tasks


def config_of(architecture: str):
    config = tiny_config(architecture)
    config.architectures = {"gpt2": ["GPT2LMHeadModel"], "bert": ["BertModel"]}[architecture]
    return config


def test_every_task_says_what_a_user_must_know():
    assert set(tasks()) == {"text-classification", "regression", "token-classification", "text-generation", "sentence-similarity"}
    for tag, task in tasks().items():
        assert task.tag == tag and task.use and task.metric in task.measures
        assert any(column.required for column in task.columns) and all(column.use for column in task.columns)


class Offer:
    """An entry point of some package."""

    name, value, dist = "mine", "mine.task", None

    def __init__(self, found):
        self.found = found

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def offering(monkeypatch):
    def offer(found):
        monkeypatch.setattr(offers, "entry_points", lambda group: [Offer(found)])
        tasks.cache_clear()

    yield offer
    tasks.cache_clear()


def test_tasks_of_other_packages_are_found_by_module_or_class(offering):
    mine = type("Mine", (find("regression"),), {"tag": "my-task", "__module__": "mine"})
    module = ModuleType("mine")
    module.Mine = mine
    for found in (mine, module):
        offering(found)
        assert find("my-task") is mine


@pytest.mark.parametrize("found,expected", [(ImportError("no torch"), "offers the task 'mine'.*no torch"), (type("Twin", (find("regression"),), {"__module__": "mine"}), "Two tasks are called 'regression'")])
def test_a_broken_package_is_named(found, expected, offering):
    offering(found)
    with pytest.raises(UserError, match=expected):
        find("regression")


def test_names_and_aliases_are_found_and_typos_are_answered():
    assert find("text_classification") is find("text-classification")
    for alias, tag in ALIASES.items():
        assert find(alias) is find(tag)
    with pytest.raises(UserError, match="Did you mean 'token-classification'"):
        find("token-clasification")


@pytest.mark.parametrize("tag", sorted(["text-classification", "regression", "token-classification", "text-generation", "sentence-similarity"]))
def test_each_tasks_own_rows_name_it(tag, rows):
    task, reason = infer(rows(tiny_rows(tag)), {}, config_of("gpt2"))
    assert task.tag == tag and reason


@pytest.mark.parametrize(
    ("row", "architecture", "tag"),
    [
        ({"docstring": "Add two.", "code": "return a + b"}, "bert", "sentence-similarity"),
        ({"anchor": "a b", "positive": "b c", "negative": "d e"}, "bert", "sentence-similarity"),
        ({"prompt": "a b", "completion": "c d"}, "gpt2", "text-generation"),
        ({"text": "a b", "text_pair": "b c", "score": 0.5}, "bert", "regression"),
    ],
)
def test_telling_columns(row, architecture, tag, rows):
    many = [{k: (f"{v} {i}" if isinstance(v, str) else v + i) for k, v in row.items()} for i in range(120)]
    assert infer(rows(many), {}, config_of(architecture))[0].tag == tag


def test_texts_alone_are_no_task_of_an_encoder(rows):
    with pytest.raises(UserError, match="--task"):
        infer(rows(tiny_rows("text-generation")), {}, config_of("bert"))


def test_columns_that_fit_two_tasks_are_not_guessed(rows):
    with pytest.raises(UserError, match="Choose with --task"):
        infer(rows({"query": f"a {i}", "document": f"b {i}", "score": i + 0.5} for i in range(120)), {}, config_of("bert"))


@pytest.mark.parametrize(
    ("data", "tag", "roles"),
    [
        ("glue_sst2", "text-classification", {"text": "text", "label": "label"}),
        ("glue_stsb", "regression", {"text": "text", "text_pair": "text_pair", "label": "score"}),
        ("glue_mrpc", "text-classification", {"text": "text", "text_pair": "text_pair", "label": "label"}),
        ("masakhaner2", "token-classification", {"words": "tokens", "tags": "tags"}),
        ("german_arguments", "text-classification", {"text": "text", "label": "label"}),
    ],
)
def test_real_rows_need_no_flags(data, tag, roles, shared, rows):
    found = next(iter(read(shared / "data" / data).values()))
    task, _ = infer(found, {}, config_of("bert"))
    assert (task.tag, assign(found, task.columns, {})[0]) == (tag, roles)
