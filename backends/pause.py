"""How a task waits: on the clock that everything else runs on."""

from __future__ import annotations

import asyncio

from policies.clock import Clock


async def pause(clock: Clock, seconds: float) -> None:
    """Sleeps on the clock that everything else runs on."""
    over = asyncio.get_running_loop().create_future()
    timer = clock.call_at(clock.time() + seconds, _resolve, over)
    try:
        await over
    finally:
        timer.cancel()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
