"""Everything at once: faults, deaths, role switches, reloads and impatient clients.

Whatever happens, each request ends, each answer is one that its protocol knows, a stream that ends
well is complete, and nothing is left of any of them.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from backends.emulator import FaultKind
from gateway.config import Online, Policies
from policies.types import Role
from tests.gateway.gateway_under_test import (
    BODIES,
    OFFLINE,
    QUICK,
    RawClient,
    Site,
    Told,
    spec,
    standing,
)

SPECS = (
    spec("p1", Role.PREFILL),
    spec("p2", Role.PREFILL),
    spec("d1", Role.DECODE, max_running=6),
    spec("d2", Role.DECODE, max_running=6),
    spec("u1", Role.UNIFIED, max_running=4),
)
NAMES = [one.engine.name for one in SPECS]
REQUESTS = 60
STATUSES = {200, 429, 499, 502, 503, 504}


def a_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(list(BODIES))
    body = BODIES[path](rng.choice((1, 5, 40, 200)), stream=rng.random() < 0.6)
    if path in ("/v1/chat/completions", "/v1/completions") and rng.random() < 0.3:
        body["n"] = rng.randint(2, 3)
    if path == "/generate" and rng.random() < 0.3:
        body["text"] = "word " * rng.choice((200, 2_000))
    if path == "/v1/completions" and rng.random() < 0.4:
        body["return_token_ids"] = True
    return path, body


def final(told: Told) -> Any:
    """Ids and text of a native answer, streamed or not; None where it is not complete."""
    last = told.events[-2] if told.events else told.body
    if "meta_info" not in last or last["meta_info"]["finish_reason"]["type"] == "abort":
        return None
    return last["output_ids"], last["text"]


async def one_client(
    site: Site, rng: random.Random, told: list[Told], answers: dict[str, Any]
) -> None:
    await asyncio.sleep(rng.uniform(0, 6))
    path, body = a_body(rng)
    headers = OFFLINE if rng.random() < 0.4 else {}
    if path == "/generate" and rng.random() < 0.2:
        body["rid"] = f"r{rng.random()}"
        async with site.meanwhile(site.ask(path, body, headers)) as answer:
            await asyncio.sleep(rng.uniform(0, 0.5))
            await site.ask("/abort_request", {"rid": body["rid"]})
            told.append(await answer)
    elif rng.random() < 0.25:
        client = await RawClient.connect(site)
        client.post(path, body, more="".join(f"{k}: {v}\r\n" for k, v in headers.items()))
        await asyncio.sleep(rng.uniform(0, 0.5))
        client.vanish()
    else:
        told.append(await site.ask(path, body, headers))
        if path == "/generate" and told[-1].status == 200 and (answer := final(told[-1])):
            answers[json.dumps(body)] = answer


async def trouble(site: Site, rng: random.Random) -> None:
    """Eight seconds of it, then everything is whole again."""
    kinds = [kind for kind in FaultKind if kind is not FaultKind.SLOW]
    for _ in range(40):
        await asyncio.sleep(0.2)
        name = rng.choice(NAMES)
        match rng.randrange(8):
            case 0 if site.fleet[name].engine.alive:
                await site.fleet.kill(name)
            case 1 | 2:
                await revive(site)
            case 3:
                policies = Policies(
                    order=rng.choice(("edf", "fcfs")),
                    place=rng.choice(("least-work", "round-robin")),
                    pools=rng.choice(("none", "latency")),
                )
                workers = tuple(w for w in site.config.worker if rng.random() < 0.9)
                site.gateway.adopt(replace(site.config, policies=policies, worker=workers))
            case _:
                kind, after = rng.choice(kinds), rng.choice((0, 3, 20))
                site.hurt(name, kind, after_tokens=after, requests=rng.randint(1, 3))
    for name in NAMES:
        site.heal(name)
    await revive(site)
    site.gateway.adopt(site.config)


async def revive(site: Site) -> None:
    for name in NAMES:
        if not site.fleet[name].engine.alive:
            await site.fleet.restart(name)


def is_whole(told: Told) -> bool:
    """A stream that says that it is complete has no error in it, and the other way round."""
    if b"text/event-stream" not in told.headers["content-type"].encode():
        return told.status != 200 or isinstance(told.body, dict | list)
    ended = told.raw.endswith((b"data: [DONE]\n\n", b'"type":"message_stop"}\n\n'))
    ended = ended or b"response.incomplete" in told.raw or b"event: error" in told.raw
    return ended and b"\xff" not in told.raw


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_every_request_ends_and_nothing_is_left(seed: int) -> None:
    rng = random.Random(seed)
    classes = replace(QUICK.classes, online=Online(ttft_ms=1_000.0))
    async with standing(SPECS, classes=classes) as site:
        told: list[Told] = []
        answers: dict[str, Any] = {}
        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            tasks.create_task(trouble(site, random.Random(seed)))
            for _ in range(REQUESTS):
                tasks.create_task(one_client(site, random.Random(rng.random()), told, answers))
        assert {one.status for one in told} <= STATUSES
        assert all(map(is_whole, told))
        assert sum(one.status == 200 for one in told) > len(told) / 4
        assert await site.nothing_left() == []
        await site.serves(within_s=5.0)
        await asyncio.sleep(6.5)
        for body, answer in answers.items():
            undisturbed = await site.ask("/generate", body.encode())
            assert final(undisturbed) == answer
