"""A run folder is complete or absent, has one writer, and never costs a user what lies in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import Recipe, UserError
from luthier.runs import RunFolder, read_run

RECORD = {"task": {"tag": "regression", "facts": {}}, "method": "lora", "data": {}, "metrics": {}, "resources": {}}


def complete(folder: RunFolder, word: str = "new", **how: bool) -> Path:
    folder.check(**how)
    folder.start(**how)
    (folder.partial / "word").write_text(word, encoding="utf-8")
    (folder.partial / "run.json").write_text("{}", encoding="utf-8")
    return folder.finish()


def test_the_name_appears_when_all_is_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.check()
    assert not list(tmp_path.iterdir())
    folder.start()
    (folder.partial / "checkpoints").mkdir()
    assert not folder.path.exists()
    folder.finish()
    assert [p.name for p in folder.path.parent.iterdir()] == ["run"] and not list(folder.path.iterdir())


def test_a_run_that_is_stopped_while_it_is_published_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between taking away the old one's name and giving it to the new one, the checkpoints are still there."""
    complete(RunFolder(tmp_path / "run"), "old")
    folder = RunFolder(tmp_path / "run")
    folder.start(overwrite=True)
    (folder.partial / "checkpoints").mkdir()
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (_ for _ in ()).throw(OSError("killed")) if path == folder.partial else rename(path, target))
    with pytest.raises(OSError, match="killed"):
        folder.finish()
    assert (folder.partial / "checkpoints").is_dir()


def test_the_old_run_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    complete(RunFolder(tmp_path / "run"), "old")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="--overwrite"):
        folder.check()
    folder.check(overwrite=True)
    folder.start(overwrite=True)
    assert (folder.path / "word").read_text(encoding="utf-8") == "old"
    folder.release()
    (tmp_path / "run.old").mkdir()  # a folder of the user's
    complete(RunFolder(tmp_path / "run"), "new", overwrite=True)
    assert (folder.path / "word").read_text(encoding="utf-8") == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old"]


def test_an_unfinished_run_is_gone_on_with_or_begun_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="nothing to resume"):
        folder.check(resume=True)
    folder.start()
    (folder.partial / "half").touch()
    folder.release()
    with pytest.raises(UserError, match="--resume to go on with it, or --overwrite"):
        RunFolder(tmp_path / "run").check()
    again = RunFolder(tmp_path / "run")
    again.start(resume=True)
    assert (again.partial / "half").exists()
    again.release()
    again.start(overwrite=True)
    assert not (again.partial / "half").exists()
    again.finish()
    with pytest.raises(UserError, match="exists"):
        RunFolder(tmp_path / "run").check(resume=True)


HOLD = "import sys, time; from luthier.runs import RunFolder; f = RunFolder(sys.argv[1]); f.start(); print('held', flush=True); time.sleep(60)"


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    folder = RunFolder(tmp_path / "run")
    try:
        for how in ({"resume": True}, {"overwrite": True}):
            for step in (folder.check, folder.start):  # both may have looked before either began
                with pytest.raises(UserError, match=f"Process {child.pid} is working on"):
                    step(**how)
    finally:
        child.kill()
        child.wait()
    assert folder.lock.exists()
    folder.check(resume=True)
    folder.start(resume=True)
    folder.finish()


def test_a_run_that_another_process_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    late = RunFolder(tmp_path / "run")
    late.check()
    complete(RunFolder(tmp_path / "run"), "first")
    with pytest.raises(UserError, match="exists"):
        late.start()
    assert (tmp_path / "run" / "word").read_text(encoding="utf-8") == "first"


def test_places_where_no_run_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "data.csv").write_text("text,label\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", "/", tmp_path, "../here"):
        with pytest.raises(UserError, match="folder that you are in"):
            RunFolder(out).check(overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        RunFolder("data.csv").check(overwrite=True)
    assert os.listdir(".") == ["data.csv"]


def test_the_recipe_runs_again_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("run")
    folder.start()
    folder.write_recipe(Recipe.build(model="m", data="python:src", method="lora(r=4)"))
    folder.write_json("run.json", RECORD)
    folder.finish()
    monkeypatch.chdir("/")
    recipe = read_run(tmp_path / "run").recipe
    assert (recipe.model, recipe.data, recipe.method) == (str(tmp_path / "m"), f"python:{tmp_path / 'src'}", "lora(r=4)")


@pytest.mark.parametrize("content,expected", [("{", "not valid JSON"), ("[]", "no record of a run"), (json.dumps({**RECORD} | {"metrics": 1})[:-20] + "}", "not valid JSON|lacks"), ("{}", "lacks task, method")])
def test_what_is_no_run_is_refused(content: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run"):
        read_run(tmp_path / "gone")
    (tmp_path / "gone.partial").mkdir()
    with pytest.raises(UserError, match="adapt --resume"):
        read_run(tmp_path / "gone")
    with pytest.raises(UserError, match=r"run\.json and recipe\.yaml missing"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d\n", encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        read_run(tmp_path)


def test_overwrite_replaces_runs_and_models_alone(tmp_path: Path) -> None:
    """Not a folder of the user's that happens to have the name, nor the sources that the rows come from."""
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="no run or model folder"):
        RunFolder(tmp_path / "things").check(overwrite=True)
    with pytest.raises(UserError, match="from which it would be made"):
        RunFolder(tmp_path / "things").check(overwrite=True, reads=[f"python:{tmp_path / 'things'}"])
    (tmp_path / "things" / "config.json").write_text("{}", encoding="utf-8")
    RunFolder(tmp_path / "things").check(overwrite=True)
