from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from backends.emulator import EmulatedFleet, Fault, FaultKind
from tests.backends.emulator.wire import events, greedy

STREAM = greedy(10, text="hello", stream=True)


async def inject(fleet: EmulatedFleet, http: aiohttp.ClientSession, **fault: Any) -> int:
    async with http.post(fleet.urls["u"] + "/emulator/faults", json=fault) as response:
        return response.status


async def read_until_broken(response: aiohttp.ClientResponse, seen: list[bytes]) -> None:
    async for line in response.content:
        seen += [line] if line.startswith(b"data: {") else []


async def test_a_refusing_server_resets_for_so_many_requests(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    await inject(fleet, http, kind="refuse", requests=1)
    with pytest.raises(aiohttp.ClientConnectionError):
        await http.post(fleet.urls["u"] + "/generate", json=STREAM)
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM) as response:
        assert (await events(response))[-1] == "[DONE]"


async def test_a_hanging_server_never_answers(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    await inject(fleet, http, kind="hang")
    with pytest.raises(TimeoutError):
        await http.post(
            fleet.urls["u"] + "/generate", json=STREAM, timeout=aiohttp.ClientTimeout(total=1000)
        )
    assert fleet.resident() == {}


async def test_a_stream_that_dies_breaks_after_its_tokens(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    await inject(fleet, http, kind="die_after", after_tokens=3)
    seen: list[bytes] = []
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM) as response:
        with pytest.raises(aiohttp.ClientError):
            await read_until_broken(response, seen)
    assert len(seen) == 3


async def test_a_stream_that_hangs_stays_open_without_a_word(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    await inject(fleet, http, kind="hang_after", after_tokens=3)
    seen: list[bytes] = []
    minute = aiohttp.ClientTimeout(total=60)
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM, timeout=minute) as response:
        with pytest.raises(TimeoutError):
            await read_until_broken(response, seen)
    assert len(seen) == 3


async def test_an_in_band_error_ends_a_stream_that_began_well(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    await inject(fleet, http, kind="in_band", after_tokens=2, status=503, message="full")
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM) as response:
        told = await events(response)
    assert response.status == 200
    assert told[-2]["error"]["code"] == 503
    assert told[-1] == "[DONE]"


async def test_a_truncated_stream_ends_without_done(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    fleet["u"].faults.add(Fault(kind=FaultKind.TRUNCATE, after_tokens=2))
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM) as response:
        told = await events(response)
    assert len(told) == 2
    assert told[-1]["meta_info"]["finish_reason"] is None


async def test_a_corrupt_chunk_is_not_json(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    fleet["u"].faults.add(Fault(kind=FaultKind.CORRUPT, after_tokens=1))
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM) as response:
        raw = await response.read()
    with pytest.raises(ValueError, match="0xff"):
        raw.decode()


async def test_an_error_status_comes_with_its_body(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    fleet["u"].faults.add(Fault(kind=FaultKind.ERROR_STATUS, status=502, body="bad gateway"))
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM) as response:
        assert (response.status, await response.text()) == (502, "bad gateway")


async def test_a_slow_server_takes_its_factor_longer(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    async def latency_s() -> float:
        async with http.post(fleet.urls["u"] + "/generate", json=greedy(50, text="a")) as response:
            answer = await response.json()
        return float(answer["meta_info"]["e2e_latency"])

    normal = await latency_s()
    await inject(fleet, http, kind="slow", factor=5, requests=2)
    slow = [await latency_s() for _ in range(3)]
    assert slow == pytest.approx([5 * normal, 5 * normal, normal], rel=0.1)


async def test_an_unknown_fault_is_refused_with_what_is_known(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    assert await inject(fleet, http, kind="explode") == 400
    assert await inject(fleet, http, kind="hang", whatever=1) == 400


async def test_a_fault_on_a_path_leaves_the_others_alone(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    await inject(fleet, http, kind="error_status", status=500, path="/v1/loads")
    async with http.get(fleet.urls["u"] + "/v1/loads") as response:
        assert response.status == 500
    async with http.post(fleet.urls["u"] + "/generate", json=STREAM) as response:
        assert response.status == 200


async def test_a_killed_server_breaks_its_streams_and_comes_back_on_its_port(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"]
    long = greedy(500, text="a", stream=True)
    async with http.post(url + "/generate", json=long) as response:
        await response.content.readline()
        await fleet.kill("u")
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    with pytest.raises(aiohttp.ClientConnectorError):
        await http.get(url + "/ready")
    await fleet.restart("u")
    async with http.post(url + "/generate", json=STREAM) as response:
        assert (await events(response))[-1] == "[DONE]"


async def outcome(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> str:
    """What a client makes of one request."""
    try:
        async with http.post(url, json=body) as response:
            raw = await response.read()
    except (aiohttp.ClientError, ConnectionError):
        return "broken"
    if response.status != 200:
        return str(response.status)
    if b"\xff" in raw:
        return "garbage"
    return "error" if b'"error"' in raw else "cut" if b"finish_reason" not in raw else "whole"


@pytest.mark.parametrize(
    ("kind", "native", "chat", "unary"),
    [
        ("die_after", "broken", "broken", "broken"),
        ("in_band", "error", "503", "503"),
        ("corrupt", "garbage", "garbage", "garbage"),
        ("truncate", "cut", "cut", "garbage"),
    ],
)
async def test_faults_before_the_first_token(
    fleet: EmulatedFleet,
    http: aiohttp.ClientSession,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    native: str,
    chat: str,
    unary: str,
) -> None:
    fleet["u"].faults.add(Fault(kind=FaultKind(kind)))
    url, talk = fleet.urls["u"], [{"role": "user", "content": "hi"}]
    told = [
        await outcome(http, url + "/generate", STREAM),
        await outcome(http, url + "/v1/chat/completions", {"messages": talk, "stream": True}),
        await outcome(http, url + "/generate", greedy(10, text="hello")),
    ]
    assert told == [native, chat, unary]
    assert caplog.records == []
