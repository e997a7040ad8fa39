from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from backends.constants_file import load_constants
from gateway.calibrate import add_arguments, constants_table, run_calibrate
from policies.calibration import Setup
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import Parallel, decode_batch, prefill_batch
from policies.shipped import SHIPPED, TYPICAL

SETUP = Setup(model=model_named("Qwen3-8B"), device=device_named("h100"), parallel=Parallel(tp=2))
WORDS = ("--model", "Qwen/Qwen3-8B", "--gpu", "h100", "--tp", "2")


def table(tmp_path: Path, *, scale: float = 1.0, tp: int = 2) -> str:
    cost = SETUP.cost(TYPICAL)
    lines = ["system,model,tp,phase,batch_size,ctx_len,latency_ms"]
    for count in (1, 4, 16, 64):
        for length in (128, 1024, 4096):
            step = cost.cost(decode_batch(count, count * length)).seconds * scale
            prefill = cost.cost(prefill_batch([(length, 0)] * count)).seconds * scale
            lines.append(f"h100_sxm,Qwen3-8B,{tp},decode,{count},{length},{step * 1e3}")
            lines.append(f"h100_sxm,Qwen3-8B,{tp},prefill,{count},{length},{prefill * 1e3}")
    path = tmp_path / "steps.csv"
    path.write_text("\n".join(lines))
    return str(path)


def calibrate(*words: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = io.StringIO()
    status = run_calibrate(parser.parse_args(words), Console(file=out, width=200))
    return status, out.getvalue()


def test_a_table_becomes_a_file_that_predictions_load(tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    status, text = calibrate("--table", table(tmp_path), *WORDS, "--out", str(target))
    assert status == 0
    assert "mean error" in text
    found = constants_table(target)["h100", "qwen3", 2]
    assert "24 steps in steps.csv" in found.source
    batch = decode_batch(32, 32 * 2000)
    assert SETUP.cost(found).cost(batch).seconds == pytest.approx(
        SETUP.cost(TYPICAL).cost(batch).seconds, rel=0.05
    )


def test_a_second_calibration_keeps_the_first(tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    calibrate("--table", table(tmp_path), *WORDS, "--out", str(target))
    other = table(tmp_path, tp=1)
    status, _ = calibrate("--table", other, *WORDS[:-1], "1", "--out", str(target))
    assert status == 0
    assert set(load_constants(target)) == {("h100", "qwen3", 1), ("h100", "qwen3", 2)}


def test_without_a_file_the_constants_are_printed(tmp_path: Path) -> None:
    status, text = calibrate("--table", table(tmp_path), *WORDS)
    assert status == 0
    assert 'family = "qwen3"' in text


def test_rows_of_another_setup_are_not_taken(tmp_path: Path) -> None:
    status, text = calibrate("--table", table(tmp_path), *WORDS[:-1], "4")
    assert status == 2
    assert "no rows for Qwen/Qwen3-8B on h100 with tp 4" in text


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e-6, "misses half"), (0.0, "no time"), (-1.0, "no time")]
)
def test_nonsense_writes_no_file(tmp_path: Path, scale: float, reason: str) -> None:
    target = tmp_path / "mine.toml"
    words = ("--table", table(tmp_path, scale=scale), *WORDS, "--out", str(target))
    status, text = calibrate(*words)
    assert status == 1
    assert reason in text
    assert not target.exists()


def test_a_missing_table_and_missing_torch_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, text = calibrate("--table", str(tmp_path / "none.csv"), *WORDS)
    assert (status, "none.csv" in text) == (2, True)
    monkeypatch.setitem(sys.modules, "torch", None)
    status, text = calibrate("--torch", *WORDS)
    assert (status, "torch cannot be imported" in text) == (1, True)


def test_no_file_means_the_shipped_constants() -> None:
    assert constants_table(None) is SHIPPED
