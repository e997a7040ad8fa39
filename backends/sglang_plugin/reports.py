"""What is told of each step: who was in it and how long it took, to whoever listens.

A publishing socket in SGLang's own style: three frames, the topic, a sequence number and JSON.
Without a listener nothing is composed; a full pipe loses reports and never holds the engine up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

from backends.sglang_plugin.contract import Batch
from backends.sglang_plugin.faults import Faults
from backends.sglang_plugin.riders import is_offline

TOPIC: Final = b"slackwater.steps"
FIELDS: Final = ("decode", "count", "context_tokens", "offline", "parked", "took_us", "new_tokens")
"""Of each step in a report, in this order."""
MOST_STEPS: Final = 64
MOST_WAIT_US: Final = 100_000.0
HIGH_WATER: Final = 64

Step = tuple[int, int, int, int, int, int, int]


class Socket:
    """Bound when the server is met; subscriptions are counted, so that silence costs nothing."""

    def __init__(self, endpoint: str) -> None:
        zmq: Any = importlib.import_module("zmq")
        self._encode: Callable[[object], bytes] = importlib.import_module("orjson").dumps
        self._again: type[Exception] = zmq.Again
        self._flags = zmq.NOBLOCK
        self._socket = zmq.Context.instance().socket(zmq.XPUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._socket.bind(endpoint)
        self.endpoint: str = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0")
        self._listeners = 0

    def is_heard(self) -> bool:
        while True:
            try:
                news = self._socket.recv(self._flags)
            except self._again:
                return self._listeners > 0
            self._listeners = max(0, self._listeners + (1 if news[:1] == b"\x01" else -1))

    def send(self, number: int, steps: list[Step]) -> None:
        body = self._encode({"steps": steps})
        try:
            frames = [TOPIC, number.to_bytes(8, "big"), body]
            self._socket.send_multipart(frames, self._flags)
        except self._again:
            return


class Reporter:
    """Steps since the last report; a step lasts from the end of the one before to its own."""

    def __init__(
        self,
        faults: Faults,
        now_us: Callable[[], float],
        saw: Callable[[int, int, float], None],
        parked: Callable[[], int],
        open_socket: Callable[[], Socket],
    ) -> None:
        self.faults = faults
        self.steps = self.reports = 0
        self.spent_us = 0.0
        self.socket: Socket | None = None
        self._now_us = now_us
        self._saw = saw
        self._parked = parked
        self._open_socket = open_socket
        self._pending: list[Step] = []
        self._sent_us = self._ended_us = 0.0
        self._members: list[Any] = []
        self._context = self._offline = 0

    def open(self) -> None:
        try:
            self.socket = self._open_socket()
        except Exception as error:  # noqa: BLE001  # a port that is taken ends no server
            self.faults.turn_off(f"cannot bind: {error}")

    def ended(self, batch: Batch) -> None:
        """After a batch's result was processed."""
        now_us, before_us = self._now_us(), self._ended_us
        self._ended_us = now_us
        is_decode = batch.forward_mode.is_decode()
        if not is_decode and not batch.forward_mode.is_extend():
            return
        if batch.after_idle_gap or not before_us:
            before_us = max(before_us, (batch.launch_ts or 0.0) * 1e6)
        took_us = now_us - before_us
        count = len(batch.reqs)
        self._follow(batch.reqs, grows=is_decode)
        self.steps += 1
        if is_decode:
            self._saw(count, self._context, took_us)
        parked = self._parked() if is_decode else 0
        new_tokens = 0 if is_decode else batch.extend_num_tokens or 0
        self._pending.append(
            (
                int(is_decode),
                count,
                self._context,
                self._offline,
                parked,
                int(took_us),
                new_tokens,
            )
        )
        if len(self._pending) >= MOST_STEPS or now_us - self._sent_us >= MOST_WAIT_US:
            self._send(now_us)
        self.spent_us += self._now_us() - now_us

    def _follow(self, members: list[Any], *, grows: bool) -> None:
        """The same requests as in the step before are one token longer each, and no other class."""
        if grows and members == self._members:
            self._context += len(members)
            return
        self._members = members[:]
        self._context = sum(request.seqlen for request in members)
        self._offline = sum(map(is_offline, members))

    def _send(self, now_us: float) -> None:
        self._sent_us = now_us
        pending, self._pending = self._pending, []
        if self.socket is None or not self.socket.is_heard():
            return
        self.socket.send(self.reports, pending)
        self.reports += 1
