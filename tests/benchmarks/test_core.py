from __future__ import annotations

import sys

import orjson
import pytest

from benchmarks import core
from benchmarks.core import DECISION, trial


def test_the_queue_keeps_its_depth_while_decisions_are_timed() -> None:
    it = trial(depth=50, order="edf", seed=1, turns=200)
    assert it.queued == 50
    assert len(it.times_us[DECISION]) > 50


def test_the_exit_code_follows_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["core", "--quick", "--json"])
    monkeypatch.setattr(core, "QUICK", core.Effort(rounds=1, turns=20))
    code = core.main()
    found = orjson.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["checks"]) == 2
    assert code == (0 if all(check["ok"] for check in found["checks"]) else 1)


def test_orders_are_compared_in_one_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["core", "--quick", "--json", "--order", "salvage", "edf"]
    monkeypatch.setattr(sys, "argv", asked)
    monkeypatch.setattr(core, "QUICK", core.Effort(rounds=1, turns=20))
    monkeypatch.setattr(core, "DEPTHS", (1_000, 10_000))
    core.main()
    found = orjson.loads(capsys.readouterr().out.splitlines()[-1])
    names = [check["name"].split(":")[0] for check in found["checks"]]
    assert names == ["salvage", "salvage", "edf", "edf"]
    assert "edf: decision at 10000 queued, p99, us" in found["spread"]
