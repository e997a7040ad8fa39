"""The whole life of a batch over emulated servers, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest
from openai.types import Batch

from backends.emulator import FaultKind
from gateway.batch.client import BatchClient
from policies.types import Kind
from tests.gateway.batch.living import FLEET, UNHURRIED, Living, before, emulated, lines, living
from tests.gateway.gateway_under_test import chat, completion, fault, responses

pytestmark = pytest.mark.real_time

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
BODIES: dict[Endpoint, dict[str, Any]] = {
    "/v1/chat/completions": chat(8, model="emulated"),
    "/v1/completions": completion(8, model="emulated"),
    "/v1/embeddings": {"model": "emulated", "input": "Once upon a time"},
    "/v1/responses": responses(8, model="emulated"),
}


async def ended(client: Any, batch_id: str) -> Batch:
    async with asyncio.timeout(20.0):
        while True:
            batch: Batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch
            await asyncio.sleep(0.05)


async def progress(client: Any, batch_id: str) -> dict[str, Any]:
    told: dict[str, Any] = orjson.loads(
        (await client.batches.retrieve(batch_id)).metadata["slackwater"]
    )
    return told


@pytest.mark.parametrize("endpoint", BODIES)
async def test_openais_client_gets_its_batch_back(tmp_path: Path, endpoint: Endpoint) -> None:
    rows = lines([*[BODIES[endpoint]] * 20, {"model": "emulated"}], endpoint)
    async with living(tmp_path) as it, it.openai() as client:
        file = await client.files.create(file=("rows.jsonl", io.BytesIO(rows)), purpose="batch")
        made = await client.batches.create(
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window="24h",
            metadata={"nightly": "yes"},
        )
        batch = await ended(client, made.id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 1)
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        output = (await client.files.content(batch.output_file_id)).text.splitlines()
        errors = (await client.files.content(batch.error_file_id)).text.splitlines()
        told = [orjson.loads(line) for line in output]
        assert [one["custom_id"] for one in told] == [f"row-{i}" for i in range(20)]
        assert {one["response"]["status_code"] for one in told} == {200}
        assert [orjson.loads(line)["response"]["status_code"] for line in errors] == [400]
        progress = orjson.loads((batch.metadata or {})["slackwater"])
        assert (progress["completed"], progress["running"], progress["queued"]) == (20, 0, 0)
        assert (batch.metadata or {})["nightly"] == "yes"


async def test_a_batch_that_is_cancelled_keeps_what_is_done(tmp_path: Path) -> None:
    async with living(tmp_path, UNHURRIED) as it, it.openai() as client:
        bodies = [chat(4 if i < 5 else 6000, model="emulated", user=str(i)) for i in range(60)]
        made = await it.submit(bodies, "/v1/chat/completions", "24h")
        async with asyncio.timeout(20.0):
            while (await progress(client, made))["completed"] < 5:  # noqa: ASYNC110 - a state
                await asyncio.sleep(0.05)
        await client.batches.cancel(made)
        batch = await ended(client, made)
        assert batch.status == "cancelled"
        assert it.gateway.core.placed(Kind.OFFLINE) == 0
        assert batch.output_file_id is not None
        assert len(await it.content(batch.output_file_id)) == 5
        errors = await it.content(batch.error_file_id or "")
        assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
        assert len(errors) == 55


async def test_a_window_that_ends_keeps_what_is_done(tmp_path: Path) -> None:
    async with living(tmp_path, UNHURRIED) as it:
        bodies = [chat(4 if i < 5 else 9000, model="emulated", user=str(i)) for i in range(20)]
        batch = await it.over(await it.submit(bodies, "/v1/chat/completions", "2s"))
        assert batch["status"] == "expired"
        assert len(await it.content(batch["output_file_id"])) == 5
        errors = await it.content(batch["error_file_id"])
        assert {one["error"]["code"] for one in errors} == {"batch_expired"}


async def test_a_gateway_that_ends_in_good_order_leaves_nothing_to_make_again(
    tmp_path: Path,
) -> None:
    bodies = [completion(600, model="emulated", prompt=f"Tale {i}") for i in range(8)]
    async with emulated(FLEET[:2]) as fleet:
        async with before(fleet, tmp_path, drain_s=0.0) as it:
            made = await it.submit(bodies, "/v1/completions", "24h")
            async with asyncio.timeout(20.0):
                while it.gateway.core.placed(Kind.OFFLINE) < 8:  # noqa: ASYNC110 - a state
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
        assert 100 < fleet.engines["d1"].machine.counters.generated_tokens < 8 * 600
        async with before(fleet, tmp_path) as it:
            batch = await it.over(made)
            assert batch["status"] == "completed"
            texts = await texts_of(it, batch)
            # What was in no event yet when the gateway went is made again: a few tokens a row.
            assert fleet.engines["d1"].machine.counters.generated_tokens < 8 * (600 + 10)
            batch = await it.over(await it.submit(bodies, "/v1/completions", "24h"))
            assert await texts_of(it, batch) == texts


async def texts_of(it: Living, batch: dict[str, Any]) -> list[str]:
    answers = await it.content(batch["output_file_id"])
    return [one["response"]["body"]["choices"][0]["text"] for one in answers]


async def test_overload_is_never_a_failed_row(tmp_path: Path) -> None:
    async with living(tmp_path, FLEET[:2]) as it:
        it.fleet["d1"].faults.add(fault(FaultKind.ERROR_STATUS, status=503, requests=30))
        bodies = [chat(8, model="emulated", user=str(i)) for i in range(20)]
        batch = await it.over(await it.submit(bodies, "/v1/chat/completions", "1h"))
        assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}


async def test_metrics_tell_of_batches(tmp_path: Path) -> None:
    async with living(tmp_path) as it:
        bodies = [chat(8, model="emulated", user=str(i)) for i in range(10)]
        await it.over(await it.submit(bodies, "/v1/chat/completions", "1h"))
        told = it.gateway.metrics.render().decode()
        assert 'slackwater_batch_rows_ended_total{outcome="completed"} 10.0' in told
        assert 'slackwater_batch_tokens_total{kind="generated"} 80.0' in told
        assert 'slackwater_batches{status="in_progress"}' in told


async def test_batches_are_of_offline_class_in_log_and_metrics(tmp_path: Path) -> None:
    async with living(tmp_path) as it:
        bodies = [chat(8, model="emulated")]
        await it.over(await it.submit(bodies, "/v1/chat/completions", "1h"))
        told = it.gateway.metrics.render().decode()
        assert 'slackwater_requests_total{class="offline",outcome="ok"} 1.0' in told


async def test_a_client_of_ours_is_told_what_is_wrong(tmp_path: Path) -> None:
    async with living(tmp_path) as it, BatchClient.connected(it.url, "") as client:
        with pytest.raises(Exception, match="not_found"):
            await client.batch("batch_none")
