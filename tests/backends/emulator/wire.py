"""Small readers of what the emulated servers send."""

from __future__ import annotations

import json
from typing import Any

import aiohttp


async def events(response: aiohttp.ClientResponse) -> list[Any]:
    """The data lines of a stream, parsed; [DONE] stays a string."""
    lines = [line async for line in response.content if line.startswith(b"data: ")]
    return ["[DONE]" if b"[DONE]" in line else json.loads(line[6:]) for line in lines]


def greedy(tokens: int, **more: Any) -> dict[str, Any]:
    return {"sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}, **more}


def pair(port: int, room: int = 7) -> dict[str, Any]:
    return {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
