"""A preempted request goes on as if nothing had been, and its client sees a pause at most."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from backends.emulator import ServerSpec
from policies.events import Event, Finished, Preempted, Recall
from policies.types import Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    PAIR,
    TWO_PAIRS,
    UNIFIED,
    Site,
    Told,
    chat,
    completion,
    generate,
    spec,
    standing,
)

TOKENS = 60
INCREMENTAL = (
    spec("p1", Role.PREFILL, incremental=True),
    spec("d1", Role.DECODE, incremental=True),
)
FLEETS: dict[str, Sequence[ServerSpec]] = {
    "a pair": PAIR,
    "two pairs": TWO_PAIRS,
    "a unified server": UNIFIED,
    "servers that stream increments": INCREMENTAL,
}


def job_ids(site: Site) -> list[str]:
    return list(site.gateway.backend._live)


def recall_all(site: Site) -> None:
    for job_id in job_ids(site):
        site.gateway.driver.post(Recall(job_id))


async def preempted(site: Site, path: str, body: dict[str, Any], when_s: Sequence[float]) -> Told:
    """The request's answer when it is preempted at each of these times after it was asked."""
    loop = asyncio.get_running_loop()
    timers = [loop.call_later(after_s, recall_all, site) for after_s in when_s]
    told = await site.ask(path, body, OFFLINE)
    for timer in timers:
        timer.cancel()
    return told


def preemptions(site: Site) -> int:
    return int(site.lines[-1]["preemptions"])


def whole(told: Told) -> tuple[Any, ...]:
    meta = told.body["meta_info"]
    return (
        *(told.body["output_ids"], told.body["text"], meta["finish_reason"]),
        *(meta["prompt_tokens"], meta["completion_tokens"]),
    )


def streamed(told: Told) -> tuple[Any, ...]:
    """What a client of either kind of stream ends up with."""
    events = [event for event in told.events if event != "[DONE]"]
    assert told.events[-1] == "[DONE]"
    ids, text = events[-1]["output_ids"], events[-1]["text"]
    if len(ids) < TOKENS:
        ids = [token for event in events for token in event["output_ids"]]
        text = "".join(event["text"] for event in events)
    meta = events[-1]["meta_info"]
    return ids, text, meta["finish_reason"], meta["prompt_tokens"], meta["completion_tokens"]


def points(seed: int, count: int, took_s: float) -> list[float]:
    rng = random.Random(seed)
    return sorted(rng.uniform(0.0, 0.9 * took_s) for _ in range(count))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fleet", FLEETS)
async def test_an_offline_stream_ends_with_the_tokens_of_an_undisturbed_run(
    fleet: str, seed: int, count: int
) -> None:
    async with standing(FLEETS[fleet]) as site:
        body = generate(TOKENS, stream=True)
        undisturbed = await site.ask("/generate", body, OFFLINE)
        told = await preempted(site, "/generate", body, points(seed, count, undisturbed.took_s))
        assert streamed(told) == streamed(undisturbed)
        assert preemptions(site) == count


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fleet", FLEETS)
async def test_an_offline_whole_answer_has_the_tokens_of_an_undisturbed_run(
    fleet: str, seed: int, count: int
) -> None:
    async with standing(FLEETS[fleet]) as site:
        undisturbed = await site.ask("/generate", generate(TOKENS), OFFLINE)
        when_s = points(seed, count, undisturbed.took_s)
        told = await preempted(site, "/generate", generate(TOKENS), when_s)
        assert whole(told) == whole(undisturbed)
        assert preemptions(site) == count


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fleet", FLEETS)
async def test_what_the_core_hears_of_the_attempts_adds_up_to_the_answer(
    fleet: str, *, stream: bool
) -> None:
    heard: list[Event] = []
    async with standing(FLEETS[fleet]) as site:
        site.gateway.driver.listen = lambda _, event: heard.append(event)
        await preempted(site, "/generate", generate(TOKENS, stream=stream), points(1, 3, 1.0))
        assert site.lines[-1]["tokens"] == TOKENS
    assert sum(it.generated for it in heard if isinstance(it, Preempted | Finished)) == TOKENS


@pytest.mark.parametrize("seed", range(3))
async def test_a_request_that_can_not_go_on_is_made_again(seed: int) -> None:
    body = generate(TOKENS, return_logprob=True)
    async with standing(TWO_PAIRS) as site:
        undisturbed = await site.ask("/generate", body, OFFLINE)
        told = await preempted(site, "/generate", body, points(seed, 1, undisturbed.took_s))
        assert whole(told) == whole(undisturbed)
        assert preemptions(site) == 1


async def test_a_stream_that_can_not_go_on_runs_on_once_its_client_reads() -> None:
    body = chat(TOKENS, stream=True, logprobs=True)
    async with standing(TWO_PAIRS) as site:
        undisturbed = await site.ask("/v1/chat/completions", body, OFFLINE)
        last_s = undisturbed.took_s * 0.9
        told = await preempted(site, "/v1/chat/completions", body, [last_s])
        assert len(told.events) == len(undisturbed.events)
        assert preemptions(site) == 0


async def test_a_completion_with_token_ids_goes_on() -> None:
    body = completion(TOKENS, stream=True, return_token_ids=True)
    async with standing(TWO_PAIRS) as site:
        undisturbed = await site.ask("/v1/completions", body, OFFLINE)
        told = await preempted(site, "/v1/completions", body, [undisturbed.took_s / 2])
        texts = [
            "".join(c["text"] for event in it.events[:-1] for c in event["choices"])
            for it in (told, undisturbed)
        ]
        assert texts[0] == texts[1]
        assert preemptions(site) == 1


async def test_a_preempted_request_is_gone_from_its_servers_within_two_steps() -> None:
    async with standing(PAIR) as site:
        engine = site.fleet["d1"].engine
        step_s = engine.times.decode_s(1, 100)
        async with site.meanwhile(site.ask("/generate", generate(900), OFFLINE)):
            await site.until("it decodes", lambda: engine.machine.batch)
            began_s = site.now_s()
            for worker in ("p1", "d1"):
                site.gateway.core.ledgers[worker].draining = True  # so that it stays away
            recall_all(site)
            await site.until("it is gone", lambda: not engine.residents)
            assert site.now_s() - began_s <= 2 * step_s + 0.02


async def test_an_abort_of_its_own_client_is_not_undone_by_a_preemption() -> None:
    async with standing(PAIR) as site:
        body = generate(900, rid="mine")
        async with site.meanwhile(site.ask("/generate", body, OFFLINE)) as asking:
            await site.until("it decodes", lambda: site.fleet["d1"].engine.machine.batch)
            await site.ask("/abort_request", {"rid": "mine"})
            recall_all(site)
            told = await asking
        assert preemptions(site) == 0
        assert told.body["meta_info"]["finish_reason"]["type"] == "abort"


ONE_SEAT = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, max_running=1))


@pytest.mark.parametrize("way", ["streamed", "whole"])
async def test_an_online_request_takes_the_seat_of_an_offline_one_that_never_notices(
    way: str,
) -> None:
    body = generate(200, stream=way == "streamed")
    async with standing(ONE_SEAT) as site:
        undisturbed = await site.ask("/generate", body, OFFLINE)
        async with site.meanwhile(site.ask("/generate", body, OFFLINE)) as asking:
            await site.until("it decodes", lambda: site.fleet["d1"].engine.machine.batch)
            urgent = await site.ask("/generate", generate(4, text="Quick"))
            assert urgent.took_s < undisturbed.took_s / 4
            told = await asking
        assert told.status == urgent.status == 200
        last = [(it.events[-2] if way == "streamed" else it.body) for it in (told, undisturbed)]
        assert last[0]["output_ids"] == last[1]["output_ids"]
        assert site.lines[-1]["preemptions"] == 1


@pytest.mark.parametrize("given", [{}, {"rid": "mine"}], ids=["no rid", "a rid"])
async def test_the_line_of_a_preemption_names_the_request_as_its_last_line_does(
    given: dict[str, str],
) -> None:
    named = OFFLINE | {"x-request-id": "req-1"}
    async with standing(PAIR) as site:
        with capture_logs() as told:
            async with site.meanwhile(
                site.ask("/generate", generate(50, **given), named)
            ) as asking:
                await site.until("it decodes", lambda: site.fleet["d1"].engine.machine.batch)
                recall_all(site)
                await asking
    (line,) = [one for one in told if one["event"] == "preempted"]
    assert line["request_id"] == site.lines[-1]["request_id"] == "req-1"
    assert line.get("rid") == given.get("rid")


async def test_each_preemption_leaves_a_line_a_count_and_a_header() -> None:
    async with standing(ONE_SEAT) as site:
        with capture_logs() as told:
            async with site.meanwhile(site.ask("/generate", generate(200), OFFLINE)) as asking:
                await site.until("it decodes", lambda: site.fleet["d1"].engine.machine.batch)
                await site.ask("/generate", generate(4))
                answer = await asking
        (line,) = [one for one in told if one["event"] == "preempted"]
        assert (line["reason"], line["worker"], line["times"]) == ("online_decode", "d1", 1)
        assert answer.headers["x-slackwater-preemptions"] == "1"
        metrics = (await site.get("/metrics")).raw.decode()
        count = 'preemptions_total{class="offline",reason="online_decode",worker="d1"} 1.0'
        assert count in metrics
