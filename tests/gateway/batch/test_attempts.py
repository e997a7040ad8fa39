"""A row asks the gateway without a socket, and gets what an HTTP client would have got."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from backends.checkpoint import Checkpoint
from backends.emulator import FaultKind
from backends.fetch import Answer
from backends.http import HttpError, Reason
from gateway import passing
from gateway.batch.attempts import Answered, Attempts, Later, Outcome, dialect_of
from gateway.passing import Passing
from gateway.visit import Errand, Visit
from policies.types import Kind, Role
from tests.gateway.gateway_under_test import (
    BODIES,
    OFFLINE,
    PAIR,
    TWO_PAIRS,
    UNIFIED,
    Site,
    generate,
    spec,
    standing,
)

BATCHED = [path for path in BODIES if path != "/v1/messages"]
PATHS = pytest.mark.parametrize("path", BATCHED)
INCREMENTAL = (
    spec("p1", Role.PREFILL, incremental=True),
    spec("d1", Role.DECODE, incremental=True),
)
FLEETS = {"cumulative": PAIR, "incremental": INCREMENTAL}


EMBEDDED = {"input": "a", "model": "emulated"}


class Watched:
    """Those under way."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []

    @contextmanager
    def __call__(self, visit: Visit) -> Iterator[None]:
        self.visits.append(visit)
        try:
            yield
        finally:
            self.visits.remove(visit)

    def tokens(self) -> int:
        taken = [it.checkpoint() for it in self.visits]
        return sum(one.tokens for one in taken if one is not None)


def attempts(site: Site) -> Attempts:
    gateway = site.gateway
    passer = Passing(gateway.front, gateway.core, gateway.backend, gateway._clock, gateway._rng)
    return Attempts(gateway.front, passer)


def errand(site: Site, path: str, body: Any, *, within_s: float = 60.0, **more: Any) -> Errand:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    due_us = round((site.now_s() + within_s) * 1e6)
    facts = {"request_id": "row-1", "tenant": "acme", "dialect": dialect_of(path)}
    return Errand(body=raw, due_us=due_us, **facts | more)


async def run(site: Site, path: str, body: Any, **more: Any) -> Outcome:
    return await attempts(site).answer(path, errand(site, path, body, **more), Watched())


def plain(raw: bytes) -> Any:
    """Without what differs from one request to the next."""
    return _plain(json.loads(raw))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: _plain(inner) for name, inner in value.items() if name not in _OWN}


_OWN = frozenset(
    (
        *("id", "created", "created_at", "completed_at", "response_sent_to_client_ts"),
        *("cached_tokens", "cached_tokens_details", "prompt_tokens_details"),
        *("input_tokens_details", "e2e_latency"),
    )
)


@PATHS
async def test_a_row_gets_the_body_that_a_client_gets(path: str) -> None:
    async with standing() as site:
        body = BODIES[path]()
        told = await site.ask(path, body, OFFLINE)
        outcome = await run(site, path, body)
        assert isinstance(outcome, Answered)
        expected = plain(told.raw)
        if path == "/v1/completions":  # asked for as a stream, which does not tell it
            assert expected.pop("metadata") == {"weight_version": "default"}
        assert (outcome.status, plain(outcome.body)) == (told.status, expected)
        assert [site.lines[-1][key] for key in ("class", "tenant", "request_id")] == [
            "offline",
            "acme",
            "row-1",
        ]


@PATHS
@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"model": 7, "input": 7}'])
async def test_what_a_client_is_refused_is_the_rows_answer(path: str, body: bytes) -> None:
    async with standing() as site:
        told = await site.ask(path, body, OFFLINE)
        outcome = await run(site, path, body)
        assert isinstance(outcome, Answered)
        assert (outcome.status, json.loads(outcome.body)) == (told.status, told.body)
        assert 400 <= outcome.status < 500


@PATHS
async def test_a_model_that_is_not_on_the_list_may_come_back(path: str) -> None:
    async with standing() as site:
        body = BODIES[path]() | {"model": "no-such"}
        outcome = await run(site, path, body)
        told = await site.ask(path, body, OFFLINE)
        assert isinstance(outcome, Later)
        assert (outcome.code, outcome.message, outcome.param) == (
            told.code,
            told.body["error"]["message"],
            "model",
        )


async def test_a_row_cannot_ask_for_a_stream() -> None:
    async with standing() as site:
        outcome = await run(site, "/generate", generate(stream=True))
        assert isinstance(outcome, Answered)
        assert outcome.status == 400
        assert b"stream" in outcome.body


async def test_what_a_server_refuses_is_the_rows_answer() -> None:
    async with standing() as site:
        site.hurt("d1", FaultKind.ERROR_STATUS, status=422, message="no such thing")
        site.hurt("p1", FaultKind.ERROR_STATUS, status=422, message="no such thing")
        outcome = await run(site, "/generate", generate())
        assert isinstance(outcome, Answered)
        assert outcome.status == 422


async def test_a_dead_fleet_is_no_answer() -> None:
    async with standing() as site:
        await site.fleet["d1"].kill()
        await site.fleet["p1"].kill()
        outcome = await run(site, "/generate", generate(), within_s=20.0)
        assert isinstance(outcome, Later)
        assert (outcome.is_engines, outcome.is_death) == (False, False)


@pytest.mark.parametrize("path", ["/generate", "/v1/embeddings"])
@pytest.mark.parametrize("kind", [FaultKind.HANG, FaultKind.REFUSE])
async def test_a_server_that_breaks_off_under_a_row_is_counted(path: str, kind: FaultKind) -> None:
    async with standing(UNIFIED) as site:
        site.hurt("u1", kind)
        body = generate() if path == "/generate" else EMBEDDED
        outcome = await run(site, path, body, within_s=2000.0)
        assert isinstance(outcome, Later)
        assert (outcome.is_engines, outcome.is_death) == (False, True)


async def test_an_engine_that_always_fails_says_so_itself() -> None:
    async with standing() as site:
        site.hurt("d1", FaultKind.ERROR_STATUS, status=500, message="division by zero")
        outcome = await run(site, "/generate", generate(), within_s=600.0)
        assert isinstance(outcome, Later)
        assert (outcome.message, outcome.is_engines) == ("division by zero", True)


async def test_a_row_that_waits_beyond_its_window_is_put_off() -> None:
    async with standing(UNIFIED, entries={"u1": {"max_running": 1}}) as site:
        async with site.meanwhile(site.ask("/generate", generate(2000))):
            await site.until("the first runs", lambda: site.core.placed(Kind.ONLINE) == 1)
            outcome = await run(site, "/generate", generate(), within_s=1.0)
        assert isinstance(outcome, Later)
        assert outcome.code == "deadline_passed"


def limit_in(body: Mapping[str, Any]) -> int:
    settings = body.get("sampling_params", body)
    return int(settings.get("max_new_tokens", settings.get("max_tokens")))


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("stop", [None, ["zebra", "x"]], ids=["plain", "stops"])
@pytest.mark.parametrize("after", [1, 7, 38])
async def test_a_row_goes_on_from_its_checkpoint_as_if_nothing_had_been(
    path: str, fleet: str, stop: list[str] | None, after: int
) -> None:
    async with standing(FLEETS[fleet]) as site:
        body = BODIES[path](40)
        body.get("sampling_params", body)["stop"] = stop
        undisturbed = await run(site, path, body)
        watched = Watched()
        trying = attempts(site).answer(path, errand(site, path, body), watched)
        async with site.meanwhile(trying):
            await site.until("some tokens are there", lambda: watched.tokens() >= after)
            taken = watched.visits[0].checkpoint()
        assert taken is not None
        assert await site.nothing_left() == []
        site.sent.clear()
        kept = Checkpoint.of(taken.as_bytes())
        outcome = await run(site, path, body, earlier=kept)
        assert isinstance(outcome, Answered)
        assert isinstance(undisturbed, Answered)
        assert plain(outcome.body) == plain(undisturbed.body)
        assert limit_in(site.sent[0].body) == 40 - taken.tokens
        assert abs(outcome.tokens - undisturbed.tokens) <= 2


async def test_a_checkpoint_that_cannot_be_read_is_none() -> None:
    assert Checkpoint.of(b"{") is None
    assert Checkpoint.of(b'{"ids": []}') is None


async def test_nothing_is_kept_of_an_answer_that_cannot_go_on() -> None:
    async with standing() as site:
        watched = Watched()
        path = "/v1/responses"
        body = BODIES[path](40)
        async with site.meanwhile(attempts(site).answer(path, errand(site, path, body), watched)):
            await site.until("it runs", lambda: watched.visits)
            await asyncio.sleep(0.2)
            assert watched.visits[0].checkpoint() is None


async def test_a_chat_goes_on_from_its_checkpoint() -> None:
    path = "/v1/chat/completions"
    body = BODIES[path](40)
    async with standing() as site:
        undisturbed = await attempts(site).answer(path, errand(site, path, body), Watched())
        watched = Watched()
        async with site.meanwhile(attempts(site).answer(path, errand(site, path, body), watched)):
            await site.until("it runs", lambda: watched.visits and watched.visits[0].checkpoint())
            taken = watched.visits[0].checkpoint()
        assert taken is not None
        outcome = await run(site, path, body, earlier=taken)
        assert isinstance(outcome, Answered)
        assert isinstance(undisturbed, Answered)
        told, alone = json.loads(outcome.body), json.loads(undisturbed.body)
        assert [told[name] for name in ("choices", "usage")] == [
            alone[name] for name in ("choices", "usage")
        ]


async def test_embeddings_go_to_a_unified_server() -> None:
    body = {"input": "a", "model": "emulated"}
    async with standing((*TWO_PAIRS, *UNIFIED)) as site:
        told = await site.ask("/v1/embeddings", body)
        outcome = await run(site, "/v1/embeddings", body)
        assert isinstance(outcome, Answered)
        assert (outcome.status, plain(outcome.body)) == (told.status, plain(told.raw))


@pytest.mark.parametrize(
    ("status", "code", "is_engines"),
    [
        (429, "upstream_overloaded", False),
        (503, "upstream_overloaded", False),
        (500, "upstream_failed", True),
        (401, "upstream_failed", True),
        (403, "upstream_failed", True),
    ],
)
async def test_a_busy_server_of_embeddings_is_waited_for(
    status: int, code: str, *, is_engines: bool
) -> None:
    async with standing(UNIFIED) as site:
        site.hurt("u1", FaultKind.ERROR_STATUS, status=status, message="busy")
        outcome = await run(site, "/v1/embeddings", {"input": "a", "model": "emulated"})
        assert isinstance(outcome, Later)
        assert (outcome.code, outcome.is_engines) == (code, is_engines)


async def test_embeddings_wait_for_a_unified_server_as_for_a_model() -> None:
    async with standing() as site:
        told = await site.ask("/v1/embeddings", EMBEDDED)
        outcome = await run(site, "/v1/embeddings", EMBEDDED)
        assert isinstance(outcome, Later)
        assert (told.status, outcome.code) == (404, "needs_unified_server")


@pytest.mark.parametrize(("mb", "fits"), [(40, True), (70, False)])
async def test_answers_of_embeddings_may_be_long(
    mb: int, *, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = b"x" * (mb << 20)

    async def handed(*_: Any, max_bytes: int, **__: Any) -> Answer:
        if len(whole) > max_bytes:
            raise HttpError(Reason.TOO_LARGE, "too long an answer", before_head=False)
        return Answer(200, whole, "application/json")

    async with standing(UNIFIED) as site:
        monkeypatch.setattr(passing, "fetch", handed)
        outcome = await run(site, "/v1/embeddings", EMBEDDED)
        assert isinstance(outcome, Answered) is fits
        assert fits or (isinstance(outcome, Later) and outcome.is_engines)


async def test_embeddings_of_rows_may_take_longer_than_a_pages() -> None:
    async with standing(UNIFIED) as site:
        site.hurt("u1", FaultKind.HANG, path="/v1/embeddings")
        told = await site.ask("/v1/embeddings", EMBEDDED)
        began_s = site.now_s()
        outcome = await run(site, "/v1/embeddings", EMBEDDED, within_s=2000.0)
        assert isinstance(outcome, Later)
        assert (told.code, outcome.code) == ("upstream_timeout", "upstream_timeout")
        assert (told.took_s, site.now_s() - began_s) == (120.0, 600.0)


async def test_a_gateway_that_shuts_down_takes_no_row() -> None:
    async with standing() as site:
        site.gateway.front.draining = True
        outcome = await run(site, "/generate", generate())
        assert isinstance(outcome, Later)
        assert outcome.code == "gateway_draining"
