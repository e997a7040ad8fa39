"""Requests that name a model, before servers whose models are not known yet, or never are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from backends.emulator import FaultKind
from policies.types import Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    UNIFIED,
    Site,
    chat,
    entry_of,
    spec,
    spy_on,
    standing,
)

CHAT = "/v1/chat/completions"
TWO_MODELS = (*UNIFIED, spec("u2", Role.UNIFIED, model="another"))
CLASSES = pytest.mark.parametrize("headers", [{}, OFFLINE], ids=["online", "offline"])


async def add(site: Site, name: str) -> None:
    entry = entry_of(site.fleet[name])
    told = await site.ask(
        "/workers", {"url": entry.url, "name": name, "worker_type": entry.role.value}
    )
    assert told.status == 202
    spy_on(site.gateway, site)


@asynccontextmanager
async def beside_a_silent_one() -> AsyncIterator[Site]:
    """The gateway knows the model of u1; u2, which has another, is down."""
    async with standing(TWO_MODELS, workers=["u1"]) as site:
        await site.fleet["u2"].kill()
        await add(site, "u2")
        yield site


async def test_no_server_of_another_model_answers_for_one_that_is_down() -> None:
    async with beside_a_silent_one() as site:
        told = await site.ask(CHAT, chat(model="another"))
        assert (told.status, told.code) == (503, "workers_unavailable")
        assert site.sent == []


async def test_what_is_passed_on_goes_to_no_server_of_another_model() -> None:
    async with beside_a_silent_one() as site:
        told = await site.ask("/v1/embeddings", {"input": "a", "model": "another"})
        assert (told.status, told.code) == (503, "workers_unavailable")


async def test_offline_work_waits_for_the_server_of_its_model() -> None:
    async with beside_a_silent_one() as site:
        async with site.meanwhile(site.ask(CHAT, chat(model="another"), OFFLINE)) as asked:
            await site.until("it waits", lambda: len(site.core))
            await site.fleet["u2"].restart()
            assert (await asked).status == 200
        assert {one.worker for one in site.sent} == {"u2"}


async def test_offline_work_for_a_model_that_nobody_turns_out_to_have_does_not_hang() -> None:
    async with beside_a_silent_one() as site:
        async with site.meanwhile(site.ask(CHAT, chat(model="gpt-17"), OFFLINE)) as asked:
            await site.until("it waits", lambda: len(site.core))
            await site.fleet["u2"].restart()
            told = await asked
            assert (told.status, told.code) == (503, "no_worker")
            assert told.took_s < 20.0
        told = await site.ask(CHAT, chat(model="gpt-17"), OFFLINE)
        assert (told.status, told.code) == (404, "unknown_model")


@CLASSES
@pytest.mark.parametrize("model", ["emulated", "default", "mine"])
async def test_a_server_that_never_names_its_model_takes_any(
    model: str, headers: dict[str, str]
) -> None:
    async with standing(UNIFIED, workers=[]) as site:
        site.hurt("u1", FaultKind.ERROR_STATUS, path="/v1/models", status=404)
        await add(site, "u1")
        await site.until("it is known", lambda: site.core.ledgers["u1"].up)
        assert site.gateway.backend.models == {""}
        told = await site.ask(CHAT, chat(model=model, temperature=0), headers)
        assert told.status == 200
        # Offline chats are asked for as token ids there, too.
        assert site.sent[-1].path == ("/generate" if headers else CHAT)


@CLASSES
async def test_a_request_that_names_no_model_goes_to_any_server(headers: dict[str, str]) -> None:
    async with beside_a_silent_one() as site:
        assert (await site.ask(CHAT, chat(), headers)).status == 200
        assert {one.worker for one in site.sent} == {"u1"}
