"""The whole life of a batch with OpenAI's own client, over real SGLang."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any, Literal

import openai
import orjson
import pytest
from openai.types import Batch

from gateway.batch.settings import BatchSettings
from tests.conformance.under_test import Client
from tests.e2e.site import REAL, SHARED, Site, standing

pytestmark = REAL

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
OVER = ("completed", "failed", "expired", "cancelled")
MODEL_ROWS = 6
TOKENS = 12
STEP_S = 0.02
"""Slow enough that neither row is whole before the other has begun."""


def body(client: Client, endpoint: Endpoint, number: int, tokens: int = TOKENS) -> dict[str, Any]:
    text = f"{client.rid()} Tell me of river number {number}"
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": tokens, "temperature": 0}
    asked |= {"ignore_eos": True}
    if endpoint == "/v1/completions":
        return asked | {"prompt": text}
    return asked | {"messages": [{"role": "user", "content": text}]}


def lines(bodies: list[dict[str, Any]], endpoint: Endpoint) -> bytes:
    rows = [
        {"custom_id": f"row-{i}", "method": "POST", "url": endpoint, "body": one}
        for i, one in enumerate(bodies)
    ]
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Batch:
    async with asyncio.timeout(40.0):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in OVER:
                return batch
            await asyncio.sleep(0.1)


async def submitted(
    site: Site, api: openai.AsyncOpenAI, bodies: list[dict[str, Any]], endpoint: Endpoint
) -> Batch:
    rows = lines(bodies, endpoint)
    file = await api.files.create(file=("rows.jsonl", io.BytesIO(rows)), purpose="batch")
    return await api.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h"
    )


def text_in(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
async def test_a_batch_is_answered_as_its_requests_would_be(
    client: Client, tmp_path: Path, endpoint: Endpoint
) -> None:
    batch_settings = BatchSettings(folder=str(tmp_path))
    async with standing(client, "prefill", "decode", policies=SHARED, batch=batch_settings) as site:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none") as api:
            bodies = [body(client, endpoint, i) for i in range(MODEL_ROWS)]
            wrong = bodies[0] | {"max_tokens": "many"}
            made = await submitted(site, api, [*bodies, wrong], endpoint)
            batch = await ended(api, made.id)
            assert batch.status == "completed"
            assert batch.request_counts is not None
            assert (batch.request_counts.completed, batch.request_counts.failed) == (MODEL_ROWS, 1)
            content = await api.files.content(batch.output_file_id or "")
            answers = [orjson.loads(line)["response"]["body"] for line in content.text.splitlines()]
            for asked, answer in zip(bodies, answers, strict=True):
                leg = await site.ask(endpoint, asked)
                assert answer["usage"]["completion_tokens"] == TOKENS
                assert text_in(answer) == text_in(leg.body)


async def test_rows_go_on_from_their_tokens_in_the_next_gateway(
    client: Client, tmp_path: Path
) -> None:
    endpoint: Endpoint = "/v1/completions"
    settings = BatchSettings(folder=str(tmp_path), drain_s=0.0)
    bodies = [body(client, endpoint, i, 150) for i in range(2)]
    names = ("prefill", "decode")
    await client.slow(client.fleet.decode, STEP_S)
    async with standing(client, *names, policies=SHARED, batch=settings) as site:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none") as api:
            made = await submitted(site, api, bodies, endpoint)
            attempts = site.gateway.backend._live
            await site.until(lambda: len([a for a in attempts.values() if a.tokens > 5]) == 2, 20.0)
            await site.gateway.drain()
            await client.slow(client.fleet.decode, None)
    async with standing(client, *names, policies=SHARED, batch=settings) as site:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none") as api:
            batch = await ended(api, made.id)
            told = site.gateway.metrics.render().decode()
            assert "slackwater_batch_resumed_total 2.0" in told
            content = await api.files.content(batch.output_file_id or "")
            for asked, line in zip(bodies, content.text.splitlines(), strict=True):
                answer = orjson.loads(line)["response"]["body"]
                leg = await site.ask(endpoint, asked)
                assert text_in(answer) == text_in(leg.body)
