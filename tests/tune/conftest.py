"""The demo model is meant in these tests; who does not say so is told of real ones on stderr."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def the_demo_model_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLAMA_MODEL", "demo")
