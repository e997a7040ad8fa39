"""What clients are told when a server fails, and that nothing of a failed request stays behind.

Each site checks on its way out that no server, ledger or socket still holds anything.
"""

from __future__ import annotations

from typing import Any

import pytest

from backends.emulator import FaultKind
from gateway.config import Timeouts
from policies.types import Role
from tests.gateway.gateway_under_test import (
    BODIES,
    PAIR,
    QUICK,
    TWO_PAIRS,
    UNIFIED,
    Site,
    Told,
    chat,
    generate,
    spec,
    standing,
)

EARLY: dict[str, dict[str, Any]] = {
    "refuses": {"kind": FaultKind.REFUSE},
    "hangs": {"kind": FaultKind.HANG},
    "answers-500": {"kind": FaultKind.ERROR_STATUS, "status": 500},
    "answers-503": {"kind": FaultKind.ERROR_STATUS, "status": 503},
    "fails-in-band": {"kind": FaultKind.IN_BAND},
}
"""What either server may do before the first token is out."""
EARLY_AT_DECODE: dict[str, dict[str, Any]] = {
    "dies": {"kind": FaultKind.DIE_AFTER},
    "truncates": {"kind": FaultKind.TRUNCATE},
    "corrupts": {"kind": FaultKind.CORRUPT},
}
LATE: dict[str, dict[str, Any]] = {
    "dies": {"kind": FaultKind.DIE_AFTER, "after_tokens": 3},
    "hangs": {"kind": FaultKind.HANG_AFTER, "after_tokens": 3},
    "fails-in-band": {"kind": FaultKind.IN_BAND, "after_tokens": 3},
    "truncates": {"kind": FaultKind.TRUNCATE, "after_tokens": 3},
    "corrupts": {"kind": FaultKind.CORRUPT, "after_tokens": 3},
}
CASES = [(leg, how, f) for leg in ("p1", "d1") for how, f in EARLY.items()]
CASES += [("d1", how, f) for how, f in EARLY_AT_DECODE.items()]
LEG_AND_FAULT = pytest.mark.parametrize(
    ("leg", "how", "trouble"), CASES, ids=[f"{leg}-{how}" for leg, how, _ in CASES]
)
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
PATHS = pytest.mark.parametrize("path", BODIES)
LATE_FAULT = pytest.mark.parametrize("how", LATE)


def attempts_in(site: Site) -> list[tuple[str, int, set[str]]]:
    """The rid, the room and the servers of each attempt, in order."""
    found: dict[int, tuple[str, int, set[str]]] = {}
    for sent in site.sent:
        room = sent.body["bootstrap_room"]
        found.setdefault(room, (sent.body["rid"], room, set()))[2].add(sent.worker)
    return list(found.values())


@LEG_AND_FAULT
@STREAM
@PATHS
async def test_another_server_takes_over_before_the_first_byte(
    *, leg: str, how: str, trouble: dict[str, Any], path: str, stream: bool
) -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt(leg, **trouble)
        told = await site.ask(path, BODIES[path](stream=stream))
        assert told.status == 200
        assert b'"error":{' not in told.raw
        first, second = attempts_in(site)
        assert leg in first[2]
        assert leg not in second[2]
        assert first[0] != second[0]


@LEG_AND_FAULT
@STREAM
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/messages"])
async def test_without_another_server_the_client_is_told_soon(
    *, leg: str, how: str, trouble: dict[str, Any], path: str, stream: bool
) -> None:
    async with standing(PAIR) as site:
        site.hurt(leg, **trouble)
        told = await site.ask(path, BODIES[path](stream=stream))
        if how == "hangs":
            assert (told.status, told.code) == (504, "upstream_timeout")
            assert told.took_s < 3 * QUICK.timeouts.first_token_online_s + 1
        else:
            assert told.code in ("upstream_failed", "upstream_overloaded")
            assert told.status == {"upstream_failed": 502, "upstream_overloaded": 503}[told.code]
            assert told.took_s < 0.2
        rooms = [room for _, room, _ in attempts_in(site)]
        assert len(set(rooms)) == QUICK.retry.online_attempts


@pytest.mark.parametrize("how", ["answers-503", "fails-in-band"])
async def test_an_overloaded_server_is_named_as_such(how: str) -> None:
    async with standing() as site:
        site.hurt("d1", **EARLY[how])
        told = await site.ask("/generate", generate())
        assert told.code == "upstream_overloaded"
        assert told.headers["Retry-After"] == "1"


def ends_in_an_error(path: str, told: Told) -> object:
    """Each protocol has its own way to say that the rest will not come."""
    events = told.events
    match path:
        case "/v1/messages":
            return events[-1]["type"] == "error" and b"event: error\n" in told.raw
        case "/v1/responses":
            return events[-1]["type"] == "error" and events[-1]["code"] == "stream_interrupted"
        case _:
            return events[-1] == "[DONE]" and "error" in events[-2]


@LATE_FAULT
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"]
)
async def test_a_stream_that_cannot_be_resumed_ends_in_its_protocols_way(
    how: str, path: str
) -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt("d1", **LATE[how])
        told = await site.ask(path, BODIES[path](20, stream=True))
        assert ends_in_an_error(path, told)
        assert b"stream_interrupted" in told.raw
        assert b"\xff" not in told.raw
        assert len(attempts_in(site)) == 1


@LATE_FAULT
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_a_whole_answer_is_made_anew_whenever_its_decode_server_fails(
    how: str, path: str
) -> None:
    async with standing(TWO_PAIRS, timeouts=Timeouts(total_s=4.0)) as site:
        site.hurt("d1", **LATE[how])
        told = await site.ask(path, BODIES[path](20))
        assert told.status == 200
        # Nobody can tell a long answer from a hung one until the time for it is over.
        assert told.took_s < (5 if how == "hangs" else 0.3)


@STREAM
@pytest.mark.parametrize("leg", ["p1", "d1"])
async def test_a_slow_server_is_waited_for(*, leg: str, stream: bool) -> None:
    async with standing() as site:
        site.hurt(leg, FaultKind.SLOW, factor=20.0)
        told = await site.ask("/v1/chat/completions", chat(stream=stream))
        assert told.status == 200
        assert len(attempts_in(site)) == 1


@STREAM
@PATHS
@pytest.mark.parametrize("leg", ["p1", "d1"])
async def test_a_refusal_of_the_request_is_passed_on_and_counts_against_nobody(
    *, leg: str, path: str, stream: bool
) -> None:
    async with standing() as site:
        for _ in range(4):
            site.hurt(leg, FaultKind.ERROR_STATUS, status=400, message="too long", requests=1)
            told = await site.ask(path, BODIES[path](stream=stream))
            assert (told.status, told.code) == (400, "upstream_rejected")
            assert "too long" in told.body["error"]["message"]
        assert len(attempts_in(site)) == 4
        assert all(ledger.breaker.is_closed for ledger in site.core.ledgers.values())


@pytest.mark.parametrize("how", [*EARLY, *EARLY_AT_DECODE])
async def test_a_unified_server_that_fails_is_replaced_too(how: str) -> None:
    async with standing((*UNIFIED, spec("u2", Role.UNIFIED))) as site:
        site.hurt("u1", **(EARLY | EARLY_AT_DECODE)[how])
        told = await site.ask("/generate", generate(stream=True))
        assert told.status == 200
        assert [sent.worker for sent in site.sent] == ["u1", "u2"]


async def test_a_prefill_server_that_dies_with_its_process_frees_the_decode_leg_at_once() -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt("p1", FaultKind.SLOW, factor=100.0)
        asking = site.ask("/v1/chat/completions", chat(stream=True))
        async with site.meanwhile(asking) as answer:
            await site.until("the prompt is being computed", lambda: len(site.sent) == 2)
            await site.fleet.kill("p1")
            told = await answer
        assert told.status == 200
        assert told.took_s < 1.0


async def test_a_decode_server_that_dies_with_its_process_frees_the_prefill_leg_at_once() -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt("p1", FaultKind.SLOW, factor=100.0)
        asking = site.ask("/v1/chat/completions", chat(stream=True))
        async with site.meanwhile(asking) as answer:
            await site.until("the prompt is being computed", lambda: len(site.sent) == 2)
            await site.fleet.kill("d1")
            await site.until("the other is asked", lambda: len(site.sent) == 4, within_s=0.1)
            assert (await answer).status == 200
        assert {sent.worker for sent in site.sent[2:]} == {"p1", "d2"}


async def test_answers_to_samples_that_do_not_fit_together_are_an_error_not_a_wait() -> None:
    async with standing(UNIFIED) as site:
        site.hurt("u1", FaultKind.ERROR_STATUS, status=200, body='{"choices": 5}')
        told = await site.ask("/v1/chat/completions", chat(n=2))
        assert (told.status, told.code) == (502, "upstream_failed")


@STREAM
async def test_the_first_sample_that_fails_ends_the_others(*, stream: bool) -> None:
    async with standing() as site:
        site.hurt("d1", FaultKind.ERROR_STATUS, status=500, requests=3)
        told = await site.ask("/v1/chat/completions", chat(200, n=3, stream=stream))
        assert told.status == 200 or told.code == "upstream_failed"
        assert told.took_s < 3
