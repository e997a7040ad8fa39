from __future__ import annotations

import argparse
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from backends.constants_file import dump_constants
from gateway.config import Online
from gateway.predict import TITLES, Answer, Demand, add_arguments, answer, read_model, run_predict
from policies.constants import lookup
from policies.devices import device_named
from policies.known_models import KNOWN_CONFIGS
from policies.models import ModelError, model_named
from policies.roofline import Parallel, build
from policies.shipped import SHIPPED, TYPICAL

LLAMA = ("--model", "Llama-3.1-70B", "--gpu", "h100", "--tp", "4")


def predict(*words: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = io.StringIO()
    status = run_predict(parser.parse_args(words), Console(file=out, width=200))
    return status, out.getvalue()


def predicted(*words: str) -> Any:
    status, text = predict(*words, "--json")
    assert status == 0
    return json.loads(text)


def test_the_table_names_the_source_of_its_constants_and_each_bottleneck() -> None:
    status, text = predict(*LLAMA)
    assert status == 0
    assert "AIConfigurator" in text
    assert "compute" in text
    assert "bandwidth" in text


def test_bars_show_what_each_step_waits_for() -> None:
    status, text = predict(*LLAMA, "--plot")
    assert status == 0
    assert "bbbb" in text
    assert "cccc" in text


def test_json_holds_what_the_model_says() -> None:
    report = predicted(*LLAMA, "--isl", "1024", "--osl", "256")
    cost = build(
        model_named("Llama-3.1-70B"),
        device_named("h100"),
        lookup(SHIPPED, "h100", "llama", 4),
        Parallel(tp=4),
    )
    assert report["answer"]["prefill_ms"] == pytest.approx(cost.prefill_one(1024).seconds * 1e3)
    assert report["kv_bytes_per_token"] == 327_680
    assert report["answer"]["decode_step_ms"] <= Online().tpot_ms


def test_its_targets_are_those_of_the_gateway_unless_it_is_told_others() -> None:
    demand = predicted(*LLAMA)["demand"]
    assert (demand["ttft_ms"], demand["tpot_ms"]) == (Online().ttft_ms, Online().tpot_ms)
    assert predicted(*LLAMA, "--tpot-ms", "30")["answer"]["decode_step_ms"] <= 30


def test_the_help_tells_every_default() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    told = " ".join(parser.format_help().split())
    for default in ("2000.0", "100.0", "50.0", "1024", "256", "bf16"):
        assert f"(default: {default})" in told
    assert "None" not in told


def test_the_table_says_what_each_figure_counts() -> None:
    assert set(TITLES) == {field.name for cls in (Demand, Answer) for field in fields(cls)}
    assert "prefill servers per decode server" in predict(*LLAMA)[1]


def test_a_cached_prompt_and_more_replicas_bear_more() -> None:
    one = predicted(*LLAMA)["answer"]
    cached = predicted(*LLAMA, "--cached", "900")["answer"]
    two = predicted(*LLAMA, "--dp", "2")["answer"]
    assert cached["prefill_requests_per_s"] > 2 * one["prefill_requests_per_s"]
    assert two["decode_requests_per_s"] == pytest.approx(2 * one["decode_requests_per_s"])


@given(st.floats(60, 5000), st.floats(5, 200), st.integers(1, 30_000), st.integers(1, 4000))
def test_what_is_promised_meets_the_targets(
    ttft_ms: float, tpot_ms: float, isl: int, osl: int
) -> None:
    cost = build(model_named("Llama-3.1-8B"), device_named("h100"), SHIPPED["h100", "llama", 1])
    demand = Demand(isl=isl, osl=osl, cached=0, ttft_ms=ttft_ms, tpot_ms=tpot_ms, overhead_ms=50.0)
    found = answer(cost, demand, 400_000)
    assert found.decode_step_ms <= tpot_ms
    busy = found.prefill_requests_per_s * found.prefill_ms * 1e-3
    assert 0 <= busy < 1
    if busy:
        wait_ms = busy * found.prefill_ms / (2 * (1 - busy))
        assert wait_ms + found.prefill_ms + 50 == pytest.approx(ttft_ms)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--model", "Llama-3.1-70B", "--gpu", "h100"), "raise tp"),
        (("--model", "GPT-9", "--gpu", "h100"), "GPT-9"),
        (("--model", "Llama-3.1-8B", "--gpu", "tpu"), "tpu"),
        (("--model", "nowhere/config.json", "--gpu", "h100"), "cannot be read"),
        ((*LLAMA, "--cached", "5000"), "make no request"),
        ((*LLAMA, "--dp", "3", "--dp-attention"), "multiple of dp"),
        ((*LLAMA, "--constants", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_the_reason(
    words: tuple[str, ...], reason: str
) -> None:
    status, text = predict(*words)
    assert status == 2
    assert reason in text


def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_CONFIGS["Qwen3-8B"]))
    assert read_model(str(tmp_path)).layers == 36
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        read_model(str(tmp_path))


def test_calibrated_constants_take_the_place_of_the_shipped(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(dump_constants({("h100", "llama", 4): TYPICAL}))
    report = predicted(*LLAMA, "--constants", str(path))
    assert report["constants"] == TYPICAL.source
    assert report["answer"]["prefill_ms"] != predicted(*LLAMA)["answer"]["prefill_ms"]
