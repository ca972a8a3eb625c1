"""A model folder from a stranger: every file, connection and unpickling of a whole run is watched from inside the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from machines import NO_BF16, SOURCE

from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl
from luthier.machine.answer import remember

WATCHED = """
import json, os, sys
seen = {"written": set(), "network": set(), "unpickled": set()}
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen["written"].add(os.path.realpath(os.fsdecode(arguments[0])))
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink") and isinstance(arguments[0], (str, bytes)):
        seen["written"].update(os.path.realpath(os.fsdecode(a)) for a in arguments[:2] if isinstance(a, (str, bytes)))
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        seen["network"].add(repr(arguments[1:] if event == "socket.connect" else arguments))
    elif event == "pickle.find_class":
        seen["unpickled"].add(repr(arguments))
sys.addaudithook(watch)
from luthier import cli
status = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["luthier", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        status.append(end.code or 0)
    else:
        status.append(0)
print(json.dumps({"status": status, **{name: sorted(found) for name, found in seen.items()}}))
"""


def watched(folder: Path, *calls: list[object]) -> dict:
    (folder / "elsewhere").mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "LUTHIER_CACHE": str(folder / "cache"), "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    for name in ("HF_HUB_OFFLINE", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    (folder / "tmp").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", WATCHED, json.dumps([[str(a) for a in call] for call in calls])], env=environment, cwd=folder / "elsewhere", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"said": done.stderr}


@pytest.fixture
def stranger(cache: Path, tmp_path: Path) -> Path:
    """A model that brings code and a pickle along, each of which leaves a mark if it is ever run; on a machine that was measured before."""
    remember(NO_BF16)
    folder = tiny_folder(tmp_path / "model")
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    (folder / "modeling_stranger.py").write_text(code + "class StrangerModel: pass\nclass StrangerConfig: pass\n")
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(V" + code.strip().encode() + b"\ntR.")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_stranger.StrangerConfig", "AutoModel": "modeling_stranger.StrangerModel", "AutoModelForSequenceClassification": "modeling_stranger.StrangerModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_training_and_predicting_touch_nothing_else(stranger: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows("text-classification", 40))
    out, answers = tmp_path / "out" / "run", tmp_path / "out" / "answers.jsonl"
    (tmp_path / "out").mkdir()
    found = watched(
        tmp_path,
        ["adapt", "--model", stranger, "--data", rows, "--method", "lora(r=2)", "--max-steps", 2, "--out", out, "--no-baselines"],
        ["predict", out, "--data", rows, "--out", answers, "--device", "cpu"],
    )
    assert found["status"] == [0, 0], found["said"]
    assert not (tmp_path / "ran").exists() and not found["unpickled"] and not found["network"]
    assert any(path.startswith(str(tmp_path / "out")) for path in found["written"])  # the watch does see
    allowed = tuple(str(tmp_path / name) for name in ("out", "cache", "tmp", "home/.cache", "home/.config"))
    assert not [path for path in found["written"] if not path.startswith((*allowed, "/dev/")) and path != str(tmp_path / "home")]
    assert (out / "model.safetensors").exists() or (out / "adapter_model.safetensors").exists()
    assert not list(out.rglob("*.py")) and not list(out.rglob("*.bin"))


def test_code_that_the_model_needs_is_refused(stranger: Path, tmp_path: Path) -> None:
    config = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps({**config, "model_type": "stranger"}))
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows("text-classification", 40))
    found = watched(tmp_path, ["adapt", "--model", stranger, "--data", rows, "--out", tmp_path / "run"])
    assert found["status"] == [2] and "which luthier never does" in found["said"]
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists() and not found["network"]
