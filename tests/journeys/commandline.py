"""The command line as a person has it: `luthier ...` in a process and a folder of its own, with its real exit status, output and signals.

Importing torch and transformers takes longer than most commands, so commands are forked off one interpreter that has imported them
and computed nothing. Where the interpreter itself is the point (another PYTHONPATH), `fresh` starts a new one.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "NO_COLOR": "1"}
FORKS = """
import json, os, sys, traceback
import luthier.verbs.adapt, luthier.verbs.evaluate, luthier.verbs.predict, transformers.models.bert.modeling_bert, matplotlib.pyplot, sklearn.linear_model, peft
from luthier import cli

for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(asked["folder"])
        for number, name in enumerate((os.devnull, asked["out"], asked["err"])):
            os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.stdin, sys.stdout, sys.stderr = (open(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww"))
        sys.argv, status = ["luthier", *asked["words"]], 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Said:
    """status of the command, negative for a signal; out is standard output (results), err is standard error (what it says while it works)."""

    status: int
    out: str
    err: str


def luthier(command: str, folder: Path) -> Said:
    """Types `luthier COMMAND` in `folder`."""
    return start(command, folder).end()


def start(command: str, folder: Path) -> Running:
    """A command that goes on beside the test; one at a time."""
    return Running(command, folder)


class Running:
    def __init__(self, command: str, folder: Path):
        self.files = {name: Path(f"{folder}.{name}") for name in ("out", "err")}  # beside the folder, whose content is compared
        asked = {"words": shlex.split(command), "folder": str(folder), **{name: str(file) for name, file in self.files.items()}}
        self.server = _server()
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())

    def over(self) -> bool:
        """Whether it has ended, though nobody has waited for it yet."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def end(self) -> Said:
        """Waits. A traceback is never an answer."""
        assert self.server.stdout
        said = Said(int(self.server.stdout.readline()), *(file.read_text(encoding="utf-8") for file in self.files.values()))
        assert "Traceback" not in said.err, said.err
        return said


def fresh(commands: list[str], folder: Path, extra: Mapping[str, str]) -> list[Said]:
    """Types the commands one after the other, in a new interpreter with this environment."""
    files = [(Path(f"{folder}.{i}.out"), Path(f"{folder}.{i}.err")) for i in range(len(commands))]
    asked = [
        json.dumps({"words": shlex.split(command), "folder": str(folder), "out": str(out), "err": str(err)})
        for command, (out, err) in zip(commands, files, strict=True)
    ]
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment(extra), input="\n".join(asked) + "\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [Said(int(status), out.read_text(), err.read_text()) for status, (out, err) in zip(done.stdout.split()[1::2], files, strict=True)]
    assert not any("Traceback" in one.err for one in said), said
    return said


@functools.cache
def _server() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", FORKS], env=environment({}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **extra}
