"""Every page answers as its users expect, and the official client finds nothing odd."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from backends.emulator import EmulatedFleet, FaultKind
from gateway.app import Gateway
from gateway.clock import LiveClock
from gateway.config import Classes, Config, Key, Online, Server
from policies.types import Kind, Pool, Role
from tests.gateway.gateway_under_test import (
    BODIES,
    OFFLINE,
    PAIR,
    UNIFIED,
    Site,
    chat,
    completion,
    entry_of,
    fault,
    generate,
    spec,
    standing,
)

PATHS = pytest.mark.parametrize("path", BODIES)
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
ALL = (*PAIR, *UNIFIED)


@PATHS
@STREAM
async def test_an_answer_says_what_it_cost_and_who_gave_it(path: str, *, stream: bool) -> None:
    async with standing() as site:
        told = await site.ask(path, BODIES[path](stream=stream), {"x-request-id": "abc"})
        assert told.headers["x-request-id"] == "abc"
        assert told.headers["x-slackwater-worker"] == "p1,d1"
        assert told.headers["x-slackwater-class"] == "online"
        spans = [span.split(";")[0] for span in told.headers["server-timing"].split(", ")]
        assert "prefill" in spans
        wanted = "text/event-stream" if stream else "application/json"
        assert told.headers["content-type"].startswith(wanted)


async def test_a_request_without_an_id_is_given_one_that_is_in_the_log() -> None:
    async with standing() as site:
        told = await site.ask("/generate", generate())
        assert len(told.headers["x-request-id"]) == 32
        assert site.lines[-1]["request_id"] == told.headers["x-request-id"]
        assert site.lines[-1]["outcome"] == "ok"


@STREAM
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
async def test_a_clients_own_rid_is_in_its_answer_and_on_no_server(
    path: str, *, stream: bool
) -> None:
    async with standing() as site:
        told = await site.ask(path, BODIES[path](stream=stream, rid='my "own"'))
        bodies = [event for event in told.events if event != "[DONE]"] if stream else [told.body]
        ids = {body.get("meta_info", body)["id"] for body in bodies}
        assert ids == {'my "own"'}
        assert all("own" not in sent.body["rid"] for sent in site.sent)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/liveness", b"OK"),
        ("/health", b"OK"),
        ("/readiness", b"OK"),
        ("/ready", b"OK"),
    ],
)
async def test_health_pages_need_no_key(path: str, answer: bytes) -> None:
    async with standing(key=(Key(key="k", tenant="t"),)) as site:
        told = await site.get(path)
        assert (told.status, told.raw) == (200, answer)
        assert (await site.get("/v1/models")).status == 401


async def test_each_model_is_listed_once() -> None:
    fleet = (*ALL, spec("other", Role.UNIFIED, model="another"))
    async with standing(fleet) as site:
        told = await site.get("/v1/models")
        assert sorted(entry["id"] for entry in told.body["data"]) == ["another", "emulated"]
        asked = await site.ask("/v1/chat/completions", chat(model="another"))
        assert asked.headers["x-slackwater-worker"] == "other"


@pytest.mark.parametrize("path", ["/get_model_info", "/model_info"])
async def test_the_model_is_described_as_its_servers_do(path: str) -> None:
    async with standing() as site:
        assert (await site.get(path)).body["model_path"] == "emulated"


@pytest.mark.parametrize("path", ["/get_server_info", "/server_info"])
async def test_a_server_is_described_as_it_does_itself(path: str) -> None:
    async with standing() as site:
        assert "max_total_num_tokens" in (await site.get(path)).body


@pytest.mark.parametrize("prefix", ["/v1", ""])
async def test_text_becomes_tokens_and_text_again(prefix: str) -> None:
    async with standing() as site:
        tokens = await site.ask(f"{prefix}/tokenize", {"prompt": "hello there"})
        text = await site.ask(f"{prefix}/detokenize", {"tokens": tokens.body["tokens"]})
        assert tokens.body["count"] == len(tokens.body["tokens"])
        assert text.body["text"] == "hello there"


@pytest.mark.parametrize("path", ["/parse_function_call", "/separate_reasoning"])
async def test_a_page_that_servers_do_not_have_is_a_stable_code(path: str) -> None:
    async with standing() as site:
        for server in ("p1", "d1"):
            site.hurt(server, FaultKind.ERROR_STATUS, path=path, status=404, body='{"detail": ""}')
        told = await site.ask(path, {"text": "x"})
        assert (told.status, told.code) == (404, "not_found")
        assert told.body["error"]["message"].endswith(f"has no page {path}")


async def test_the_tokens_of_a_conversation_are_counted_by_a_server() -> None:
    async with standing() as site:
        body = {"model": "emulated", "messages": [{"role": "user", "content": "Tell me more"}]}
        told = await site.ask("/v1/messages/count_tokens", body)
        assert (told.status, list(told.body)) == (200, ["input_tokens"])
        assert told.body["input_tokens"] > 3


async def test_metrics_can_be_parsed_and_count_what_was_served() -> None:
    async with standing() as site:
        await site.ask("/generate", generate(5))
        await site.ask("/generate", generate(5), OFFLINE)
        told = await site.get("/metrics")
        families = {f.name: f for f in text_string_to_metric_families(told.raw.decode())}
        counted = {
            (s.labels["class"], s.labels["outcome"]): s.value
            for s in families["slackwater_requests"].samples
            if s.name.endswith("_total") and s.value
        }
        assert counted == {("online", "ok"): 1.0, ("offline", "ok"): 1.0}
        assert {s.value for s in families["slackwater_worker_usable"].samples} == {1.0}


@pytest.mark.parametrize(
    ("fleet", "stream", "known"),
    [(PAIR, False, 1), (PAIR, True, 1), (UNIFIED, True, 1), (UNIFIED, False, 0)],
)
async def test_targets_are_counted_wherever_the_first_token_is_known(
    fleet: Any, *, stream: bool, known: int
) -> None:
    async with standing(fleet) as site:
        await site.ask("/v1/completions", completion(5, stream=stream))
        await site.ask("/v1/completions", completion(5, stream=stream), OFFLINE)
        text = (await site.get("/metrics")).raw.decode()
    for target in ("ttft", "tpot"):
        counted = f'slackwater_slo_total{{met="true",target="{target}"}} {known}.0'
        assert (counted in text) is bool(known)
    assert 'met="false"' not in text


async def test_an_answer_that_came_too_late_has_missed_its_target_streamed_or_not() -> None:
    async with standing(
        classes=Classes(online=Online(ttft_ms=1.0, tpot_ms=1.0, patience=1e6))
    ) as site:
        await site.ask("/v1/completions", completion(5))
        text = (await site.get("/metrics")).raw.decode()
    for target in ("ttft", "tpot"):
        assert f'slackwater_slo_total{{met="false",target="{target}"}} 1.0' in text


async def test_the_line_of_a_refused_request_says_why() -> None:
    async with standing(UNIFIED) as site:
        await site.ask("/v1/completions", b"{")
        await site.ask("/v1/completions", completion(2))
        site.gateway.front.draining = True
        await site.ask("/v1/completions", completion(2))
        text = (await site.get("/metrics")).raw.decode()
    bad, good, late = site.lines
    assert bad["error"].startswith("the body is not valid JSON")
    assert "error" not in good
    assert (late["outcome"], late["error"]) == ("gateway_draining", "the gateway is shutting down")
    assert 'slackwater_requests_total{class="none",outcome="invalid_json"} 1.0' in text


async def test_servers_are_listed_added_drained_and_removed() -> None:
    async with standing(ALL, workers=["p1", "d1"]) as site:
        server = site.fleet["u1"]
        added = await site.ask("/workers", {"url": server.url, "worker_type": "regular"})
        name = added.body["worker_id"]
        assert name == f"127.0.0.1:{server.port}"
        await site.until("it is known", lambda: name in site.core.ledgers)
        await site.until("it is up", lambda: site.core.ledgers[name].up)
        assert await roles(site) == {"p1": "prefill", "d1": "decode", name: "unified"}
        assert (await site.ask(f"/workers/{name}/drain", b"")).status == 202
        assert await draining(site) == [name]
        assert (await site.ask(f"/workers/{name}/undrain", b"")).body["status"] == "serving"
        assert await draining(site) == []
        address = server.url.replace(":", "%3A").replace("/", "%2F")
        assert (await site.ask(f"/workers/{address}", b"", method="DELETE")).status == 202
        assert await roles(site) == {"p1": "prefill", "d1": "decode"}


async def test_a_server_that_never_answers_is_listed_and_can_be_removed() -> None:
    async with standing(ALL, workers=["p1", "d1"]) as site:
        added = await site.ask("/workers", {"url": "http://127.0.0.1:1", "name": "typo"})
        assert added.status == 202
        listed = (await site.get("/workers")).body["workers"]
        assert [w["is_healthy"] for w in listed if w["id"] == "typo"] == [False]
        assert (await site.ask("/workers/typo", b"", method="DELETE")).status == 202
        assert "typo" not in await roles(site)


async def test_a_server_described_once_more_is_accepted_and_changes_nothing() -> None:
    async with standing(ALL, workers=["p1", "d1"]) as site:
        described = {"url": site.fleet["u1"].url, "name": "u1", "pool": "relaxed"}
        first = await site.ask("/workers", described)
        await site.until(
            "it is up", lambda: "u1" in site.core.ledgers and site.core.ledgers["u1"].up
        )
        server = next(it for it in site.gateway.backend.servers() if it.name == "u1")
        again = await site.ask("/workers", described)
        assert (first.status, again.status, again.body) == (202, 202, first.body)
        assert server in site.gateway.backend.servers()


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"pool": "strict"}, "name"),
        ({"name": "other"}, "url"),
        ({"url": "http://127.0.0.1:1"}, "name"),
        ({"api_key": "x"}, "name"),
    ],
)
async def test_another_server_of_a_known_name_or_address_is_a_conflict(
    changed: dict[str, str], param: str
) -> None:
    async with standing(ALL, workers=["p1", "d1"]) as site:
        described = {"url": site.fleet["u1"].url, "name": "u1", "pool": "relaxed"}
        await site.ask("/workers", described)
        before = (await site.get("/workers")).body["total"]
        told = await site.ask("/workers", described | changed)
        assert (told.status, told.code) == (409, "worker_exists")
        assert told.body["error"]["param"] == param
        assert (await site.get("/workers")).body["total"] == before
        kept = next(it for it in site.gateway.backend.servers() if it.name == "u1")
        assert kept.worker.pool is Pool.RELAXED


async def test_a_server_that_was_removed_may_come_back_as_another() -> None:
    async with standing(ALL, workers=["p1", "d1"]) as site:
        described = {"url": site.fleet["u1"].url, "name": "u1"}
        await site.ask("/workers", described)
        await site.ask("/workers/u1", b"", method="DELETE")
        assert (await site.ask("/workers", described | {"pool": "relaxed"})).status == 202
        await site.until(
            "it is up", lambda: "u1" in site.core.ledgers and site.core.ledgers["u1"].up
        )
        assert site.core.ledgers["u1"].worker.pool is Pool.RELAXED


async def test_the_breaker_of_a_server_is_told_as_data() -> None:
    async with standing(UNIFIED) as site:
        (worker,) = (await site.get("/workers")).body["workers"]
        assert worker["breaker"] == {"state": "closed", "failures_in_a_row": 0, "open_for_ms": 0}
        ledger = site.core.ledgers[worker["id"]]
        for _ in range(3):
            ledger.breaker.failed(site.gateway.backend.now_us())
        (worker,) = (await site.get("/workers")).body["workers"]
        assert worker["breaker"]["state"] == "open"
        assert worker["breaker"]["failures_in_a_row"] == 3
        assert 0 < worker["breaker"]["open_for_ms"] <= 2000


async def draining(site: Site) -> list[str]:
    listed = (await site.get("/workers")).body["workers"]
    return [worker["id"] for worker in listed if worker["draining"]]


async def roles(site: Site) -> dict[str, str]:
    await asyncio.sleep(0)
    listed = (await site.get("/workers")).body["workers"]
    return {worker["id"]: worker["role"] for worker in listed}


async def test_the_admin_key_guards_the_list_of_servers() -> None:
    server = Server(port=0, admin_key="admin")
    async with standing(server=server, key=(Key(key="user", tenant="t"),)) as site:
        user, admin = ({"authorization": f"Bearer {key}"} for key in ("user", "admin"))
        assert (await site.get("/workers", user)).status == 401
        assert (await site.get("/workers", admin)).status == 200
        assert (await site.get("/workers", {"x-api-key": "admin"})).status == 200


async def test_without_an_admin_key_a_users_key_opens_no_list_of_servers() -> None:
    async with standing(key=(Key(key="user", tenant="t"),)) as site:
        told = await site.get("/workers", {"authorization": "Bearer user"})
        assert (told.status, told.code) == (401, "unauthorized")
    async with standing() as site:
        assert (await site.get("/workers")).status == 200


async def test_keys_name_a_tenant_and_bound_its_class() -> None:
    keys = (Key(key="on", tenant="a"), Key(key="off", tenant="b", kind=Kind.OFFLINE))
    async with standing(key=keys) as site:

        async def ask(key: str, **headers: str) -> Any:
            return await site.ask("/generate", generate(2), {"x-api-key": key} | headers)

        assert (await ask("wrong")).code == "unauthorized"
        assert (await ask("on")).headers["x-slackwater-class"] == "online"
        assert (await ask("off")).headers["x-slackwater-class"] == "offline"
        clamped = await ask("off", **{"x-slackwater-class": "online"})
        assert clamped.headers["x-slackwater-class"] == "offline"
        refused, *served = site.lines
        assert (refused["outcome"], refused["path"]) == ("unauthorized", "/generate")
        assert [line["tenant"] for line in served] == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("tier", "kind"),
    [("priority", "online"), ("default", "online"), ("auto", "online"), ("flex", "offline")],
)
async def test_a_service_tier_names_a_class(tier: str, kind: str) -> None:
    async with standing() as site:
        told = await site.ask("/v1/chat/completions", chat(service_tier=tier))
        assert told.headers["x-slackwater-class"] == kind


async def test_the_header_goes_before_the_tier() -> None:
    async with standing() as site:
        told = await site.ask("/v1/chat/completions", chat(service_tier="priority"), OFFLINE)
        assert told.headers["x-slackwater-class"] == "offline"


@pytest.mark.parametrize(("asked", "waited_s"), [("400", 2.0), ("100000", 10.0)])
async def test_a_target_can_be_tightened_and_never_loosened(asked: str, waited_s: float) -> None:
    one = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, max_running=1))
    async with standing(one) as site:
        async with site.meanwhile(site.ask("/generate", generate(2_000))):
            await site.until("it runs", lambda: len(site.sent) == 2)
            told = await site.ask("/generate", generate(), {"x-slo-ttft-ms": asked})
            assert told.code == "deadline_passed"
            assert told.took_s == pytest.approx(waited_s, abs=0.1)


async def test_fields_that_the_gateway_does_not_know_go_on_unchanged() -> None:
    async with standing() as site:
        await site.ask("/v1/chat/completions", chat(min_p=0.1, chat_template_kwargs={"a": [1]}))
        for sent in site.sent:
            assert (sent.body["min_p"], sent.body["chat_template_kwargs"]) == (0.1, {"a": [1]})


@STREAM
async def test_samples_and_batches_become_pairs_of_their_own(*, stream: bool) -> None:
    async with standing() as site:
        body = completion(4, prompt=["one", "two"], n=2, stream=stream)
        told = await site.ask("/v1/completions", body)
        if stream:
            choices = [c for e in told.events if e != "[DONE]" for c in e["choices"]]
        else:
            choices = told.body["choices"]
            assert told.body["usage"]["completion_tokens"] == 16
        assert {choice["index"] for choice in choices} == {0, 1, 2, 3}
        assert len({sent.body["bootstrap_room"] for sent in site.sent}) == 4
        assert all(sent.body.get("n", 1) == 1 for sent in site.sent)


# The official client, on the loop and the clock that it runs on in earnest.


@asynccontextmanager
async def real_gateway(**sections: Any) -> AsyncIterator[tuple[EmulatedFleet, openai.AsyncOpenAI]]:
    async with EmulatedFleet(PAIR) as fleet, asyncio.TaskGroup() as tasks:
        workers = tuple(entry_of(server) for server in fleet.servers.values())
        config = Config(server=Server(port=0), worker=workers, **sections)
        clock = LiveClock(asyncio.get_running_loop())
        gateway = Gateway(config, clock, random.Random(1), tasks, lambda line: None)
        await gateway.start()
        base_url = f"http://127.0.0.1:{gateway.port}/v1"
        client = openai.AsyncOpenAI(base_url=base_url, api_key="key", max_retries=0)
        try:
            yield fleet, client
        finally:
            await client.close()
            await gateway.close()


MESSAGES: Any = [{"role": "user", "content": "Tell me a story"}]


@pytest.mark.real_time
async def test_the_official_client_chats_streams_and_completes() -> None:
    async with real_gateway() as (_, client):
        listed = [model.id async for model in client.models.list()]
        assert listed == ["emulated"]
        create = client.chat.completions.create
        whole = await create(model="emulated", messages=MESSAGES, max_tokens=8)
        stream = await create(
            model="emulated",
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert whole.id.startswith("chatcmpl-")
        assert chunks[-1].usage == whole.usage
        completed = await client.completions.create(model="emulated", prompt="Once", max_tokens=4)
        assert completed.usage is not None
        assert completed.usage.completion_tokens == 4


@pytest.mark.real_time
async def test_the_official_client_reads_the_responses_route() -> None:
    async with real_gateway() as (_, client):
        whole = await client.responses.create(model="emulated", input="Hi", max_output_tokens=6)
        assert whole.status == "incomplete"  # its limit has cut it off
        assert whole.output_text
        async with client.responses.stream(model="emulated", input="Hi") as events:
            told = [event async for event in events]
            final = await events.get_final_response()
        text = "".join(e.delta for e in told if e.type == "response.output_text.delta")
        assert (final.status, final.output_text) == ("completed", text)


@pytest.mark.real_time
async def test_the_official_client_raises_its_own_errors() -> None:
    keys = (Key(key="key", tenant="t"),)
    async with real_gateway(key=keys) as (fleet, client):
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="gpt-17", messages=MESSAGES)
        assert unknown.value.code == "unknown_model"
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="emulated", messages=MESSAGES, max_tokens=-1)
        assert bad.value.param == "max_tokens"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        fleet["p1"].faults.add(fault(FaultKind.ERROR_STATUS, status=500))
        with pytest.raises(openai.InternalServerError) as broken:
            await create(model="emulated", messages=MESSAGES)
        assert (broken.value.status_code, broken.value.code) == (502, "upstream_failed")


@pytest.mark.real_time
async def test_the_official_client_raises_when_a_stream_breaks() -> None:
    async with real_gateway() as (fleet, client):
        fleet["d1"].faults.add(fault(FaultKind.DIE_AFTER, after_tokens=3))
        stream = await client.chat.completions.create(
            model="emulated", messages=MESSAGES, max_tokens=20, stream=True
        )
        with pytest.raises(openai.APIError) as broken:
            async for _ in stream:
                pass
        assert broken.value.code == "stream_interrupted"
