"""What the official client of OpenAI sees of files and batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gateway.batch.served import ENDPOINT, jsonl, row, served
from tests.gateway.batch.stored import result

pytestmark = [pytest.mark.real_time, pytest.mark.usefixtures("_sweeps_often")]


async def test_a_file_is_kept_as_it_was_sent(tmp_path: Path) -> None:
    data = jsonl(row(1), row(2))
    async with served(tmp_path) as site:
        client = site.client()
        made = await client.files.create(file=("rows.jsonl", data), purpose="batch")
        assert (made.bytes, made.filename, made.status) == (len(data), "rows.jsonl", "processed")
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == data


async def test_the_whole_life_of_a_batch(tmp_path: Path) -> None:
    async with served(tmp_path) as site:
        client = site.client()
        file = await client.files.create(file=("a.jsonl", jsonl(row(1), row(2))), purpose="batch")
        made = await client.batches.create(
            input_file_id=file.id,
            endpoint=ENDPOINT,
            completion_window="24h",
            metadata={"who": "me"},
        )
        assert (made.status, made.metadata and made.metadata["who"]) == ("validating", "me")
        store, _ = site.service.opened()
        while not (rows := await store.claim(9)):
            pass
        good, bad = [result(rows[0]), result(rows[1], failed=True)]
        await store.finish([good, bad])
        ended = await site.ended(client, made.id)
        assert ended.output_file_id
        assert ended.error_file_id
        assert ended.request_counts
        assert (ended.status, ended.request_counts.completed) == ("completed", 1)
        assert (await client.files.content(ended.output_file_id)).content == good.line + b"\n"
        assert (await client.files.content(ended.error_file_id)).content == bad.line + b"\n"
