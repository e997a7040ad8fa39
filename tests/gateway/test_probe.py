"""The probe loop against scripted servers, and what it reads out of SGLang's pages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from backends.http import Upstream
from backends.sglang import Patience, Server, Sglang
from gateway.config import Telemetry
from gateway.probe import Prober, learnt, load_of
from policies.events import Event, LoadReport, WorkerDown, WorkerUp
from policies.types import Role, Worker
from tests.gateway.talk import decode, prefill, unified

RANK: dict[str, Any] = {
    "dp_rank": 0,
    "num_running_reqs": 3,
    "num_waiting_reqs": 2,
    "num_waiting_uncached_tokens": 40,
    "num_used_tokens": 900,
    "num_total_tokens": 1000,
    "max_total_num_tokens": 65536,
    "max_running_requests": 32,
    "disaggregation": {"mode": "decode"},
}
INFO = {
    "disaggregation_mode": "decode",
    "max_total_num_tokens": 65536,
    "max_running_requests": 32,
    "chunked_prefill_size": 8192,
    "page_size": 16,
    "dp_size": 1,
    "enable_priority_scheduling": True,
}
SETTINGS = Telemetry(poll_ms=1000.0, timeout_ms=500.0, failures=3)


@dataclass
class Pages:
    """What a server answers, page by page; a status alone has no body, `None` hangs up."""

    answers: dict[str, Any] = field(
        default_factory=lambda: {
            "/server_info": INFO,
            "/v1/models": {"data": [{"id": "llama"}]},
            "/v1/loads": {"loads": [RANK]},
        }
    )
    asked: list[str] = field(default_factory=list)
    up: bool = True

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        said = self.answers.get(request.path, 404)
        if not self.up or said is None:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if isinstance(said, int):
            return web.Response(status=said)
        if isinstance(said, bytes):
            return web.Response(body=said)
        return web.json_response(said)


class Watched:
    """One server under watch, and what the core was told of it."""

    def __init__(self, pages: Pages, told: list[Event], server: Server) -> None:
        self.pages = pages
        self.told = told
        self.server = server

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]


async def stock(_server: object, _info: object) -> frozenset[str]:
    return frozenset()


@asynccontextmanager
async def watched(pages: Pages, role: Role = Role.DECODE) -> AsyncIterator[Watched]:
    app = web.Application()
    app.router.add_get("/{any:.*}", pages.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    worker = Worker(name="w", url=f"http://127.0.0.1:{runner.addresses[0][1]}", role=role)
    loop, told = asyncio.get_running_loop(), list[Event]()
    backend = Sglang(
        loop,
        random.Random(0),
        Patience(),
        lambda worker, _: Upstream(worker.url, connect_timeout_s=1.0),
    )
    prober = Prober(backend, told.append, loop, SETTINGS, stock)
    async with asyncio.TaskGroup() as tasks:
        server = backend.add(worker)
        looked = prober.watch(server, worker, tasks)
        await looked.wait()
        yield Watched(pages, told, server)
        prober.close()
        backend.close()
    await runner.cleanup()


async def test_a_server_introduces_itself_and_tells_its_load() -> None:
    async with watched(Pages()) as watch:
        (up,) = watch.of(WorkerUp)
        assert (up.worker.model, up.worker.page_size, up.worker.chunk_tokens) == ("llama", 16, 8192)
        assert up.worker.orders_by_priority
        assert watch.of(LoadReport)[0].load.total_tokens == 1000


async def test_loads_come_again_and_again_and_the_facts_once() -> None:
    async with watched(Pages()) as watch:
        await asyncio.sleep(4.5)
        assert len(watch.of(LoadReport)) == 5
        assert watch.pages.asked.count("/server_info") == 1


async def test_a_server_is_down_after_as_many_silent_probes_as_configured() -> None:
    async with watched(Pages()) as watch:
        watch.pages.up = False
        await asyncio.sleep(2.5)
        assert not watch.of(WorkerDown)
        await asyncio.sleep(1.5)
        assert watch.of(WorkerDown) == [WorkerDown("w")]


async def test_a_server_that_is_silent_from_the_first_probe_on_is_down_too() -> None:
    async with watched(Pages(up=False)) as watch:
        await asyncio.sleep(10)
        assert watch.of(WorkerDown) == [WorkerDown("w")]
        watch.pages.up = True
        await asyncio.sleep(1.5)
        assert len(watch.of(WorkerUp)) == 1


async def test_a_server_that_is_down_is_told_of_once_and_asked_on() -> None:
    async with watched(Pages()) as watch:
        watch.pages.up = False
        await asyncio.sleep(20)
        assert len(watch.of(WorkerDown)) == 1
        assert len(watch.pages.asked) > 15


async def test_a_server_too_busy_to_say_what_its_plug_in_is_stays_up() -> None:
    pages = Pages()
    async with watched(pages) as site:
        pages.answers["/server_info"] = None
        site.server.is_known, site.server.is_doubted = False, True
        await asyncio.sleep(5.2)
        assert site.of(WorkerDown) == []
        pages.answers["/server_info"] = INFO
        with capture_logs() as told:
            await asyncio.sleep(1.2)
        assert site.server.is_known
        assert not site.server.is_doubted
        assert told == []  # it was never down


async def test_a_server_that_comes_back_introduces_itself_anew() -> None:
    async with watched(Pages()) as watch:
        watch.pages.up = False
        await asyncio.sleep(5)
        watch.pages.answers["/server_info"] = INFO | {"max_total_num_tokens": 1234}
        watch.pages.up = True
        await asyncio.sleep(2)
        assert [up.worker.kv_tokens for up in watch.of(WorkerUp)] == [65536, 1234]


async def test_one_missed_probe_is_none() -> None:
    async with watched(Pages()) as watch:
        for _ in range(5):
            watch.pages.up = False
            await asyncio.sleep(1)
            watch.pages.up = True
            await asyncio.sleep(2)
        assert not watch.of(WorkerDown)


async def test_a_server_that_is_not_there_yet_may_come() -> None:
    async with watched(Pages(up=False)) as watch:
        assert watch.told == []
        watch.pages.up = True
        await asyncio.sleep(1.5)
        assert len(watch.of(WorkerUp)) == 1


async def test_a_server_without_loads_is_up_all_the_same() -> None:
    pages = Pages()
    pages.answers["/v1/loads"] = 404
    async with watched(pages) as watch:
        await asyncio.sleep(5)
        assert len(watch.of(WorkerUp)) == 1
        assert not watch.of(LoadReport)
        assert not watch.of(WorkerDown)


async def test_an_older_server_is_asked_by_the_older_name() -> None:
    pages = Pages()
    pages.answers["/get_server_info"] = pages.answers.pop("/server_info")
    async with watched(pages) as watch:
        assert watch.of(WorkerUp)[0].worker.page_size == 16


async def test_a_server_without_any_of_these_pages_is_taken_as_configured() -> None:
    async with watched(Pages(answers={}), Role.UNIFIED) as watch:
        (up,) = watch.of(WorkerUp)
        assert (up.worker.role, up.worker.model, up.worker.kv_tokens) == (Role.UNIFIED, "", 0)


async def test_the_servers_own_word_on_its_role_is_believed() -> None:
    async with watched(Pages(), Role.PREFILL) as watch:
        assert watch.of(WorkerUp)[0].worker.role is Role.DECODE


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2]",
        b'"text"',
        b'{"loads": 5}',
        b'{"loads": {"a": 1}}',
        b'{"loads": [5]}',
        b'{"loads": [{"num_total_tokens": 1e999}]}',
    ],
)
async def test_garbage_counts_as_silence_and_ends_nothing(garbage: bytes) -> None:
    async with watched(Pages()) as watch:
        watch.pages.answers["/v1/loads"] = garbage
        await asyncio.sleep(5)
        assert len(watch.of(WorkerDown)) == 1
        watch.pages.answers["/v1/loads"] = {"loads": [RANK]}
        await asyncio.sleep(2)
        assert len(watch.of(WorkerUp)) == 2


@pytest.mark.parametrize("said", [5, {}, {"mode": ["decode"]}, {"mode": "odd"}])
async def test_a_role_that_makes_no_sense_is_none(said: object) -> None:
    async with watched(Pages()) as watch:
        watch.pages.answers["/v1/loads"] = {"loads": [RANK | {"disaggregation": said}]}
        await asyncio.sleep(5)
        assert len(watch.of(WorkerUp)) == 1
        assert not watch.of(WorkerDown)


async def test_a_role_that_is_switched_is_followed() -> None:
    async with watched(Pages()) as watch:
        switched = RANK | {"disaggregation": {"mode": "prefill"}}
        watch.pages.answers["/v1/loads"] = {"loads": [switched]}
        watch.pages.answers["/server_info"] = INFO | {"disaggregation_mode": "prefill"}
        await asyncio.sleep(5)
        assert [up.worker.role for up in watch.of(WorkerUp)] == [Role.DECODE, Role.PREFILL]


@pytest.mark.parametrize("path", ["/server_info", "/v1/models"])
@pytest.mark.parametrize("garbage", [b"[", b"[]", b'{"data": 7, "page_size": "x", "dp_size": -1}'])
async def test_garbage_at_the_introduction_ends_nothing(path: str, garbage: bytes) -> None:
    pages = Pages()
    good, pages.answers[path] = pages.answers[path], garbage
    async with watched(pages) as watch:
        await asyncio.sleep(2)
        pages.answers[path] = good
        await asyncio.sleep(2)
        assert watch.of(WorkerUp)[-1].worker.model == "llama"


def test_what_the_operator_wrote_goes_first() -> None:
    worker = decode(kv_tokens=10, max_running=2, chunk_tokens=3, model="mine", bootstrap_port=7)
    known = learnt(worker, INFO, "llama")
    assert (known.kv_tokens, known.max_running, known.chunk_tokens) == (10, 2, 3)
    assert (known.model, known.bootstrap_port) == ("mine", 7)


def test_a_capacity_is_told_for_each_rank() -> None:
    assert learnt(unified(), INFO | {"dp_size": 4}, "").kv_tokens == 4 * 65536


@pytest.mark.parametrize(
    ("mode", "role"),
    [("null", Role.UNIFIED), (None, Role.UNIFIED), ("prefill", Role.PREFILL), ("odd", Role.DECODE)],
)
def test_a_role_has_sglangs_name(mode: str | None, role: Role) -> None:
    assert learnt(decode(), {"disaggregation_mode": mode}, "").role is role


def test_a_prefill_server_has_a_bootstrap_port() -> None:
    assert learnt(prefill(), {}, "").bootstrap_port == 8998
    told = {"disaggregation_bootstrap_port": 9001}
    assert learnt(prefill(), told, "").bootstrap_port == 9001
    assert learnt(decode(), {}, "").bootstrap_port is None


def test_a_chunk_size_of_minus_one_is_none() -> None:
    assert learnt(unified(), {"chunked_prefill_size": -1}, "").chunk_tokens == 0


def test_the_ranks_of_a_server_are_one_load() -> None:
    load = load_of([RANK, RANK | {"dp_rank": 1, "num_used_tokens": 100}], 77)
    assert (load.seen_us, load.running, load.waiting) == (77, 6, 4)
    assert (load.used_tokens, load.total_tokens) == (1000, 2000)
    assert (load.capacity_tokens, load.max_running) == (131_072, 64)


def test_what_a_server_does_not_say_is_zero() -> None:
    odd = {"num_running_reqs": None, "num_used_tokens": True, "num_total_tokens": "5"}
    load = load_of([odd], 0)
    assert (load.running, load.used_tokens, load.total_tokens) == (0, 0, 0)
