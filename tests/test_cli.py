"""The flags are the recipe's fields, help is cheap, and the exit status says what happened."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

import luthier
from luthier import Recipe, UserError, cli
from luthier.verbs.adapt import adapt

SHORT = {"text": "columns", "text_pair": "columns", "label": "columns", "option": "options"}  # flags that fill a part of a field
CALL = set(inspect.signature(adapt).parameters) - {"model", "data", "settings", "console"}


def commands() -> dict[str, Any]:
    return typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def test_flags_of_adapt_are_the_fields_of_the_recipe_and_those_of_the_call() -> None:
    flags = {p.name for p in commands()["adapt"].params}
    assert {SHORT.get(name, name) for name in flags} == set(Recipe.model_fields) | CALL


@pytest.mark.parametrize("verb", ["evaluate", "predict", "search", "export"])
def test_flags_of_the_other_verbs_are_keywords_in_python(verb: str) -> None:
    flags = {p.name for p in commands()[verb].params} - {"as_json"}
    assert flags == set(inspect.signature(getattr(luthier, verb)).parameters) - {"console"}


def test_every_flag_says_what_it_is() -> None:
    for name, command in commands().items():
        for verb in getattr(command, "commands", {name: command}).values():
            assert verb.help and all(p.help for p in verb.params if p.name != "help"), name


HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "sklearn", "matplotlib", "pandas", "pyarrow")


@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["runs", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys\nfrom luthier import cli\nsys.argv = {['luthier', *arguments]}\ntry:\n    cli.main()\nexcept SystemExit as end:\n    print(end.code or 0, sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n" and done.stdout.startswith("Usage: ")


def raising(error: BaseException) -> Callable[..., Any]:
    def verb(*args: object, **kwargs: object) -> None:
        raise error

    return verb


@pytest.mark.parametrize(
    "error,status,said",
    [
        (UserError("Mend it so."), 2, "luthier: Mend it so."),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left on device"), 2, "disk is full"),
        (PermissionError(13, "Permission denied", "x.csv"), 2, "x.csv cannot be opened"),
    ],
)
def test_what_a_user_can_mend_ends_with_2(error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("luthier.verbs.catalogue.task_table", raising(error))
    monkeypatch.setattr(sys, "argv", ["luthier", "tasks"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    streams = capsys.readouterr()
    assert end.value.code == status and said in streams.err and "Traceback" not in streams.err and not streams.out


@pytest.mark.parametrize("arguments,status", [([], 2), (["nope"], 2), (["adapt", "--lr", "fast"], 2), (["tasks", "--help"], 0), (["tasks"], 0), (["predict"], 2), (["methods", "lroa"], 2)])
def test_exit_status(arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0) == status


@pytest.mark.parametrize("failed", [0, 1])
def test_a_check_that_fails_ends_with_1(failed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.contract.run", lambda method: failed)
    monkeypatch.setattr(sys, "argv", ["luthier", "contract", "lora"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0) == failed


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.verbs.catalogue.task_table", raising(ZeroDivisionError()))
    monkeypatch.setattr(sys, "argv", ["luthier", "tasks"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_debug_shows_where_a_mistake_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["luthier", "--debug", "methods", "lroa"])
    with pytest.raises(UserError):
        cli.main()


def test_doctor_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["luthier", "doctor", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    assert not end.value.code and facts["versions"]["luthier"] == luthier.__version__ and facts["never"]
