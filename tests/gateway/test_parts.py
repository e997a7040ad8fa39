"""Long prompts in parts through the whole gateway: what servers are sent, what clients are told."""

from __future__ import annotations

from typing import Any

import pytest

from backends.emulator import FaultKind
from backends.exchange import Exchange
from backends.parts import Nobody, known_ids, part_of, question
from gateway.config import Policies
from policies.types import Role
from tests.gateway.gateway_under_test import Site, Told, generate, spec, standing

CHUNK_TOKENS = 64
PAIR = (
    spec("p1", Role.PREFILL, chunk_tokens=CHUNK_TOKENS),
    spec("d1", Role.DECODE, chunk_tokens=CHUNK_TOKENS),
)
SLICED = Policies(displace="slices")
IDS = list(range(300, 600))
TEXT = "Once upon a time there was a gateway. " * 40
CHAT = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 8, "ignore_eos": True}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ids": ("/generate", generate(8, text="") | {"input_ids": IDS}),
    "text": ("/generate", generate(8, text=TEXT)),
    "completion": ("/v1/completions", {"prompt": TEXT, "max_tokens": 8, "ignore_eos": True}),
    "chat": ("/v1/chat/completions", CHAT),
}
BODIES["ids"][1].pop("text")


def parts(site: Site, name: str = "p1") -> list[int]:
    """The length of each request of one token to a server."""
    return [
        len(sent.body["input_ids"])
        for sent in site.sent_to(name)
        if sent.body.get("sampling_params", {}).get("max_new_tokens") == 1
    ]


def said(told: Told, path: str) -> Any:
    if path == "/generate":
        return told.body["text"], told.body["meta_info"]["prompt_tokens"]
    (choice,) = told.body["choices"]
    return choice.get("text") or choice["message"]["content"]


@pytest.mark.parametrize("name", BODIES)
async def test_an_answer_is_the_same_whether_its_prompt_went_out_in_parts(name: str) -> None:
    path, body = BODIES[name]
    async with standing(PAIR) as site:
        whole = said(await site.ask(path, body), path)
        assert parts(site) == []
    async with standing(PAIR, policies=SLICED) as site:
        assert said(await site.ask(path, body), path) == whole
        lengths = parts(site)
        assert len(lengths) > 2
        assert lengths == [CHUNK_TOKENS * (1 + number) for number in range(len(lengths))]
        assert parts(site, "d1") == lengths, "both legs of each"


async def test_every_part_finds_the_one_before_it_in_the_cache() -> None:
    async with standing(PAIR, policies=SLICED) as site:
        path, body = BODIES["ids"]
        told = await site.ask(path, body)
        # 300 tokens: four parts of 64, and the rest with the job.
        assert parts(site) == [64, 128, 192, 256]
        assert told.body["meta_info"]["cached_tokens"] == 256
        counters = site.fleet["p1"].engine.machine.counters
        assert counters.prefill_uncached_tokens == len(IDS)


async def test_a_stream_shows_nothing_of_its_parts() -> None:
    async with standing(PAIR, policies=SLICED) as site:
        path, body = BODIES["ids"]
        told = await site.ask(path, body | {"stream": True})
        events = [event for event in told.events if event != "[DONE]"]
        assert events[-1]["meta_info"]["completion_tokens"] == 8
        assert len({event["meta_info"]["id"] for event in events}) == 1
        assert len(parts(site)) == 4


async def test_a_part_that_fails_is_tried_again() -> None:
    async with standing(PAIR, policies=SLICED) as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, requests=1)
        path, body = BODIES["ids"]
        told = await site.ask(path, body)
        assert told.status == 200
        assert parts(site)[:3] == [64, 64, 128]


async def test_what_has_no_plain_text_goes_out_whole() -> None:
    content = [{"type": "text", "text": TEXT}]
    body = CHAT | {"messages": [{"role": "user", "content": content}]}
    async with standing(PAIR, policies=SLICED) as site:
        assert (await site.ask("/v1/chat/completions", body)).status == 200
        assert parts(site) == []


async def test_short_prompts_are_not_cut() -> None:
    async with standing(PAIR, policies=SLICED) as site:
        await site.ask("/generate", generate(8) | {"text": "short"})
        assert parts(site) == []


def exchange(dialect: str, **body: Any) -> Exchange:
    path = b"/generate"
    return Exchange(
        job_id="a", path=path, dialect=dialect, body=body, stream=False, client=Nobody()
    )


def test_ids_are_only_a_plain_list_of_them() -> None:
    assert known_ids(exchange("completions", prompt=[5, 6])) == [5, 6]
    for prompt in ("text", ["a", "b"], [[1], [2]]):
        assert known_ids(exchange("completions", prompt=prompt)) is None


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("generate", {"text": "a", "image_data": ["x"]}),
        ("generate", {"text": ["a", "b"]}),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}),
        ("responses", {"input": "a"}),
    ],
)
def test_what_no_server_would_make_the_same_tokens_of_is_not_asked(
    dialect: str, body: dict[str, Any]
) -> None:
    assert question(exchange(dialect, **body)) is None


def test_a_part_keeps_what_names_another_cache() -> None:
    made = part_of(exchange("generate", text="a", cache_salt="s", lora_path="l"), [1, 2, 3], 9)
    assert (made.body["cache_salt"], made.body["lora_path"]) == ("s", "l")
    assert made.body["input_ids"] == [1, 2], "the last token is the job's own"
