"""What the simulator is told of real servers: their limits, and the steps that a fit predicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.calibration_run import Facts
from backends.steptimes import read_table
from benchmarks.fidelity_sglang import SCENARIO, told, write_steps
from gateway.simulation.fleet import servers_of
from gateway.simulation.plan import load
from policies.constants import lookup
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import CostModel, Parallel, build, prefill_batch
from policies.shipped import SHIPPED
from policies.types import Role

OVERHEAD_S = 0.025


@pytest.fixture
def cost() -> CostModel:
    model, device = model_named("Llama-3.1-8B"), device_named("h100")
    return build(model, device, lookup(SHIPPED, device.name, model.family, 1), Parallel(tp=1))


def facts(mode: str, **more: int) -> Facts:
    limits = {"chunk_tokens": 1024, "context_tokens": 16_384, "kv_tokens": 16_000}
    limits |= {"max_running": 32, "bootstrap_port": 8998, "tp": 1} | more
    return Facts(mode=mode, model_path="tiny", accelerator="cpu", **limits)


def test_the_simulators_steps_are_those_that_the_fit_predicts(
    cost: CostModel, tmp_path: Path
) -> None:
    write_steps(tmp_path / "steps.csv", cost)
    table = read_table(tmp_path / "steps.csv", system="cpu", model="tiny", tp=1)
    assert table.prefill_s([(512, 0)]) == pytest.approx(
        cost.cost(prefill_batch([(512, 0)])).seconds
    )
    assert table.decode_s(8, 8 * 512) == pytest.approx(cost.decode(8, 8 * 512).seconds)


def test_the_simulated_servers_have_the_limits_and_delays_of_the_real_ones(
    cost: CostModel, tmp_path: Path
) -> None:
    write_steps(tmp_path / "steps.csv", cost)
    both = facts("prefill", chunk_tokens=777), facts("decode", max_running=9)
    plan = told(load(SCENARIO, tmp_path), both, OVERHEAD_S)
    prefill, decode = servers_of(plan.scenario.fleet[0], plan.data)
    assert (prefill.config.role, prefill.config.chunk_tokens) == (Role.PREFILL, 777)
    assert (decode.config.role, decode.config.max_running) == (Role.DECODE, 9)
    assert prefill.config.ingest_s + prefill.config.link_latency_s == pytest.approx(OVERHEAD_S)
    assert "measured: tiny tp1 on cpu" in prefill.times_source
