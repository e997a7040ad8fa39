from __future__ import annotations

import asyncio

import aiohttp
import pytest

from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from gateway.clock import LiveClock
from tests.backends.emulator.wire import events, greedy

pytestmark = pytest.mark.real_time


async def test_live_timers_do_not_slow_a_server() -> None:
    """Each timer fires a millisecond or two late; a hundred steps must not add that up.

    Whatever else the machine does makes an answer later, never earlier: the least of three counts.
    """
    clock = LiveClock(asyncio.get_running_loop())
    async with EmulatedFleet([ServerSpec(engine=EngineConfig(name="u"))], clock) as fleet:
        async with aiohttp.ClientSession() as http:
            body, took_s = greedy(100, text="hello"), []
            for _ in range(3):
                async with http.post(fleet.urls["u"] + "/generate", json=body) as response:
                    took_s.append((await response.json())["meta_info"]["e2e_latency"])
    assert min(took_s) < 0.0075 + 99 * 0.0066 + 0.1


async def test_a_slow_reader_on_uvloop_gets_all_tokens_in_fewer_chunks() -> None:
    clock = LiveClock(asyncio.get_running_loop())
    fast = ServerSpec(engine=EngineConfig(name="u"), speed=200.0)
    async with EmulatedFleet([fast], clock) as fleet, aiohttp.ClientSession() as http:
        engine, done = fleet.engines["u"], asyncio.Event()
        engine.on_step = lambda stepped: None if stepped.machine.live else done.set()
        body = greedy(3000, text="hello", stream=True)
        async with http.post(
            fleet.urls["u"] + "/generate", json=body, read_bufsize=1024
        ) as response:
            await done.wait()
            raw = await response.read()
    chunks = [line for line in raw.split(b"\n\n") if b"{" in line]
    assert len(chunks) < 3000
    assert b'"completion_tokens":3000' in chunks[-1]


async def test_a_stream_on_uvloop_is_whole() -> None:
    clock = LiveClock(asyncio.get_running_loop())
    async with EmulatedFleet([ServerSpec(engine=EngineConfig(name="u"))], clock) as fleet:
        async with aiohttp.ClientSession() as http:
            body = greedy(5, text="hello", stream=True)
            async with http.post(fleet.urls["u"] + "/generate", json=body) as response:
                told = await events(response)
    assert len(told) == 6
