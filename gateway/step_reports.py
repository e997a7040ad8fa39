"""Hears what an engine tells of its steps; the only part of a gateway that needs pyzmq."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

import structlog
import zmq
import zmq.asyncio

from backends.base import Post
from backends.engine_words import TOPIC, steps_of
from policies.events import StepsSeen
from policies.types import Worker

log = structlog.get_logger("slackwater.worker")

_HIGH_WATER = 1_000
_ALL_ADDRESSES = frozenset({"0.0.0.0", "[::]", "::", "*"})


async def heard(post: Post, worker: Worker, endpoints: Iterable[str]) -> None:
    """Until it is cancelled."""
    context = zmq.asyncio.Context.instance()
    with context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        socket.setsockopt(zmq.LINGER, 0)
        for told in endpoints:
            endpoint = reachable(told, worker.url)
            try:
                socket.setsockopt(zmq.IPV6, int("[" in endpoint))
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                why = f"{endpoint}: {error}"
                log.warning("engine's reports are not heard", worker=worker.name, error=why)
        socket.subscribe(TOPIC)
        while True:
            frames = await socket.recv_multipart()
            if len(frames) == 3 and (steps := tuple(steps_of(frames[2]))):
                post(StepsSeen(worker.name, steps))


def reachable(endpoint: str, url: str) -> str:
    """An engine that listens on all of its addresses does not know by which one we reach it."""
    scheme, _, address = endpoint.partition("://")
    told, _, port = address.rpartition(":")
    if scheme != "tcp" or told not in _ALL_ADDRESSES:
        return endpoint
    host = urlsplit(url).hostname or ""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
