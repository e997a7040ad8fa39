"""An offline chat that is preempted or loses its server goes on, and its client cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from backends.chat import ChatRoute, Parsing, Turn, route_of, turn_of
from backends.emulator import FaultKind
from backends.sse import DONE
from backends.trouble import Trouble
from gateway.chats import ChatAnswer, sampling_in
from gateway.config import Chat, ConfigError
from policies.types import Resume, Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    TWO_PAIRS,
    Site,
    Told,
    chat,
    events_in,
    spec,
    standing,
)
from tests.gateway.test_preemption import FLEETS, TOKENS, points, preempted, preemptions
from tests.gateway.test_resume import BREAKS

CHAT = "/v1/chat/completions"
BODY = chat(TOKENS, temperature=0, model="emulated")
AS_CHAT = Chat(resume=False)
VOLATILE = ("id", "created")


def deltas(told: Told) -> tuple[str, str, Any, Any]:
    """What a client puts together: text, its end, what matched, and its usage."""
    assert told.events[-1] == "[DONE]"
    events = told.events[:-1]
    choices = [choice for event in events for choice in event["choices"]]
    assert [c["delta"]["role"] for c in choices if c["delta"]["role"]] == ["assistant"]
    assert len({event["id"] for event in events}) == 1
    text = "".join(choice["delta"]["content"] or "" for choice in choices)
    last = choices[-1]
    return text, last["finish_reason"], last["matched_stop"], events[-1].get("usage")


def lasting(told: Told) -> dict[str, Any]:
    return {name: value for name, value in told.body.items() if name not in VOLATILE}


def paths(site: Site) -> set[str]:
    return {sent.path for sent in site.sent}


@pytest.mark.parametrize("fleet", FLEETS)
async def test_a_chat_answered_from_ids_is_the_one_that_the_chat_route_gives(fleet: str) -> None:
    body = BODY | {"stream_options": {"include_usage": True}}
    async with standing(FLEETS[fleet]) as site:
        whole = await site.ask(CHAT, BODY, OFFLINE)
        streamed = await site.ask(CHAT, body | {"stream": True}, OFFLINE)
        assert paths(site) == {"/generate"}
        assert [line["path"] for line in site.lines] == [CHAT, CHAT]
    async with standing(FLEETS[fleet], chat=AS_CHAT) as site:
        assert lasting(await site.ask(CHAT, BODY, OFFLINE)) == lasting(whole)
        assert deltas(await site.ask(CHAT, body | {"stream": True}, OFFLINE)) == deltas(streamed)
        assert paths(site) == {CHAT}


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fleet", FLEETS)
async def test_a_streamed_chat_ends_as_an_undisturbed_one(
    fleet: str, seed: int, count: int
) -> None:
    async with standing(FLEETS[fleet]) as site:
        body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
        undisturbed = await site.ask(CHAT, body, OFFLINE)
        told = await preempted(site, CHAT, body, points(seed, count, undisturbed.took_s))
        assert deltas(told) == deltas(undisturbed)
        assert preemptions(site) == count


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fleet", FLEETS)
async def test_a_whole_chat_ends_as_an_undisturbed_one(fleet: str, seed: int, count: int) -> None:
    async with standing(FLEETS[fleet]) as site:
        undisturbed = await site.ask(CHAT, BODY, OFFLINE)
        told = await preempted(site, CHAT, BODY, points(seed, count, undisturbed.took_s))
        assert lasting(told) == lasting(undisturbed)
        assert preemptions(site) == count


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat_whose_decode_server_fails_goes_on(how: str, *, stream: bool) -> None:
    body = BODY | {"stream": stream}
    async with standing(TWO_PAIRS) as site:
        undisturbed = await site.ask(CHAT, body, OFFLINE)
        site.hurt("d1", BREAKS[how], after_tokens=9)
        told = await site.ask(CHAT, body, OFFLINE)
        read: Callable[[Told], object] = deltas if stream else lasting
        assert read(told) == read(undisturbed)


async def test_a_client_keeps_the_id_that_it_chose() -> None:
    async with standing(TWO_PAIRS) as site:
        told = await site.ask(CHAT, BODY | {"rid": "mine"}, OFFLINE)
        other = await site.ask(CHAT, BODY, OFFLINE)
        assert told.body["id"] == "mine"
        assert other.body["id"].startswith("chatcmpl-")


async def test_a_chat_that_no_template_takes_is_refused_in_the_servers_words() -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, path="/v1/tokenize", status=400, message="no role")
        site.hurt("p2", FaultKind.ERROR_STATUS, path="/v1/tokenize", status=400, message="no role")
        told = await site.ask(CHAT, BODY, OFFLINE)
        assert (told.status, told.code) == (400, "upstream_rejected")
        assert "no role" in told.body["error"]["message"]


async def test_a_tokenizer_that_hangs_is_left_for_another() -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt("p1", FaultKind.HANG, path="/v1/tokenize")
        told = await site.ask(CHAT, BODY, OFFLINE)
        assert told.status == 200
        assert site.lines[-1]["attempts"] == 2


async def test_online_chats_stay_what_they_are() -> None:
    async with standing(TWO_PAIRS) as site:
        await site.ask(CHAT, BODY)
        assert paths(site) == {CHAT}


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"regex": "a+"},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        {"stream_options": {"continuous_usage_stats": True}},
        {"a_field_of_tomorrow": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ],
)
async def test_a_chat_that_ids_would_change_stays_one_and_is_made_again(
    more: dict[str, Any],
) -> None:
    body = BODY | more
    async with standing(TWO_PAIRS) as site:
        undisturbed = await site.ask(CHAT, body, OFFLINE)
        async with site.meanwhile(site.ask(CHAT, body, OFFLINE)):
            await site.until("it is there", lambda: len(site.gateway.core))
            (ticket,) = site.gateway.core._tickets.values()
            assert ticket.job.resume is Resume.RESTART
        told = await preempted(site, CHAT, body, points(0, 1, undisturbed.took_s))
        assert lasting(told) == lasting(undisturbed)
        assert paths(site) == {CHAT}


@pytest.mark.parametrize("known", [True, False])
async def test_why_no_chat_goes_as_ids_is_said_once(*, known: bool) -> None:
    async with standing(TWO_PAIRS) as site:
        for server in site.gateway.backend.servers():
            server.chat = ChatRoute(defaults=None) if known else None
        with capture_logs() as told:
            for _ in range(3):
                await site.ask(CHAT, BODY, OFFLINE)
        (line,) = [one for one in told if one["event"].startswith("offline chats are not")]
        assert ("generation_config" in line["why"]) is known


async def test_what_a_model_fills_in_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_k": 20, "top_p": 0.95}')
    async with standing(TWO_PAIRS, chat=Chat(generation_config=str(path))) as site:
        for server in site.gateway.backend.servers():
            server.chat = ChatRoute(defaults=None)
        await site.ask(CHAT, chat(8), OFFLINE)
        sampling = site.sent[-1].body["sampling_params"]
        assert [sampling[name] for name in ("temperature", "top_k", "min_p")] == [0.6, 20, 0.0]


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_a_generation_config_that_can_not_be_read_is_refused(
    text: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "it.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"chat\.generation_config"):
        sampling_in(str(path))


# What parsers read at the end.

INFO = {"sampling_defaults": "openai"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
THINKING = "<think>hm</think>Sure"
ANSWERS: dict[bytes, dict[str, Any]] = {
    b"/separate_reasoning": {"reasoning_text": "hm", "text": "Sure<call>"},
    b"/parse_function_call": {
        "normal_text": "Sure",
        "calls": [{"tool_index": 0, "name": "weather", "parameters": "{}"}],
    },
}


class Heard:
    """A client, and servers whose parsers always say the same."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.raw = b""
        self.whole: Any = None
        self.ended = False
        self.trouble: list[Trouble] = []
        self.asked: list[tuple[bytes, Any]] = []
        self._deaf = deaf

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        self.whole = orjson.loads(body)

    def begin(self) -> None: ...

    def write(self, piece: bytes) -> bool:
        self.raw += piece
        return False

    def has_room(self) -> bool:
        return True

    def drop(self) -> None: ...

    def end(self) -> None:
        self.ended = True

    def refused(self, decision: object, trouble: Trouble | None) -> None: ...

    def consult(self, path: bytes, body: bytes, then: Callable[[Any], None]) -> None:
        self.asked.append((path, orjson.loads(body)))
        then(None if self._deaf else ANSWERS[path])


def answering(heard: Heard, parsing: Parsing) -> ChatAnswer:
    turn = Turn(asks={}, body={}, parsing=parsing, model="m", usage=False, tells_cached=False)
    return ChatAnswer(
        turn,
        heard,
        increments=lambda: False,
        named=False,
        created=1,
        consult=heard.consult,
        call_id=lambda: "call_1",
        give_up=heard.trouble.append,
    )


def native(text: str, finish: object = None) -> bytes:
    meta = {"id": "a", "finish_reason": finish, "prompt_tokens": 3, "completion_tokens": 2}
    return orjson.dumps({"text": text, "output_ids": [1, 2], "meta_info": meta})


STOP = {"type": "stop", "matched": 2}
BOTH = Parsing(reasoning="qwen3", tools=[TOOL], tool_parser="qwen25")


def test_a_whole_answer_is_parsed_for_reasoning_and_then_for_calls() -> None:
    heard = Heard()
    answering(heard, BOTH).answer(200, "", native(THINKING, STOP))
    (choice,) = heard.whole["choices"]
    assert [path for path, _ in heard.asked] == list(ANSWERS)
    assert heard.asked[1][1]["text"] == "Sure<call>"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Sure",
        "reasoning_content": "hm",
        "tool_calls": [
            {
                "id": "call_1",
                "index": 0,
                "type": "function",
                "function": {"name": "weather", "arguments": "{}"},
            }
        ],
    }
    assert (choice["finish_reason"], choice["matched_stop"]) == ("tool_calls", None)


def test_a_stream_that_has_to_be_parsed_says_nothing_before_its_end() -> None:
    heard = Heard()
    answer = answering(heard, BOTH)
    answer.write(b"data: " + native("<think>h") + b"\n\n")
    answer.write(b"data: " + native(THINKING, STOP) + b"\n\n")
    (role,) = events_in(heard.raw)
    assert role["choices"][0]["delta"]["content"] == ""
    answer.end()
    told = events_in(heard.raw)
    said = [event["choices"][0]["delta"] for event in told[1:-2]]
    assert [d["reasoning_content"] or d["content"] or d["tool_calls"][0]["id"] for d in said] == [
        *("hm", "Sure", "call_1"),
    ]
    assert heard.raw.endswith(DONE)
    assert heard.ended


def test_without_a_server_that_parses_the_client_is_told() -> None:
    heard = Heard(deaf=True)
    answering(heard, BOTH).answer(200, "", native(THINKING, STOP))
    assert heard.whole is None
    assert [trouble.status for trouble in heard.trouble] == [502]


# Which chats are the same as their ids.


@pytest.mark.parametrize(
    ("info", "model_type", "known"),
    [
        ({}, "llama", True),
        ({"reasoning_parser": "deepseek-r1"}, "deepseek_v3", True),
        ({"reasoning_parser": "kimi_k2"}, "llama", False),
        ({"tool_call_parser": "qwen25"}, "qwen2", True),
        ({"tool_call_parser": "glm47"}, "glm4_moe", False),
        ({"chat_template": "chatml"}, "llama", False),
        ({"chat_template": "own.jinja"}, "llama", True),
        ({}, "gpt_oss", False),
        ({}, None, False),
    ],
)
def test_a_server_is_known_by_its_parsers_and_its_model(
    info: dict[str, Any], model_type: str | None, *, known: bool
) -> None:
    assert (route_of(INFO | info, {"model_type": model_type}) is not None) is known


@pytest.mark.parametrize(
    ("defaults", "body", "known"),
    [
        ("openai", {}, True),
        ("model", {}, False),
        ("model", {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0}, False),
        ("model", dict.fromkeys(("temperature", "top_p", "top_k", "min_p"), 1), False),
    ],
)
def test_sampling_that_is_left_to_the_model_has_to_be_known(
    defaults: str, body: dict[str, Any], *, known: bool
) -> None:
    route = route_of({"sampling_defaults": defaults}, {"model_type": "llama"})
    assert route is not None
    asked = chat() | body
    assert (turn_of(asked, route, None) is not None) is known
    told = turn_of(asked, route, {"temperature": 0.6})
    assert told is not None
    given = told.body["sampling_params"]["temperature"]
    assert given == body.get("temperature", 1.0 if defaults == "openai" else 0.6)
    assert turn_of(asked, route, {"repetition_penalty": 1.05}) is None or defaults == "openai"


@pytest.mark.parametrize(("thinks", "parser"), [(True, "qwen3-thinking"), (False, "qwen3")])
def test_a_parser_that_depends_on_the_request_is_told_what_it_says(
    parser: str, *, thinks: bool
) -> None:
    route = route_of(INFO | {"reasoning_parser": "qwen3"}, {"model_type": "qwen3"})
    assert route is not None
    assert turn_of(chat(), route, None) is None
    turn = turn_of(chat(chat_template_kwargs={"enable_thinking": thinks}), route, None)
    assert turn is not None
    assert turn.parsing == Parsing(reasoning=parser)


async def test_a_fleet_that_does_not_agree_is_asked_for_chats() -> None:
    async with standing((spec("u1", Role.UNIFIED), spec("u2", Role.UNIFIED))) as site:
        servers = list(site.gateway.backend.servers())
        assert site.gateway.backend.chat_route("") == servers[0].chat is not None
        servers[1].chat = None
        assert site.gateway.backend.chat_route("") is None
