"""What the tests of kernels share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["kernel", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel that the test module says by ROUTED, (the module that asks for it, its name), and as on a machine without any."""
    module, name = request.module.ROUTED
    if request.param == "torch":
        monkeypatch.setattr(module, "kernel", lambda *_: None)
    elif module.kernel(name, torch.float32) is None:
        pytest.skip("no kernels on this machine")
