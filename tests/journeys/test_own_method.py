"""Journey 10, docs/journeys/10-own-method.md: a method of one's own, in a package of one's own. The package of examples/ is installed by pip and used without a change to luthier."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import Said, environment, fresh, luthier

from luthier.contract import Case
from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl
from luthier.methods import Card, WeightChange, method, registry

pytestmark = pytest.mark.skipif("krona" in registry.methods(), reason="luthier-krona is installed here already: pip uninstall luthier-krona")
EXAMPLE = Path(__file__).parents[2] / "examples" / "luthier-krona"
STACK = "krona(scale=2, sites=mlp.up)|lora(r=4)"
COMMANDS = [
    "methods",
    "methods krona",
    f"adapt --model model --data rows.jsonl --method '{STACK}' --max-steps 20 --no-baselines --out run",
    f"adapt --model model --data rows.jsonl --method '{STACK}' --max-steps 20 --no-baselines --save adapter --out apart",
    "predict apart --data rows.jsonl --out apart.csv",
    "predict run --data rows.jsonl --out merged.csv",
    "adapt --model model --data rows.jsonl --method 'krona(rows=5)' --out never",
    "adapt --model model --data rows.jsonl --method 'krona|lora' --out never",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip puts the package; luthier itself is left as it is."""
    pytest.importorskip("setuptools", reason="pip builds the package with it")
    folder = tmp_path_factory.mktemp("author")
    shutil.copytree(EXAMPLE, folder / "package", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".pytest_cache"))
    flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, str(folder / "package")], env=environment({}), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    tiny_folder(folder / "model")
    write_jsonl(folder / "rows.jsonl", tiny_rows("text-classification", 80))
    return folder


@pytest.fixture(scope="module")
def said(site: Path, place: Path) -> dict[str, Said]:
    return dict(zip(COMMANDS, fresh(COMMANDS, place, {"PYTHONPATH": str(site)}), strict=True))


def test_it_appears_among_the_methods_with_a_card(said: dict[str, Said], place: Path) -> None:
    assert "krona" not in luthier("methods", place).out  # without the package
    assert any(line.split()[:2] == ["WeightChange", "krona"] for line in said["methods"].out.splitlines())
    card = said["methods krona"].out
    assert "arXiv 2212.10650" in card and "scale = 4" in card and "merges_exactly" in card


def test_its_own_tests_and_the_contract_hold(site: Path, place: Path) -> None:
    """The package's test file: one stack alone, one with lora. `luthier contract krona` is all of them on every architecture, killed and resumed."""
    shutil.copy(EXAMPLE / "test_krona.py", place)
    chosen = "not resumes and (krona-bert- or (lora and -gpt2-) or product or factors)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_krona.py", "-k", chosen]
    done = subprocess.run(command, cwd=place, env=environment({"PYTHONPATH": str(site)}), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout[-2000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 25


def test_it_trains_in_a_stack_with_lora_and_merges_into_a_stock_folder(said: dict[str, Said], place: Path) -> None:
    done = said[COMMANDS[2]]
    assert done.status == 0, done.err
    assert "krona(scale=2, sites=mlp.up): " in done.err and "lora(r=4): " in done.err and "at mlp.up: 3 of 3 blocks" in done.err
    assert not (place / "run" / "luthier.json").exists() and (place / "run" / "model.safetensors").exists()
    assert json.loads((place / "run" / "run.json").read_text())["method"] == STACK


def test_saved_as_what_it_learnt_it_loads_again_and_answers_alike(said: dict[str, Said], place: Path) -> None:
    assert said[COMMANDS[3]].status == said[COMMANDS[4]].status == said[COMMANDS[5]].status == 0
    assert json.loads((place / "apart" / "luthier.json").read_text())["stack"] == STACK
    apart, merged = ((place / name).read_text().splitlines() for name in ("apart.csv", "merged.csv"))
    assert [line.rsplit(",", 1)[0] for line in apart] == [line.rsplit(",", 1)[0] for line in merged]


def test_its_errors_are_like_those_of_luthier(said: dict[str, Said], place: Path) -> None:
    shape, overlap = said[COMMANDS[6]], said[COMMANDS[7]]
    assert shape.status == 2 and "krona: a factor of 5 x 4 does not divide blocks[0].attention.query, a weight of 32 x 32" in shape.err
    assert overlap.status == 2 and "krona and lora both change blocks[0].attention.query" in overlap.err


def test_without_the_package_a_run_that_needs_it_says_so(said: dict[str, Said], place: Path) -> None:
    gone = luthier("predict apart --data rows.jsonl --out never.csv", place)
    assert gone.status == 2 and "There is no method 'krona'" in gone.err and not (place / "never.csv").exists()


def test_without_the_package_a_merged_run_still_answers(said: dict[str, Said], place: Path) -> None:
    assert luthier("predict run --data rows.jsonl --out again.csv", place).status == 0


def test_a_slip_in_the_methods_code_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @method
    class Slip(WeightChange):
        """Confuses rows and columns."""

        sites: str = "mlp.up"
        card = Card(name="slip", use="", source="", lr=1e-3, examples=("slip",))

        def create(self, weight, rng):
            return {"a": torch.zeros(weight.shape[1], weight.shape[0])}

        def effective(self, weight, params):
            return weight + params["a"]

    known = {**registry.methods(), "slip": Slip}
    monkeypatch.setattr(registry, "methods", lambda: known)
    found = Case("slip", "slip", "bert", "acts").outcome()
    assert found.result == "fails" and found.reason.startswith("RuntimeError: ") and "(test_own_method.py, line " in found.reason
