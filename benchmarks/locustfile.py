"""Online chat users and offline users against any gateway, with a verdict for each class.

http.client, not FastHttpUser: under gevent its readline returns when the line has arrived, so the
first token is timed when it comes and not when a buffer or a body is complete.
"""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.parse
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from locust import User, between, constant, events, task
from locust.env import Environment

PATH = "/v1/chat/completions"
TIMEOUT_S = 300.0
TURNS = 4
WORDS = ("slow", "river", "carries", "more", "silt", "than", "any", "between", "two", "banks")
PAUSE_S = 1.0


class BadAnswer(Exception):
    """The gateway answered, and not with a whole stream."""


@dataclass(slots=True)
class Timing:
    """One answer: when its tokens came, in milliseconds since it was asked for."""

    first_ms: float = 0.0
    last_ms: float = 0.0
    tokens: int = 0
    text: str = ""

    @property
    def tpot_ms(self) -> float | None:
        return (self.last_ms - self.first_ms) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(slots=True)
class Class:
    """What the users of one class asked of the gateway, and what they got."""

    name: str
    ttft_target_ms: float
    tpot_target_ms: float
    total_target_ms: float = float("inf")
    ttft_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    kept: int = 0
    failed: int = 0

    def took(self, timing: Timing, total_ms: float) -> None:
        self.ttft_ms.append(timing.first_ms)
        self.total_ms.append(total_ms)
        self.tokens += timing.tokens
        in_time = timing.first_ms <= self.ttft_target_ms and total_ms <= self.total_target_ms
        if in_time and (timing.tpot_ms or 0.0) <= self.tpot_target_ms:
            self.kept += 1

    @property
    def attained(self) -> float | None:
        """A failed request has missed its target."""
        asked = len(self.total_ms) + self.failed
        return self.kept / asked if asked else None


class Board:
    """The classes of this run, and the model that the gateway serves."""

    classes: ClassVar[dict[str, Class]] = {}
    model: ClassVar[str] = ""


def add_options(parser: ArgumentParser) -> None:
    group: Any = parser.add_argument_group("Slackwater")
    for flag, default, text in (
        ("online-ttft-ms", 2000.0, "an online answer begins within this time"),
        ("online-tpot-ms", 100.0, "and takes no more than this for each further token, on average"),
        ("offline-total-ms", 120_000.0, "an offline answer is complete within this time"),
    ):
        variable = f"SLACKWATER_{flag.upper().replace('-', '_')}"
        group.add_argument(f"--{flag}", type=float, default=default, env_var=variable, help=text)
    for flag, count, text in (
        ("online-tokens", 64, "the longest online answer"),
        ("offline-tokens", 256, "the longest offline answer"),
    ):
        group.add_argument(f"--{flag}", type=int, default=count, help=text)
    group.add_argument("--chat-model", default="", help="default: the first of /v1/models")


def begin(environment: Environment, **_: Any) -> None:
    asked: Any = environment.parsed_options
    never = float("inf")
    Board.classes = {
        "online": Class("online", asked.online_ttft_ms, asked.online_tpot_ms),
        "offline": Class("offline", never, never, asked.offline_total_ms),
    }
    Board.model = asked.chat_model or first_model(environment.host or "")


def connect(host: str) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(host)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.netloc, timeout=TIMEOUT_S)
    return http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)


def first_model(host: str) -> str:
    connection = connect(host)
    connection.request("GET", "/v1/models")
    model: str = json.load(connection.getresponse())["data"][0]["id"]
    connection.close()
    return model


def stream_events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of each event, up to and without [DONE], which must come."""
    while line := response.readline():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            response.read()
            return
        yield data
    raise BadAnswer("the stream ended without [DONE]")


def piece_of(data: bytes) -> tuple[str, int]:
    """The text of one event, and the tokens of the whole answer where the event tells them."""
    body = json.loads(data)
    if "error" in body:
        raise BadAnswer(f"error inside the stream: {body['error']}")
    told = (body.get("usage") or {}).get("completion_tokens", 0)
    choices = body.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or "", told


class ChatUser(User):
    """Asks, reads the stream, thinks, asks again in the same conversation."""

    abstract = True
    kind = ""
    connection: http.client.HTTPConnection | None = None

    def on_start(self) -> None:
        self.chance = random.Random(f"{self.kind}-{id(self)}")
        self.messages: list[dict[str, str]] = []
        self.connection = connect(self.host or "")

    def on_stop(self) -> None:
        if self.connection is not None:
            self.connection.close()

    @property
    def longest(self) -> int:
        asked: Any = self.environment.parsed_options
        return int(getattr(asked, f"{self.kind}_tokens"))

    def body(self) -> bytes:
        asked = {"model": Board.model, "messages": self.messages, "max_tokens": self.longest}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({**asked, **streamed}).encode()

    @task
    def ask(self) -> None:
        if len(self.messages) >= 2 * TURNS:
            self.messages = []
        words = self.chance.choices(WORDS, k=self.chance.randint(20, 200))
        self.messages.append({"role": "user", "content": " ".join(words)})
        began = time.perf_counter()
        try:
            timing = self.answered(began)
        except (BadAnswer, OSError, http.client.HTTPException, ValueError) as error:
            self.fail(error, (time.perf_counter() - began) * 1000)
        else:
            self.messages.append({"role": "assistant", "content": timing.text})
            self.succeed(timing, (time.perf_counter() - began) * 1000)

    def answered(self, began: float) -> Timing:
        if self.connection is None:
            self.connection = connect(self.host or "")
        headers = {"content-type": "application/json", "x-slackwater-class": self.kind}
        self.connection.request("POST", PATH, self.body(), headers)
        response = self.connection.getresponse()
        if response.status != 200:
            raise BadAnswer(f"status {response.status}: {response.read(300)!r}")
        return self.read(response, began)

    def read(self, response: http.client.HTTPResponse, began: float) -> Timing:
        timing, told, pieces, now_ms = Timing(), 0, 0, 0.0
        for data in stream_events(response):
            now_ms = (time.perf_counter() - began) * 1000
            text, tokens = piece_of(data)
            told = tokens or told
            if text:
                pieces += 1
                self.note(timing, now_ms)
                timing.text += text
        if not pieces:
            # A model may end its answer at once: then there is no text, but a count.
            if not told:
                raise BadAnswer("a stream without a token")
            self.note(timing, now_ms)
        timing.tokens = told or pieces
        return timing

    def note(self, timing: Timing, now_ms: float) -> None:
        if timing.first_ms:
            gap_ms = now_ms - timing.last_ms
            Board.classes[self.kind].gaps_ms.append(gap_ms)
            self.record("inter-token", gap_ms)
        else:
            timing.first_ms = now_ms
            self.record("TTFT", now_ms)
        timing.last_ms = now_ms

    def succeed(self, timing: Timing, total_ms: float) -> None:
        Board.classes[self.kind].took(timing, total_ms)
        self.record("POST", total_ms)

    def fail(self, error: Exception, total_ms: float) -> None:
        """The connection is given up: what is left of its answer must not be the next one's."""
        self.messages = []
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        Board.classes[self.kind].failed += 1
        self.record("POST", total_ms, error)
        # gevent has made this a switch to other users; without it a refusal becomes a busy loop.
        time.sleep(PAUSE_S)

    def record(self, what: str, ms: float, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=what,
            name=f"{self.kind} {PATH}" if what == "POST" else self.kind,
            response_time=ms,
            response_length=0,
            exception=error,
            context={},
        )


class OnlineUser(ChatUser):
    """A person: reads and thinks between two questions."""

    kind = "online"
    weight = 3
    wait_time = between(0.5, 3.0)


class OfflineUser(ChatUser):
    """A script that works through a file: the next prompt as soon as an answer is there."""

    kind = "offline"
    weight = 1
    wait_time = constant(0)


def share_of(values: list[float], share: float) -> str:
    if not values:
        return "-"
    return f"{sorted(values)[min(len(values) - 1, int(len(values) * share))]:,.1f}"


def row(it: Class, seconds: float) -> str:
    attained = "-" if it.attained is None else f"{it.attained:.1%}"
    figures = (
        *(share_of(it.ttft_ms, share) for share in (0.5, 0.99)),
        *(share_of(it.gaps_ms, share) for share in (0.5, 0.99)),
        *(share_of(it.total_ms, share) for share in (0.5, 0.99)),
        f"{it.tokens / seconds:,.0f}",
        attained,
    )
    counts = f"{it.name:<9}{len(it.total_ms):>9}{it.failed:>8}"
    return counts + "".join(f"{figure:>11}" for figure in figures)


HEADER = f"{'class':<9}{'answered':>9}{'failed':>8}" + "".join(
    f"{name:>11}"
    for name in (
        *("TTFT p50", "TTFT p99", "gap p50", "gap p99", "total p50", "total p99"),
        *("tokens/s", "in target"),
    )
)


def end(environment: Environment, **_: Any) -> None:
    """The summary; a failed request, or none at all, is a failed run."""
    seconds = max(environment.stats.total.last_request_timestamp or 0.0, 1.0)
    seconds = max(seconds - environment.stats.total.start_time, 1.0)
    print("\nBy class, times in milliseconds")
    print(HEADER)
    for it in Board.classes.values():
        print(row(it, seconds))
    answered = sum(len(it.total_ms) for it in Board.classes.values())
    if not answered or any(it.failed for it in Board.classes.values()):
        environment.process_exit_code = 1


hooks: Any = events
hooks.init_command_line_parser.add_listener(add_options)
hooks.test_start.add_listener(begin)
hooks.quitting.add_listener(end)
