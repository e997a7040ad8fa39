"""What the bytes of an answer look like."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from tests.conformance.under_test import Client, FleetUnderTest


async def test_a_stream_is_cumulative_by_default(client: Client, fleet: FleetUnderTest) -> None:
    leg = await client.generated(fleet.unified, client.prompt(20), 12)
    lists = [chunk["output_ids"] for chunk in leg.chunks]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(lists))
    assert all(b["text"].startswith(a["text"]) for a, b in pairwise(leg.chunks))
    assert len(lists[-1]) == 12


async def test_an_incremental_stream_carries_each_token_once(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(20)
    _, decode = await client.paired(prompt, 12, decode=fleet.relaxed)
    alone = await client.generated(fleet.unified, prompt, 12)
    assert [t for chunk in decode.chunks for t in chunk["output_ids"]] == alone.ids
    assert "".join(chunk["text"] for chunk in decode.chunks) == alone.last["text"]


async def test_only_the_last_chunk_has_a_finish_reason(
    client: Client, fleet: FleetUnderTest
) -> None:
    rid = client.rid()
    leg = await client.generated(fleet.unified, client.prompt(20), 6, rid=rid)
    reasons = [chunk["meta_info"]["finish_reason"] for chunk in leg.chunks]
    assert not any(reasons[:-1])
    assert reasons[-1] == {"type": "length", "length": 6}
    assert leg.done
    assert {chunk["meta_info"]["id"] for chunk in leg.chunks} == {rid}


async def test_every_chunk_counts_its_tokens(client: Client, fleet: FleetUnderTest) -> None:
    leg = await client.generated(fleet.unified, client.prompt(20), 6)
    metas = [chunk["meta_info"] for chunk in leg.chunks]
    assert {meta["prompt_tokens"] for meta in metas} == {20}
    assert [meta["completion_tokens"] for meta in metas] == [
        len(chunk["output_ids"]) for chunk in leg.chunks
    ]


async def test_an_unstreamed_answer_is_the_last_chunk_of_a_stream(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(20)
    whole = await client.generated(fleet.unified, prompt, 6, stream=False)
    stream = await client.generated(fleet.unified, prompt, 6)
    assert whole.status == 200
    assert (whole.body["text"], whole.ids) == (stream.last["text"], stream.ids)
    assert whole.meta["finish_reason"] == {"type": "length", "length": 6}


async def test_a_chat_stream_is_a_role_then_deltas_then_the_end_then_the_usage(
    client: Client, fleet: FleetUnderTest
) -> None:
    usage = {"include_usage": True}
    leg = client.chat(fleet.unified, "hello", 5, rid="0123456789abcdef", stream_options=usage)
    await leg.task
    *chunks, last = leg.chunks
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [
        c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]
    ] == ["length"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert {chunk["id"] for chunk in leg.chunks} == {"0123456789abcdef"}
    assert leg.done


async def test_an_unstreamed_chat_answers_in_openai_terms(
    client: Client, fleet: FleetUnderTest
) -> None:
    leg = client.chat(fleet.unified, "hello", 5, stream=False)
    await leg.task
    assert leg.body["object"] == "chat.completion"
    assert leg.body["choices"][0]["message"]["role"] == "assistant"
    assert leg.body["usage"]["completion_tokens"] == 5


async def test_a_completion_can_stream_its_token_ids(client: Client, fleet: FleetUnderTest) -> None:
    prompt = client.prompt(12)
    options = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body = {"model": "tiny", "prompt": prompt, "stream": True, **options}
    leg = client.send(fleet.unified + "/v1/completions", body)
    await leg.task
    plain = await client.generated(fleet.unified, prompt, 6)
    choices = [chunk["choices"][0] for chunk in leg.chunks if chunk["choices"]]
    assert [t for choice in choices for t in choice.get("token_ids") or []] == plain.ids
    assert leg.done


async def test_a_response_that_its_limit_cuts_off_is_incomplete(
    client: Client, fleet: FleetUnderTest
) -> None:
    body = {"model": "tiny", "input": "hello", "max_output_tokens": 5, "ignore_eos": True}
    whole = client.send(fleet.unified + "/v1/responses", body)
    streamed = client.send(fleet.unified + "/v1/responses", body | {"stream": True})
    await asyncio.gather(whole.task, streamed.task)
    cut = {"reason": "max_output_tokens"}
    assert (whole.body["status"], whole.body["incomplete_details"]) == ("incomplete", cut)
    kinds = [chunk["type"] for chunk in streamed.chunks]
    assert [chunk["sequence_number"] for chunk in streamed.chunks] == list(range(len(kinds)))
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
