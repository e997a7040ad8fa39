from __future__ import annotations

import pytest

from backends.fleet import fleet


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted servers are ready in a moment, where SGLang takes a quarter of a minute."""
    monkeypatch.setattr(fleet, "POLL_S", 0.02)


@pytest.fixture
def _restarts_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "RESTART_DELAY_S", 0.05)
