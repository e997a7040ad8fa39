"""Whatever a client sends, it gets a clear 4xx at once, and no server hears of it.

Each site checks on its way out that nothing is left anywhere and that no error was logged.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.emulator import FaultKind
from gateway.config import ConfigError, Key, WorkerEntry
from tests.gateway.gateway_under_test import (
    BODIES,
    PAIR,
    QUICK,
    UNIFIED,
    RawClient,
    Site,
    Told,
    chat,
    code_in,
    completion,
    fault,
    generate,
    standing,
)

PATHS = pytest.mark.parametrize("path", BODIES)


def says_what_is_wrong(path: str, told: Told) -> object:
    """The shape that each protocol's clients parse."""
    error = told.body["error"]
    if path == "/v1/messages":
        return told.body["type"] == "error" and {"type", "message"} <= error.keys()
    wanted = {"message", "type", "code", "param"}
    return wanted <= error.keys() and bool(error["message"])


SHORT = (replace(UNIFIED[0], engine=replace(UNIFIED[0].engine, context_tokens=1000)),)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [5] * 1000}),
        ("/v1/completions", {"prompt": [[5] * 10, [5] * 1000]}),
        ("/v1/completions", {"prompt": "x" * 4 * 4000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 4 * 4000}]}),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": "y" * 16_000}]},
        ),
    ],
)
async def test_a_prompt_that_no_server_takes_is_refused_at_once(
    path: str, body: dict[str, Any]
) -> None:
    async with standing(SHORT) as site:
        site.fleet["u1"].face.faults.add(fault(FaultKind.ERROR_STATUS, status=500))
        told = await site.ask(path, body)
        assert (told.status, told.code) == (400, "context_length_exceeded")
        assert len(site.fleet["u1"].face.faults) == 1  # no server has heard of it


async def test_a_prompt_that_may_fit_is_left_to_the_servers_whose_refusal_has_that_code() -> None:
    async with standing(SHORT) as site:
        longest = {"input_ids": [5] * 998, "sampling_params": {"max_new_tokens": 1}}
        exact = await site.ask("/generate", longest)
        assert exact.status == 200
        told = await site.ask("/v1/completions", {"prompt": "x" * 4 * 1200, "max_tokens": 1})
        assert (told.status, told.code) == (400, "context_length_exceeded")
        assert "context length" in told.body["error"]["message"]


@pytest.mark.parametrize(
    "more", [{"prompt": []}, {"prompt": {}}, {"prompt": [1]}, {"messages": []}], ids=str
)
async def test_fields_of_other_protocols_say_nothing_of_a_prompts_length(
    more: dict[str, Any],
) -> None:
    async with standing(SHORT) as site:
        told = await site.ask("/generate", generate(1, text="x" * 4 * 900) | more)
        assert told.status == 200
        body = {"model": "emulated", "input": "x" * 400, "max_output_tokens": 1, "input_ids": []}
        assert (await site.ask("/v1/responses", body)).status == 200


async def test_where_a_server_does_not_tell_its_limit_nothing_is_refused_for_it() -> None:
    async with standing(SHORT) as site:
        backend = site.gateway.backend
        assert backend.context_tokens == {"": 1000, "emulated": 1000}
        (server,) = backend.servers()
        backend.update(replace(server.worker, context_tokens=0))
        assert backend.context_tokens == {}


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "half-an-object": b'{"text": "a',
    "two-objects": b"{}{}",
    "a-bare-word": b"hello",
    "not-a-number": b'{"text": NaN}',
    "not-utf-8": b'{"text": "\xff\xfe"}',
    "half-a-surrogate": b'{"text": "\\ud800"}',
    "a-nul": b'{"text": \x00}',
    "nested-without-end": b'{"text": ' + b"[" * 100_000,
}
NOT_AN_OBJECT = {"a-list": b"[]", "a-string": b'"text"', "null": b"null", "a-number": b"1e999999"}


@PATHS
@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_body_that_is_no_json_is_named_as_such(path: str, raw: bytes) -> None:
    async with standing() as site:
        told = await site.ask(path, raw)
        assert (told.status, told.code, told.took_s) == (400, "invalid_json", 0.0)
        assert says_what_is_wrong(path, told)
        assert site.sent == []


@pytest.mark.parametrize("raw", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
async def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    async with standing() as site:
        told = await site.ask("/generate", raw)
        assert told.status == 400
        assert told.code in ("invalid_request", "invalid_json")


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "no-prompt": ("/generate", {}),
    "two-prompts": ("/generate", {"text": "a", "input_ids": [1]}),
    "a-number-as-text": ("/generate", generate(text=7)),  # type: ignore[arg-type]
    "an-empty-batch": ("/generate", {"text": []}),
    "a-mixed-batch": ("/generate", {"text": ["a", 1]}),
    "negative-ids": ("/generate", {"input_ids": [-1]}),
    "ids-that-are-no-integers": ("/generate", {"input_ids": [1, True]}),
    "settings-that-are-no-object": ("/generate", {"text": "a", "sampling_params": "hot"}),
    "negative-tokens": ("/generate", generate(-1)),
    "absurdly-many-tokens": ("/generate", generate(10**12)),
    "half-a-token": ("/v1/completions", completion(1) | {"max_tokens": 1.5}),
    "tokens-as-text": ("/v1/chat/completions", chat() | {"max_tokens": "ten"}),
    "an-integer-beyond-64-bits": ("/v1/chat/completions", chat(seed=2**70)),
    "a-stream-that-is-no-flag": ("/v1/chat/completions", chat(stream="yes")),
    "no-sample": ("/v1/chat/completions", chat(n=0)),
    "too-many-samples": ("/v1/chat/completions", chat(n=100_000)),
    "more-drafts-than-samples": ("/v1/completions", completion(best_of=3)),
    "no-messages": ("/v1/chat/completions", {"messages": []}),
    "messages-without-a-role": ("/v1/chat/completions", {"messages": [{"content": "x"}]}),
    "messages-that-are-no-objects": ("/v1/messages", {"messages": ["x"]}),
    "an-input-that-is-no-text": ("/v1/responses", {"input": 5}),
    "a-model-that-is-no-name": ("/v1/chat/completions", chat(model=7)),
    "a-model-with-a-line-break": ("/v1/chat/completions", chat(model="a\r\nb: c")),
    "a-room-of-its-own": ("/generate", generate(bootstrap_room=7)),
    "a-room-of-its-own-in-chat": ("/v1/chat/completions", chat(bootstrap_room=7)),
    "a-bootstrap-host": ("/v1/messages", {"messages": [], "bootstrap_host": "2.2.2.2"}),
    "a-rid-kept-for-probes": ("/generate", generate(rid="HEALTH_CHECK_1")),
    "a-rid-that-is-no-text": ("/generate", generate(rid={"a": 1})),
    "a-rid-with-a-line-break": ("/v1/chat/completions", chat(rid="a\nb")),
    "an-endless-rid": ("/v1/chat/completions", chat(rid="r" * 5_000)),
    "too-few-rids": ("/generate", {"text": ["a", "b"], "rid": ["one"]}),
    "the-same-rid-twice": ("/generate", {"text": ["a", "b"], "rid": ["one", "one"]}),
    "an-unknown-tier": ("/v1/chat/completions", chat(service_tier="royal")),
    "deep-nesting": ("/v1/chat/completions", chat(x=json.loads("[" * 400 + "]" * 400))),
    "a-priority-that-is-no-integer": ("/v1/chat/completions", chat(priority="high")),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_value_that_makes_no_sense_is_refused_at_once(wrong: str) -> None:
    path, body = WRONG[wrong]
    async with standing() as site:
        told = await site.ask(path, body)
        assert (told.status, told.took_s) == (400, 0.0)
        assert says_what_is_wrong(path, told)
        assert site.sent == []


HEADERS: dict[str, tuple[dict[str, str], str]] = {
    "an-unknown-class": ({"x-slackwater-class": "royal"}, "unknown_class"),
    "an-empty-class": ({"x-slackwater-class": ""}, "unknown_class"),
    **{
        f"a-target-of-{value or 'nothing'}": ({"x-slo-ttft-ms": value}, "invalid_request")
        for value in ("nan", "inf", "-inf", "-5", "0", "1e300", "soon", "", "\u0661\u0662 ms")
    },
    "a-token-target-below-zero": ({"x-slo-tpot-ms": "-0.1"}, "invalid_request"),
}


@pytest.mark.parametrize("case", HEADERS)
async def test_a_header_that_makes_no_sense_is_refused_at_once(case: str) -> None:
    headers, code = HEADERS[case]
    async with standing() as site:
        told = await site.ask("/v1/chat/completions", chat(), headers)
        assert (told.status, told.code, told.took_s) == (400, code, 0.0)
        assert site.sent == []


async def test_a_target_that_nobody_can_meet_is_told_when_it_is_missed() -> None:
    async with standing() as site:
        told = await site.ask("/generate", generate(), {"x-slo-ttft-ms": "1e-9"})
        assert told.status in (200, 503)
        assert told.took_s < 0.1


@PATHS
async def test_a_model_that_nobody_has_is_unknown(path: str) -> None:
    async with standing() as site:
        told = await site.ask(path, BODIES[path]() | {"model": "gpt-17"})
        assert (told.status, told.code) == (404, "unknown_model")
        assert "emulated" in told.body["error"]["message"]


@PATHS
async def test_a_body_over_the_limit_is_refused(path: str) -> None:
    async with standing(server=replace(QUICK.server, max_body_mb=0.01)) as site:
        told = await site.ask(path, BODIES[path]() | {"user": "x" * 20_000})
        assert (told.status, told.code) == (413, "body_too_large")
        assert says_what_is_wrong(path, told)


INJECTIONS = ["a\r\nx-evil: 1", "a\nx-evil: 1", "a\r\n\r\nGET / HTTP/1.1", "\x00", "\x1b[31m"]


@pytest.mark.parametrize("value", INJECTIONS)
@pytest.mark.parametrize("name", ["model", "rid", "service_tier", "user"])
async def test_nothing_in_a_body_becomes_a_header(name: str, value: str) -> None:
    async with standing() as site:
        told = await site.ask("/v1/chat/completions", chat() | {name: value})
        assert told.status == (200 if name == "user" else 400)
        assert "x-evil" not in told.headers


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        (b"abc-123", True),
        (b"\xff\xfe", False),
        ("\u00fcber".encode(), False),
        (b"a" * 500, False),
        (b"a\tb", False),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/nowhere", "/workers/none/drain"])
async def test_a_request_id_is_echoed_when_it_can_be(
    given: bytes, *, echoed: bool, path: str
) -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.post(
            path, generate(2), more=f"x-request-id: {given.decode(errors='surrogateescape')}\r\n"
        )
        head = await client.head()
        assert head.split()[1] in (b"200", b"404")
        assert echoed == (b": abc-123\r\n" in head)
        assert head.count(b"\r\n\r\n") == 1


MALFORMED: dict[str, bytes] = {
    "no-http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no-method": b"GARBAGE\r\n\r\n",
    "no-colon": b"POST /generate HTTP/1.1\r\nbad header\r\n\r\n",
    "a-nul-in-a-header": b"POST /generate HTTP/1.1\r\nx-a: \x00\r\n\r\n",
    "an-endless-line": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    "an-endless-header": b"GET / HTTP/1.1\r\nx-a: " + b"a" * 20_000 + b"\r\n\r\n",
    "a-negative-length": b"POST /generate HTTP/1.1\r\ncontent-length: -5\r\n\r\nabcde",
    "two-lengths": b"POST /generate HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    "a-length-and-chunks": b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
    b"transfer-encoding: chunked\r\n\r\nabcde",
    "a-chunk-that-is-none": b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked"
    b"\r\n\r\nzz\r\nabc",
    "a-gzip-that-is-none": b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\n"
    b"content-length: 5\r\nconnection: close\r\n\r\nabcde",
}


@pytest.mark.parametrize("said", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_not_http_is_answered_400_and_closed(said: bytes) -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.say(said)
        told = await client.rest()
        head, _, body = told.partition(b"\r\n\r\n")
        assert head.split()[1:2] == [b"400"]
        assert code_in(json.loads(body)) in ("malformed_http", "invalid_request")
        await site.serves()


async def test_a_key_that_is_no_text_is_a_wrong_key() -> None:
    async with standing(key=(Key(key="secret", tenant="a"),)) as site:
        client = await RawClient.connect(site)
        client.post("/generate", generate(), more="authorization: Bearer \udcff\r\n")
        assert b" 401 " in await client.head()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/generate", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%00", 404),
        ("OPTIONS", "/generate", 405),
        ("DELETE", "/workers/nobody", 404),
        ("POST", "/workers/nobody/drain", 404),
    ],
)
async def test_a_page_that_is_not_there_is_a_clear_4xx(method: str, path: str, status: int) -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.say(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        assert json.loads(body)["error"]["code"] in ("not_found", "method_not_allowed")


WORKERS: dict[str, Any] = {
    "no-url": {},
    "no-http": {"url": "ftp://127.0.0.1:1"},
    "no-host": {"url": "http://"},
    "no-text": {"url": 7},
    "a-query": {"url": "http://127.0.0.1:1/?a=b"},
    "a-password": {"url": "http://user:pass@127.0.0.1:1"},
    "a-broken-address": {"url": "http://[::1"},
    "a-port-beyond": {"url": "http://127.0.0.1:99999"},
    "a-line-break": {"url": "http://127.0.0.1:1/\r\nx: y"},
    "a-name-with-a-line-break": {"url": "http://127.0.0.1:1", "name": "a\r\nb"},
    "a-key-with-a-line-break": {"url": "http://127.0.0.1:1", "api_key": "a\r\nb: c"},
    "a-name-without-end": {"url": "http://127.0.0.1:1", "name": "a" * 1_000},
    "a-host-with-a-line-break": {"url": "http://127.0.0.1:1", "bootstrap_host": "a\r\nb"},
    "a-model-with-a-nul": {"url": "http://127.0.0.1:1", "model": "\0"},
    "an-unknown-key": {"url": "http://127.0.0.1:1", "colour": "red"},
    "an-unknown-role": {"url": "http://127.0.0.1:1", "role": "royal"},
    "a-role-that-is-a-list": {"url": "http://127.0.0.1:1", "role": ["decode"]},
    "an-unknown-type": {"url": "http://127.0.0.1:1", "worker_type": "royal"},
    "a-type-that-is-a-list": {"url": "http://127.0.0.1:1", "worker_type": ["decode"]},
    "a-port-that-is-text": {"url": "http://127.0.0.1:1", "bootstrap_port": "x"},
    "a-list": [1],
}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_the_gateway_itself_is_no_server(host: str) -> None:
    async with standing() as site:
        url = f"http://{host}:{site.gateway.port}"
        told = await site.ask("/workers", {"url": url})
        assert (told.status, told.code) == (400, "invalid_request")
        itself = (*site.config.worker, WorkerEntry(url=url))
        with pytest.raises(ConfigError, match="the gateway's own address"):
            site.gateway.adopt(replace(site.config, worker=itself))


@pytest.mark.parametrize("case", WORKERS)
async def test_a_server_that_cannot_be_is_not_added(case: str) -> None:
    async with standing() as site:
        told = await site.ask("/workers", WORKERS[case])
        assert told.status == 400
        assert len((await site.get("/workers")).body["workers"]) == 2


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"rid": 7}', b'{"rid": ""}', b"{}"])
async def test_an_abort_of_nothing_is_refused(body: bytes) -> None:
    async with standing() as site:
        assert (await site.ask("/abort_request", body)).status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("text", "input_ids", "prompt", "messages", "input", "sampling_params", "stream", "n"),
        *("max_tokens", "max_new_tokens", "rid", "model", "priority", "seed", "stop", "tools"),
        *("stream_options", "service_tier", "logprobs", "return_logprob", "system", "best_of"),
        *("image_data", "input_embeds", "return_token_ids", "response_format", "user"),
    ]
)


async def answered(path: str, bodies: list[Any]) -> list[Told]:
    """A second is a second of virtual time: whatever is accepted is served within it."""
    async with standing((*PAIR, *UNIFIED)) as site:
        return [await one(site, path, body) for body in bodies]


async def one(site: Site, path: str, body: Any) -> Told:
    async with asyncio.timeout(100):
        return await site.ask(path, body)


@PATHS
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.dictionaries(FIELDS, JSON, max_size=3), min_size=6, max_size=6))
async def test_no_body_whatever_upsets_the_gateway(
    path: str, changes: list[dict[str, Any]]
) -> None:
    bodies = [BODIES[path](2) | change for change in changes]
    for told in await answered(path, bodies):
        assert told.status in (200, 400, 404)


@settings(max_examples=10)
@given(raws=st.lists(st.binary(max_size=200), min_size=10, max_size=10))
async def test_no_bytes_whatever_upset_the_gateway(raws: list[bytes]) -> None:
    for told in await answered("/v1/chat/completions", raws):
        assert told.status == 400
