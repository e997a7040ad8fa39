"""Several prompts or samples become one answer, and the first failure ends them all."""

from __future__ import annotations

import asyncio

import orjson

from gateway.clients import UnaryClient
from gateway.dialects import Ask, Dialect, Limits, read
from gateway.errors import Code
from gateway.visit import FanOut
from policies.events import Reason, Reject
from tests.gateway.talk import online


def ask(samples: int = 2) -> Ask:
    body = {"model": "m", "prompt": "hello", "n": samples, "max_tokens": 4}
    return read(Dialect.COMPLETIONS, orjson.dumps(body), limits=Limits())


def answer(text: str) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    return orjson.dumps(
        {"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}
    )


def fanned() -> tuple[FanOut, UnaryClient, list[str]]:
    given_up: list[str] = []
    client = UnaryClient(asyncio.get_running_loop())
    return FanOut(ask(), client, 2, lambda: given_up.append("all")), client, given_up


async def test_the_answers_are_one_in_the_order_of_the_question() -> None:
    whole, client, given_up = fanned()
    whole.part(1).answer(200, "application/json", answer("second"))
    assert not client.over.done()
    whole.part(0).answer(200, "application/json", answer("first"))
    choices = orjson.loads(client.body)["choices"]
    assert [(c["index"], c["text"]) for c in choices] == [(0, "first"), (1, "second")]
    assert given_up == []


async def test_the_first_refusal_ends_the_whole_once() -> None:
    whole, client, given_up = fanned()
    for index in (0, 1):
        whole.part(index).refused(Reject(online("a"), Reason.QUEUE_FULL), None)
    assert client.error is not None
    assert (client.error.code, given_up) == (Code.QUEUE_FULL, ["all"])


async def test_an_answer_after_a_refusal_is_not_one() -> None:
    whole, client, _ = fanned()
    whole.part(0).refused(Reject(online("a"), Reason.EXPIRED), None)
    whole.part(1).answer(200, "application/json", answer("late"))
    assert (client.body, client.error is not None) == (b"", True)


async def test_answers_that_do_not_fit_together_are_the_servers_fault() -> None:
    whole, client, _ = fanned()
    whole.part(0).answer(200, "application/json", answer("fine"))
    whole.part(1).answer(200, "application/json", b'{"choices": 5}')
    assert client.error is not None
    assert client.error.code is Code.UPSTREAM_FAILED
