"""A server is asked to stand still and to go on until it has answered, and never left standing."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from backends.http import Call, HttpError, Listener, Reason, Upstream
from backends.standstill import ANSWER_S, LAST_TRIES, LONGEST_RETRY_S, PAUSE_TRIES, Standstill
from policies.clock import VirtualClock

PAUSE, CONTINUE = "/pause_generation", "/continue_generation"


class Scripted(Upstream):
    """A server that says the next of its lines at once, 0 being no connection and None nothing."""

    def __init__(self, clock: VirtualClock, *lines: int | None) -> None:
        self.clock = clock
        self.lines = list(lines)
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        self.waiting: list[Listener] = []

    def send(
        self, method: bytes, path: bytes, body: bytes, listener: Listener, headers: bytes = b""
    ) -> Call:
        self.asked.append(path.decode())
        self.bodies.append(body)
        line = self.lines.pop(0) if self.lines else 200
        call = Call(listener, head_only=False)
        if line is None:
            self.waiting.append(listener)
        else:
            self.clock.call_at(self.clock.time(), say, listener, line)
        return call


def say(listener: Listener, line: int) -> None:
    if line:
        listener.on_head(line)
        listener.on_end()
    else:
        listener.on_error(HttpError(Reason.CONNECT, "nobody listens", before_head=True))


class Stage:
    def __init__(self, *lines: int | None) -> None:
        self.clock = VirtualClock()
        self.server = Scripted(self.clock, *lines)
        self.refused: list[str] = []
        self.standstill = Standstill(self.clock, self.refused.append)

    def pause(self) -> None:
        self.standstill.pause("r", self.server, "d")
        self.run(0.0)

    def go_on(self) -> None:
        self.standstill.go_on("r", self.server)
        self.run(0.0)

    def run(self, seconds: float) -> None:
        self.clock.run(self.clock.time() + seconds)


def test_it_is_paused_in_place_and_continued_with_its_allocator_left_alone() -> None:
    stage = Stage()
    stage.pause()
    stage.go_on()
    assert stage.server.asked == [PAUSE, CONTINUE]
    assert stage.server.bodies == [b'{"mode":"in_place"}', b'{"torch_empty_cache":false}']


def test_whoever_is_told_twice_is_asked_once() -> None:
    stage = Stage()
    stage.go_on()
    stage.go_on()
    assert stage.server.asked == [CONTINUE]
    assert stage.standstill.is_settled


def test_the_last_word_counts_whenever_the_answer_comes() -> None:
    stage = Stage(None)
    stage.pause()
    stage.go_on()
    assert stage.server.asked == [PAUSE]
    say(stage.server.waiting[0], 200)
    assert stage.server.asked == [PAUSE, CONTINUE]


@pytest.mark.parametrize("line", [0, 500, None])
def test_a_pause_is_tried_a_few_times_and_then_taken_back(line: int | None) -> None:
    stage = Stage(*[line] * PAUSE_TRIES)
    with capture_logs() as told:
        stage.pause()
        stage.run(60.0)
    assert stage.server.asked == [PAUSE] * PAUSE_TRIES + [CONTINUE]
    assert (stage.refused, stage.standstill.names) == (["r"], set())
    assert [it["event"] for it in told] == ["paused", "a server was not paused"]


def test_a_server_that_does_not_let_us_is_asked_no_more() -> None:
    stage = Stage(401, 401)
    stage.pause()
    stage.run(60.0)
    assert stage.server.asked == [PAUSE, CONTINUE]
    assert stage.refused == ["r"]


def test_a_continue_is_tried_for_as_long_as_the_server_is_on_the_list() -> None:
    stage = Stage(200, *[0] * 50)
    stage.pause()
    with capture_logs() as told:
        stage.go_on()
        stage.run(60.0)
    assert 10 < len(stage.server.asked) < 60 / LONGEST_RETRY_S + 10
    assert [it["event"] for it in told] == ["continued", "a server was not continued"]
    stage.server.lines.clear()
    stage.run(LONGEST_RETRY_S)
    assert stage.standstill.is_settled


def test_one_that_is_taken_off_the_list_goes_on_or_is_given_up() -> None:
    stage = Stage(200, *[0] * 50)
    stage.pause()
    stage.standstill.forget("r")
    stage.run(60.0)
    assert stage.server.asked == [PAUSE] + [CONTINUE] * LAST_TRIES
    assert stage.standstill.is_settled


def test_at_the_end_all_go_on_and_nobody_is_paused_any_more() -> None:
    stage = Stage()
    stage.pause()
    stage.standstill.let_all_go()
    stage.run(0.0)
    stage.pause()
    assert stage.server.asked == [PAUSE, CONTINUE]
    assert stage.standstill.is_settled


def test_an_answer_that_does_not_come_is_waited_for_so_long() -> None:
    stage = Stage(None)
    stage.pause()
    stage.run(ANSWER_S - 0.01)
    asked: list[Any] = list(stage.server.asked)
    stage.run(1.0)
    assert (asked, stage.server.asked) == ([PAUSE], [PAUSE, PAUSE])
