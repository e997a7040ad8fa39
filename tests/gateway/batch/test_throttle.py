"""Files pass at a measured pace, all of them together."""

from __future__ import annotations

import asyncio

from backends.pause import pause
from gateway.batch.throttle import Throttle

MB = 1_000_000


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def test_transfers_share_what_there_is() -> None:
    throttle = Throttle(asyncio.get_running_loop(), 10 * MB)

    async def transfer() -> None:
        for _ in range(50):
            await throttle.let(MB // 10)

    began_s = now_s()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(transfer())
    assert 1.95 < now_s() - began_s < 2.01


async def test_who_comes_slowly_does_not_wait() -> None:
    throttle = Throttle(asyncio.get_running_loop(), 10 * MB)
    began_s = now_s()
    for _ in range(20):
        await pause(asyncio.get_running_loop(), 0.02)
        await throttle.let(MB // 10)
    assert now_s() - began_s < 0.41


async def test_a_long_rest_earns_no_long_burst() -> None:
    throttle = Throttle(asyncio.get_running_loop(), 10 * MB)
    await pause(asyncio.get_running_loop(), 60.0)
    began_s = now_s()
    await throttle.let(10 * MB)
    assert now_s() - began_s > 0.98


async def test_who_leaves_while_waiting_keeps_nobody_up_for_ever() -> None:
    throttle = Throttle(asyncio.get_running_loop(), 10 * MB)
    first = asyncio.ensure_future(throttle.let(MB))
    await asyncio.sleep(0)
    first.cancel()
    await throttle.let(MB)
    assert now_s() < 0.21
