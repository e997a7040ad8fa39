"""What is told of each step: who was in it and how long it took, to whoever listens.

A publishing socket in SGLang's own style: three frames, the topic, a sequence number and JSON.
Without a listener, while everybody steps, nothing is noted; a full pipe loses reports and never
holds the engine up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from backends.sglang_plugin.clock import computed_us
from backends.sglang_plugin.contract import Batch
from backends.sglang_plugin.faults import Faults
from backends.sglang_plugin.riders import is_offline

TOPIC: Final = b"slackwater.steps"
FIELDS: Final = ("decode", "count", "context_tokens", "offline", "parked", "took_us", "new_tokens")
"""Of each step in a report, in this order."""
LOOK_EVERY: Final = 16
"""Steps between looks at who listens, while nobody does."""
EVERY_US: Final = 250_000.0
"""A report wakes other threads and processes, which take the engine's cores."""
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
        saw: Callable[[Sequence[Step]], None],
        chooses: Callable[[], bool],
        parked: Callable[[], int],
        open_socket: Callable[[], Socket],
    ) -> None:
        self.faults = faults
        self.steps = self.reports = 0
        self.spent_us = self.computed_us = 0.0
        """Of telling steps apart and sending them; the second: by this thread alone."""
        self.socket: Socket | None = None
        self._now_us = now_us
        self._saw = saw
        self._chooses = chooses
        """Whether the engine needs its steps itself, to choose by, whoever listens."""
        self._parked = parked
        self._open_socket = open_socket
        self._is_heard = self._notes = False
        self._due_us = 0.0
        self._steps: list[Step] = []
        """Since the last report; of these, `_known` have been told to the engine's own belief."""
        self._known = 0
        self._decode_mode: object = None
        self._members: list[Any] = []
        self._context = self._offline = self._left_out = 0
        self._ends: list[float] = []
        """Of steps by the same requests, which are told apart when somebody asks."""
        self._ended_us = 0.0

    def open(self) -> None:
        try:
            self.socket = self._open_socket()
        except Exception as error:  # noqa: BLE001  # a port that is taken ends no server
            self.faults.turn_off(f"cannot bind: {error}")

    def ended(self, batch: Batch) -> None:
        """After a batch's result was processed."""
        mode = batch.forward_mode
        is_decode = mode is self._decode_mode or self._is_decode(mode)
        if not is_decode and not mode.is_extend():
            return
        self.steps += 1
        if not self._notes and not (self.steps % LOOK_EVERY and is_decode):
            self.look()
        if self._notes:
            self._note(batch, self._now_us(), is_decode=is_decode)

    def _note(self, batch: Batch, now_us: float, *, is_decode: bool) -> None:
        is_same = is_decode and batch.reqs == self._members and not batch.after_idle_gap
        if is_same and self._parked() == self._left_out:
            self._ends.append(now_us)
            if now_us >= self._due_us:
                self._work(None, now_us, is_decode=True)
        else:
            self._work(batch, now_us, is_decode=is_decode)

    def _work(self, begun: Batch | None, now_us: float, *, is_decode: bool) -> None:
        """What most steps do without."""
        began_us = computed_us()
        if begun is not None:
            self._begin(begun, now_us, is_decode=is_decode)
        if now_us >= self._due_us:
            self._due_us = now_us + EVERY_US
            self._send()
        self.spent_us += self._now_us() - now_us
        self.computed_us += computed_us() - began_us

    def look(self) -> None:
        """Whether anybody wants the steps from here on; what was before, is not known."""
        self._is_heard = self.socket is not None and self.socket.is_heard()
        notes = self._is_heard or self._chooses()
        if notes != self._notes:
            self._tell_apart()
            self._notes = notes
            self._ended_us, self._members = 0.0, []

    def catch_up(self) -> None:
        """The engine's belief learns of the steps since it last did."""
        self._tell_apart()
        if len(self._steps) > self._known:
            news = self._steps[self._known :]
            self._known = len(self._steps)
            self._saw(news)

    def _is_decode(self, mode: Any) -> bool:
        """Modes are single objects: the one that decodes is asked but once."""
        if mode.is_decode():
            self._decode_mode = mode
        return mode is self._decode_mode

    def _begin(self, batch: Batch, now_us: float, *, is_decode: bool) -> None:
        """A step by others than the one before it."""
        self._tell_apart()
        before_us, self._ended_us = self._ended_us, now_us
        if batch.after_idle_gap or not before_us:
            before_us = max(before_us, (batch.launch_ts or 0.0) * 1e6)
        self._members = batch.reqs[:] if is_decode else []
        self._context = sum(request.seqlen for request in batch.reqs)
        self._offline = sum(map(is_offline, batch.reqs))
        self._left_out = self._parked() if is_decode else 0
        new_tokens = 0 if is_decode else batch.extend_num_tokens or 0
        told = len(batch.reqs), self._context, self._offline, self._left_out
        self._steps.append((int(is_decode), *told, int(now_us - before_us), new_tokens))

    def _tell_apart(self) -> None:
        """In each step every request of it became one token longer."""
        ends, self._ends = self._ends, []
        count, context, before_us = len(self._members), self._context, self._ended_us
        for ended_us in ends:
            context += count
            took_us = int(ended_us - before_us)
            self._steps.append((1, count, context, self._offline, self._left_out, took_us, 0))
            before_us = ended_us
        self._context, self._ended_us = context, before_us

    def _send(self) -> None:
        """Who has just come gets nothing from before: an engine that chooses notes steps for
        itself, and the last of them may be as old as its last request."""
        self.catch_up()
        steps, self._steps, self._known = self._steps, [], 0
        was_heard = self._is_heard
        self.look()
        if was_heard and self._is_heard and self.socket is not None:
            self.socket.send(self.reports, steps)
            self.reports += 1
