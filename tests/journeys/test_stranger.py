"""Journey 14, docs/journeys/14-stranger.md: a model folder from a stranger, with everything in it that could run, fetch or write.

tests/machine/test_trust.py watches a run from inside the interpreter; here the whole sandbox is compared before and after, connections
are cut off by the interpreter's own start-up file, and the folder brings more: links, an adapter's base on the network, kernels by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from commandline import Said, fresh, luthier

from luthier import machine
from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl
from luthier.machine.answer import cache_folder

NO_NETWORK = """
import socket
def refuse(*given, **named):
    with open({mark!r}, "a") as file:
        file.write(repr(given) + "\\n")
    raise OSError("the network is cut off")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = socket.socket.sendto = refuse
"""
LABELS = {"color": "../../escaped", "plain": "/etc/plain"}
ADAPT = "adapt --model model --data rows.jsonl --method 'lora(r=2)' --max-steps 2 --no-baselines --out out/run"
COMMANDS = [
    ADAPT,
    "predict out/run --data rows.jsonl --out out/answers.csv",
    "doctor",
    *(ADAPT.replace("model --", f"{name} --").replace("out/run", "out/never") for name in ("named", "adapted")),
]
ALLOWED = ("out/", "home/.cache/", "home/.config/", "tmp/")


def _code(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\n"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model: a real BERT with traps. named: the same under a type that only its own code knows. adapted: with an adapter on top, as a pickle. outside: what the links point at."""
    sandbox = tmp_path_factory.mktemp("sandbox")
    for name in ("outside", "out", "home", "tmp", "site"):
        (sandbox / name).mkdir()
    mark = sandbox / "ran"
    (sandbox / "outside" / "secret.json").write_text("{}")
    (sandbox / "site" / "sitecustomize.py").write_text(NO_NETWORK.format(mark=str(sandbox / "connected")))
    model = tiny_folder(sandbox / "model")
    (model / "modeling_stranger.py").write_text(_code(mark) + "class StrangerModel: pass\nclass StrangerConfig: pass\nclass StrangerTokenizer: pass\n")
    (model / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(V" + _code(mark).strip().encode() + b"\ntR.")
    (model / "training_args.bin").write_bytes(b"cbuiltins\nexec\n(V" + _code(mark).strip().encode() + b"\ntR.")
    (model / "README.md").symlink_to(sandbox / "outside" / "secret.json")
    (model / "special_tokens_map.json").symlink_to(sandbox / "outside" / "secret.json")
    (model / "run.json").symlink_to(sandbox / "outside" / "secret.json")
    _edit(
        model / "config.json",
        auto_map={
            name: f"modeling_stranger.Stranger{kind}"
            for name, kind in (("AutoConfig", "Config"), ("AutoModel", "Model"), ("AutoModelForSequenceClassification", "Model"))
        },
        architectures=["../../StrangerModel"],
        _name_or_path="../../outside",
        custom_pipelines={"text-classification": {"impl": "modeling_stranger.StrangerModel"}},
        id2label={"0": "../../escaped", "1": "/etc/plain"},
        label2id={"../../escaped": 0, "/etc/plain": 1},
    )
    _edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["modeling_stranger.StrangerTokenizer", None]},
        name_or_path="../../outside",
        chat_template="{{ ''.__class__.__mro__ }}",
    )
    write_jsonl(sandbox / "rows.jsonl", [{"text": row["text"], "label": LABELS[row["label"]]} for row in tiny_rows("text-classification", 60)])
    named = tiny_folder(sandbox / "named")
    (named / "modeling_stranger.py").write_text((model / "modeling_stranger.py").read_text())
    _edit(
        named / "config.json",
        model_type="stranger",
        auto_map={"AutoConfig": "modeling_stranger.StrangerConfig", "AutoModel": "stranger/code--modeling_stranger.StrangerModel"},
    )
    adapted = tiny_folder(sandbox / "adapted")
    (adapted / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "stranger/base", "task_type": "SEQ_CLS"}))
    (adapted / "adapter_model.bin").write_bytes((model / "pytorch_model.bin").read_bytes())
    return sandbox


def _edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def listing(sandbox: Path) -> dict[str, str]:
    """Every file and link below the sandbox with what is in it."""
    found = {}
    for path in sorted(sandbox.rglob("*")):
        name = str(path.relative_to(sandbox))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def seen(sandbox: Path) -> tuple[dict[str, Said], dict[str, str], dict[str, str]]:
    """What was said, and the sandbox before and after."""
    machine.ensure()  # what this machine can do is measured once, and not here
    before = listing(sandbox)
    home = {"HOME": str(sandbox / "home"), "TMPDIR": str(sandbox / "tmp"), "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "LUTHIER_CACHE": cache_folder() or ""}
    said = fresh(COMMANDS, sandbox, {**home, "PYTHONPATH": str(sandbox / "site"), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "0"})
    return dict(zip(COMMANDS, said, strict=True)), before, listing(sandbox)


def test_the_model_trains_and_answers_all_the_same(seen: tuple, sandbox: Path) -> None:
    said = seen[0]
    assert said[ADAPT].status == 0, said[ADAPT].err
    assert said[COMMANDS[1]].status == 0, said[COMMANDS[1]].err
    assert any(name in (sandbox / "out" / "answers.csv").read_text() for name in LABELS.values())


def test_no_code_of_theirs_ran_and_no_pickle_was_opened(seen: tuple, sandbox: Path) -> None:
    assert not (sandbox / "ran").exists()


def test_no_connection_was_tried(seen: tuple, sandbox: Path) -> None:
    tried = (sandbox / "connected").read_text() if (sandbox / "connected").exists() else ""
    assert not tried, tried


def test_no_file_was_written_outside_out(seen: tuple, sandbox: Path) -> None:
    _, before, after = seen
    assert {name: after.get(name) for name in before} == before
    new = sorted(set(after) - set(before))
    assert [name for name in new if name.startswith("out/")] and not [name for name in new if not name.startswith(ALLOWED)], new


def test_the_run_folder_holds_data_only(seen: tuple, sandbox: Path) -> None:
    assert not [path for path in (sandbox / "out" / "run").rglob("*") if path.is_symlink() or path.suffix in (".py", ".bin", ".pkl")]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_word_in_the_run_folder_asks_for_code_of_theirs(seen: tuple, sandbox: Path, file: str) -> None:
    content = json.loads((sandbox / "out" / "run" / file).read_text())
    assert not {"auto_map", "custom_pipelines"} & set(content)


def test_a_model_that_is_nothing_without_its_code_is_refused(seen: tuple, sandbox: Path) -> None:
    refused = seen[0][COMMANDS[3]]
    assert refused.status == 2 and "asks to run code of its own" in refused.err and "which luthier never does" in refused.err
    assert not (sandbox / "out" / "never").exists() and "adapter" in seen[0][COMMANDS[4]].err and seen[0][COMMANDS[4]].status == 2


def test_attention_code_that_is_named_in_the_config_is_not_fetched(sandbox: Path) -> None:
    kernels = tiny_folder(sandbox / "kernels")
    _edit(kernels / "config.json", _attn_implementation="stranger/kernels", attn_implementation="stranger/kernels")
    assert luthier("adapt --model kernels --data rows.jsonl --dry-run", sandbox).status in (0, 2)


def test_doctor_says_so(seen: tuple) -> None:
    never = [line.removeprefix("never").strip() for line in seen[0]["doctor"].out.splitlines() if line.startswith("never")]
    for words in ("code that comes with a model", "pickles", "no connection is made", "nothing is written outside --out"):
        assert any(words in line for line in never), words
