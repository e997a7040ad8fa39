"""A stream whose decode server fails goes on elsewhere, and its client cannot tell."""

from __future__ import annotations

from typing import Any

import pytest

from backends.emulator import FaultKind
from policies.types import Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    QUICK,
    TWO_PAIRS,
    Site,
    Told,
    completion,
    generate,
    spec,
    standing,
)

INCREMENTAL = tuple(
    spec(name, role, incremental=True)
    for name, role in (
        ("p1", Role.PREFILL),
        ("d1", Role.DECODE),
        ("p2", Role.PREFILL),
        ("d2", Role.DECODE),
    )
)
FLEETS = {"cumulative": TWO_PAIRS, "incremental": INCREMENTAL}
BREAKS: dict[str, FaultKind] = {
    "dies": FaultKind.DIE_AFTER,
    "hangs": FaultKind.HANG_AFTER,
    "fails-in-band": FaultKind.IN_BAND,
    "truncates": FaultKind.TRUNCATE,
    "corrupts": FaultKind.CORRUPT,
}
TOKENS = 40
AFTER = (1, 7, 38)


def native(told: Told, fleet: str) -> tuple[list[int], str, Any]:
    """Ids, text and the end, as a client of that kind of server puts them together."""
    events = [event for event in told.events if event != "[DONE]"]
    last = events[-1]["meta_info"]
    if fleet == "cumulative":
        return events[-1]["output_ids"], events[-1]["text"], last["finish_reason"]
    ids = [token for event in events for token in event["output_ids"]]
    return ids, "".join(event["text"] for event in events), last["finish_reason"]


def completed(told: Told) -> tuple[list[int], str, Any]:
    choices = [c for event in told.events if event != "[DONE]" for c in event["choices"]]
    ids = [token for choice in choices for token in choice.get("token_ids") or []]
    text = "".join(choice["text"] for choice in choices)
    return ids, text, choices[-1]["finish_reason"]


def rooms(site: Site) -> list[int]:
    return list(dict.fromkeys(sent.body["bootstrap_room"] for sent in site.sent))


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("fleet", FLEETS)
async def test_a_generate_stream_goes_on_as_if_nothing_had_been(
    fleet: str, how: str, after: int
) -> None:
    async with standing(FLEETS[fleet]) as site:
        body = generate(TOKENS, stream=True)
        undisturbed = await site.ask("/generate", body)
        site.sent.clear()
        site.hurt("d1", BREAKS[how], after_tokens=after)
        told = await site.ask("/generate", body)
        assert native(told, fleet) == native(undisturbed, fleet)
        assert told.events[-1] == "[DONE]"
        assert len(rooms(site)) == 2
        assert len({event["meta_info"]["id"] for event in told.events[:-1]}) == 1


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("how", BREAKS)
async def test_a_completion_with_token_ids_goes_on_as_if_nothing_had_been(
    how: str, after: int
) -> None:
    async with standing(TWO_PAIRS) as site:
        body = completion(TOKENS, stream=True, return_token_ids=True)
        undisturbed = await site.ask("/v1/completions", body)
        site.hurt("d1", BREAKS[how], after_tokens=after)
        told = await site.ask("/v1/completions", body)
        assert completed(told) == completed(undisturbed)
        assert told.events[-1] == "[DONE]"
        assert len(completed(told)[0]) == TOKENS


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("fleet", FLEETS)
async def test_an_offline_whole_answer_is_resumed_from_its_last_token(fleet: str, how: str) -> None:
    async with standing(FLEETS[fleet]) as site:
        undisturbed = await site.ask("/generate", generate(TOKENS), OFFLINE)
        site.sent.clear()
        site.hurt("d1", BREAKS[how], after_tokens=20)
        told = await site.ask("/generate", generate(TOKENS), OFFLINE)
        for key in ("text", "output_ids"):
            assert told.body[key] == undisturbed.body[key]
        assert told.body["meta_info"]["completion_tokens"] == TOKENS
        last = site.sent[-1].body
        assert len(last["input_ids"]) >= 20
        assert last["sampling_params"]["max_new_tokens"] <= TOKENS - 18


async def test_a_stream_survives_the_death_of_two_servers() -> None:
    fleet = (*TWO_PAIRS, spec("d3", Role.DECODE))
    async with standing(fleet) as site:
        body = generate(TOKENS, stream=True)
        undisturbed = await site.ask("/generate", body)
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=5)
        site.hurt("d2", FaultKind.DIE_AFTER, after_tokens=5)
        told = await site.ask("/generate", body)
        assert native(told, "cumulative") == native(undisturbed, "cumulative")


async def test_a_resumed_stream_keeps_its_clients_own_id() -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=5)
        told = await site.ask("/generate", generate(TOKENS, stream=True, rid="my-own"))
        assert {event["meta_info"]["id"] for event in told.events[:-1]} == {"my-own"}
        assert {sent.body["rid"] for sent in site.sent}.isdisjoint({"my-own"})


async def test_a_long_stream_is_resumed_long_after_its_first_token_was_due() -> None:
    """Its patience is for waiting; while it was served it did not wait."""
    async with standing(TWO_PAIRS) as site:
        body = generate(1_900, stream=True)
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=1_700)
        told = await site.ask("/generate", body)
        assert told.took_s > QUICK.classes.online.patience * QUICK.classes.online.ttft_ms / 1000
        assert len(native(told, "cumulative")[0]) == 1_900


async def test_input_ids_need_no_tokenizer_to_be_resumed() -> None:
    async with standing(TWO_PAIRS) as site:
        body = {k: v for k, v in generate(TOKENS, stream=True).items() if k != "text"}
        body["input_ids"] = [2000, 2001, 2002]
        undisturbed = await site.ask("/generate", body)
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=5)
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500, path="/v1/tokenize")
        told = await site.ask("/generate", body)
        assert native(told, "cumulative") == native(undisturbed, "cumulative")


async def test_a_tokenizer_that_fails_costs_an_attempt_and_no_more() -> None:
    async with standing(TWO_PAIRS) as site:
        body = generate(TOKENS, stream=True)
        undisturbed = await site.ask("/generate", body)
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=5, requests=1)
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500, path="/v1/tokenize", requests=1)
        told = await site.ask("/generate", body)
        assert native(told, "cumulative") == native(undisturbed, "cumulative")


@pytest.mark.parametrize("how", ["hangs", "dies"])
async def test_a_client_that_leaves_while_a_tokenizer_is_asked_leaves_nothing(how: str) -> None:
    kind = {"hangs": FaultKind.HANG, "dies": FaultKind.REFUSE}[how]
    async with standing(TWO_PAIRS) as site:
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=5)
        for name in ("p1", "p2"):
            site.hurt(name, kind, path="/v1/tokenize")
        asking = site.ask("/generate", generate(TOKENS, stream=True))
        async with site.meanwhile(asking):
            await site.until("it broke", lambda: not site.fleet["d1"].engine.residents)
        assert await site.nothing_left(within_s=1.0) == []


async def test_a_tokenizer_that_hangs_is_given_up() -> None:
    async with standing(TWO_PAIRS) as site:
        body = generate(TOKENS, stream=True)
        undisturbed = await site.ask("/generate", body)
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=5, requests=1)
        site.hurt("p1", FaultKind.HANG, path="/v1/tokenize", requests=1)
        told = await site.ask("/generate", body)
        assert native(told, "cumulative") == native(undisturbed, "cumulative")
        assert told.took_s < QUICK.timeouts.first_token_online_s + 1


MIXED = {
    "from-cumulative-to-incremental": (*TWO_PAIRS[:3], INCREMENTAL[3]),
    "from-incremental-to-cumulative": (*INCREMENTAL[:3], TWO_PAIRS[3]),
}


@pytest.mark.parametrize("fleet", MIXED)
async def test_a_whole_answer_is_read_in_the_way_of_the_server_that_gave_it(fleet: str) -> None:
    """The first server refuses before its first token, the next one streams otherwise."""
    async with standing(MIXED[fleet]) as site:
        undisturbed = await site.ask("/generate", generate(TOKENS), OFFLINE)
        site.hurt("d1", FaultKind.REFUSE)
        told = await site.ask("/generate", generate(TOKENS), OFFLINE)
        assert site.lines[-1]["attempts"] == 2
        for key in ("text", "output_ids"):
            assert told.body[key] == undisturbed.body[key]


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("fleet", MIXED)
async def test_a_server_that_streams_otherwise_goes_on_in_the_first_ones_way(
    fleet: str, after: int
) -> None:
    way = fleet.split("-")[1]
    async with standing(MIXED[fleet]) as site:
        body = generate(TOKENS, stream=True)
        undisturbed = await site.ask("/generate", body)
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=after)
        told = await site.ask("/generate", body)
        assert native(told, way) == native(undisturbed, way)


@pytest.mark.parametrize("after", range(8, 14))
@pytest.mark.parametrize("fleet", FLEETS)
async def test_a_stop_string_across_the_seam_ends_the_stream(fleet: str, after: int) -> None:
    async with standing(FLEETS[fleet]) as site:
        free = generate(TOKENS, stream=True)
        _, text, _ = native(await site.ask("/generate", free), fleet)
        words = text.split()
        free["sampling_params"]["stop"] = [f"{words[10][1:]} {words[11][:2]}"]
        undisturbed = await site.ask("/generate", free)
        site.hurt("d1", FaultKind.DIE_AFTER, after_tokens=after)
        told = await site.ask("/generate", free)
        assert native(told, fleet)[1:] == native(undisturbed, fleet)[1:]
        assert await site.nothing_left(within_s=0.2) == []
