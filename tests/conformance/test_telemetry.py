"""What servers say about themselves, and how it moves with the work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conformance.under_test import Client, FleetUnderTest, is_idle

ROLES = {"prefill": "prefill", "decode": "decode", "unified": "null"}
LOAD_FIELDS = {
    "timestamp",
    "dp_rank",
    "num_running_reqs",
    "num_waiting_reqs",
    "num_waiting_uncached_tokens",
    "num_used_tokens",
    "num_total_tokens",
    "num_active_tokens",
    "num_prealloc_ready_tokens",
    "max_total_num_tokens",
    "max_running_requests",
    "token_usage",
    "gen_throughput",
    "cache_hit_rate",
    "utilization",
    "total_prefill_uncached_tokens",
    "total_prefill_busy_us",
    "decode_moments",
    "memory",
    "disaggregation",
    "queues",
}
QUEUES = {"waiting", "grammar", "paused", "retracted", "prealloc_ready"}
DISAGGREGATION = {
    "mode",
    "prefill_bootstrap_queue_reqs",
    "prefill_inflight_queue_reqs",
    "decode_prealloc_queue_reqs",
    "decode_transfer_queue_reqs",
    "decode_retracted_queue_reqs",
    "kv_transfer_speed_gb_s",
    "kv_transfer_latency_ms",
}
METRICS = [
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:token_usage",
    "sglang:num_used_tokens",
    "sglang:max_total_num_tokens",
    "sglang:gen_throughput",
]
TTFT = "sglang:time_to_first_token_seconds_count"
ROLE_METRICS = {
    "prefill": [
        "sglang:num_prefill_bootstrap_queue_reqs",
        "sglang:num_prefill_inflight_queue_reqs",
    ],
    "decode": [
        "sglang:num_decode_prealloc_queue_reqs",
        "sglang:num_decode_transfer_queue_reqs",
        TTFT,
    ],
    "unified": ["sglang:generation_tokens_total", TTFT],
}


@pytest.mark.parametrize("role", ROLES)
async def test_a_load_report_has_these_fields(
    client: Client, fleet: FleetUnderTest, role: str
) -> None:
    load = await client.loads(getattr(fleet, role))
    assert load.keys() >= LOAD_FIELDS
    assert load["queues"].keys() >= QUEUES
    assert load["disaggregation"].keys() >= DISAGGREGATION
    assert load["disaggregation"]["mode"] == ROLES[role]


async def test_the_envelope_names_the_version_and_the_time(
    client: Client, fleet: FleetUnderTest
) -> None:
    _, told = await client.get(fleet.unified + "/v1/loads")
    assert told.keys() >= {"timestamp", "version", "accelerator", "num_accelerators", "loads"}
    assert told["version"] == "0.5.23"


async def test_a_running_request_shows_in_the_load_and_leaves_it(
    client: Client, fleet: FleetUnderTest
) -> None:
    _, decode = client.pair(client.prompt(300), 600)
    load = await client.until(fleet.decode, lambda load: load["num_running_reqs"] == 1)
    assert load["num_used_tokens"] >= 300
    await decode.task
    await client.until(fleet.decode, lambda load: is_idle(load) and not load["num_used_tokens"])


async def test_decode_moments_count_steps_and_tokens(client: Client, fleet: FleetUnderTest) -> None:
    before = (await client.idle(fleet.decode))["decode_moments"] or [0.0] * 6
    await client.paired(client.prompt(30), 100)
    after = await client.idle(fleet.decode)
    steps, _, busy_us, _, _, generated = (
        b - a for a, b in zip(before, after["decode_moments"], strict=True)
    )
    assert (steps, generated) == (98, 98)  # prefill made one, and a run's first step is not counted
    assert busy_us > 0


async def test_a_decode_leg_that_waits_shows_in_its_queues(
    client: Client, fleet: FleetUnderTest
) -> None:
    client.generate(fleet.decode, client.prompt(30), 5, **client.meeting())
    load = await client.until(fleet.decode, lambda load: load["num_waiting_reqs"] == 1)
    waiting = load["disaggregation"]
    assert waiting["decode_prealloc_queue_reqs"] + waiting["decode_transfer_queue_reqs"] == 1


async def test_a_prefill_leg_that_waits_shows_in_its_bootstrap_queue(
    client: Client, fleet: FleetUnderTest
) -> None:
    client.generate(fleet.prefill, client.prompt(30), 5, **client.meeting())
    load = await client.until(fleet.prefill, lambda load: load["num_waiting_reqs"] == 1)
    assert load["disaggregation"]["prefill_bootstrap_queue_reqs"] == 1


@pytest.mark.parametrize("role", ["prefill", "unified"])
async def test_prefilled_tokens_are_counted_without_the_cached_ones(
    client: Client, fleet: FleetUnderTest, role: str
) -> None:
    url = getattr(fleet, role)
    prompt = client.prompt(500)

    async def counted() -> float:
        before = (await client.idle(url))["total_prefill_uncached_tokens"]
        if role == "prefill":
            await client.paired(prompt, 2)
        else:
            await client.generated(url, prompt, 2)
        after = (await client.idle(url))["total_prefill_uncached_tokens"]
        return float(after - before)

    assert await counted() == 500
    assert await counted() <= 10


async def test_prompts_that_queue_count_as_uncached_work(
    client: Client, fleet: FleetUnderTest
) -> None:
    await client.slow(fleet.prefill, 0.3)
    for _ in range(3):
        client.pair(client.prompt(2000), 2)
        await asyncio.sleep(0.05)
    load = await client.until(
        fleet.prefill, lambda load: load["num_waiting_uncached_tokens"] >= 2000
    )
    await client.slow(fleet.prefill, None)
    assert load["num_waiting_uncached_tokens"] <= 6000
    assert (await client.idle(fleet.prefill))["num_waiting_uncached_tokens"] == 0


@pytest.mark.parametrize("role", ROLES)
async def test_metrics_have_these_names(client: Client, fleet: FleetUnderTest, role: str) -> None:
    if role == "unified":
        await client.generated(fleet.unified, client.prompt(10), 4)
    else:
        await client.paired(client.prompt(10), 4)
    _, text = await client.get(getattr(fleet, role) + "/metrics")
    missing = [name for name in METRICS + ROLE_METRICS[role] if f"\n{name}{{" not in text]
    assert missing == []


@pytest.mark.parametrize("role", ROLES)
async def test_a_server_tells_its_model_and_role(
    client: Client, fleet: FleetUnderTest, role: str
) -> None:
    url = getattr(fleet, role)
    _, model = await client.get(url + "/model_info")
    _, server = await client.get(url + "/server_info")
    assert (model["served_model_name"], model["disaggregation_mode"]) == ("tiny", ROLES[role])
    assert server.keys() >= {"version", "max_total_num_tokens", "internal_states", "page_size"}
    assert server["incremental_streaming_output"] is False


@pytest.mark.parametrize("role", ROLES)
async def test_a_server_is_ready_at_once_and_healthy_within_seconds(
    client: Client, fleet: FleetUnderTest, role: str
) -> None:
    url = getattr(fleet, role)
    assert (await client.get(url + "/ready"))[0] == 200
    assert (await client.get(url + "/health"))[0] == 200


async def test_the_models_route_lists_the_served_name(
    client: Client, fleet: FleetUnderTest
) -> None:
    _, told = await client.get(fleet.prefill + "/v1/models")
    assert [model["id"] for model in told["data"]] == ["tiny"]
    assert told["data"][0]["max_model_len"] > 0


async def test_a_prefill_server_tells_its_topology_on_its_bootstrap_port(
    client: Client, fleet: FleetUnderTest
) -> None:
    address = f"http://127.0.0.1:{fleet.bootstrap_port(fleet.prefill)}"
    everything = {
        f"{name}=-1"
        for name in ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    }
    status, topology = await client.get(f"{address}/route?{'&'.join(sorted(everything))}")
    assert (await client.get(address + "/health"))[0] == 200
    assert status == 200
    assert topology["dp_size"] == 1
    assert str(topology["prefill_http_port"]) == fleet.prefill.rpartition(":")[2]


async def test_a_text_is_tokenized_by_any_server(client: Client, fleet: FleetUnderTest) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "a river and a stone"}
    answers = [
        await client.post(url + "/v1/tokenize", asked) for url in (fleet.decode, fleet.unified)
    ]
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["tokens"] == answers[1][1]["tokens"] != []
