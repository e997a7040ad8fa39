"""A role switch in real time: how long from the decision until the server serves in its new role.

Emulated servers (one process) behind the real gateway (another), over HTTP. Online requests come
at a steady rate, first with long prompts, then with long answers, in the full run with long
prompts again; offline requests run all the time. The controller decides by itself. Every request
has to end once, with the tokens that the model says; nothing may be left on a server. This is done
twice: with offline requests preempted on a server that is to switch, and with waiting for them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import orjson
import uvloop
from rich.table import Table

from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from backends.engine.tokens import Script, pack
from benchmarks.fidelity import wait_for, wait_until_ready
from benchmarks.processes import (
    DidNotStart,
    Running,
    Watch,
    all_stopped,
    free_port,
    start,
    wait_until_listening,
)
from benchmarks.report import Check, Goal, Report, Spread, command_line, number
from gateway.clock import LiveClock
from policies.types import Role

ROOT = Path(__file__).parents[1]
ROLES = {"p1": Role.PREFILL, "p2": Role.PREFILL, "p3": Role.PREFILL, "d1": Role.DECODE}
SEATS = 12
"""Of each server: so few that long answers need more than one decode server."""
RATE_PER_S = 10.0
OFFLINE_CLIENTS = 4
PATIENCE_S = 90.0
NEVER_S = 120.0
VOCABULARY = range(1000, 30_000)
SWITCHED_WITHIN_S = 2.0
"""With preemption, from the decision to the first token in the new role."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What requests are like, by the means of their lengths."""

    name: str
    prompt_tokens: int
    answer_tokens: int


PROMPTS = Shape("long prompts", 4000, 10)
ANSWERS = Shape("long answers", 60, 300)
OFFLINE = Shape("offline", 12_000, 500)

Phase = tuple[Shape, float]
"""For so many seconds."""
QUICK: tuple[Phase, ...] = ((PROMPTS, 5.0), (ANSWERS, 10.0))
FULL: tuple[Phase, ...] = ((PROMPTS, 15.0), (ANSWERS, 30.0), (PROMPTS, 40.0))


@dataclass(slots=True)
class Answer:
    """One request as its client saw it."""

    is_online: bool
    expected: list[int]
    status: int = 0
    ids: list[int] = field(default_factory=list)
    ends: int = 0
    workers: tuple[str, ...] = ()
    first_s: float = 0.0
    """When its first token came, by the wall clock."""

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and self.ends == 1 and self.ids == self.expected


@dataclass(frozen=True, slots=True)
class Switch:
    """One that is done, as the gateway's log has it and as clients saw it."""

    worker: str
    role: str
    drained_s: float
    took_s: float
    serving_s: float | None
    """From the decision to the first token of a request that it served in its new role."""


# The programs.


def specs() -> list[ServerSpec]:
    return [
        ServerSpec(engine=EngineConfig(name=name, role=role, max_running=SEATS), incremental=True)
        for name, role in ROLES.items()
    ]


async def emulate(tell: Callable[[str], object]) -> None:
    """The fleet over HTTP until interrupted; told its [[worker]] tables."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    async with EmulatedFleet(specs(), LiveClock(loop)) as servers:
        tell(servers.toml())
        await stop.wait()


def gateway_config(port: int, workers: str, *, preempts: bool) -> str:
    return f"""\
[server]
port = {port}
[classes.online]
ttft_ms = 1000
tpot_ms = 20
patience = {PATIENCE_S}
[cost]
model = "Llama-3.1-8B"
device = "h100"
[ratio]
policy = "dopd+"
mode = "act"
interval_s = 2
hand_over_offline_s = {0 if preempts else NEVER_S}
[log]
format = "json"
requests = false
{workers}"""


@contextmanager
def standing(*, preempts: bool) -> Iterator[tuple[Running, str, list[str]]]:
    """The gateway, its address and those of the servers behind it."""
    with all_stopped() as running, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = folder / "workers.toml"
        fleet = [sys.executable, "-m", "benchmarks.role_switch", "--emulate", str(tables)]
        running.append(start("fleet", fleet, cwd=ROOT))
        wait_for(running[-1], tables)
        workers, port = tables.read_text(), free_port()
        config = folder / "config.toml"
        config.write_text(gateway_config(port, workers, preempts=preempts))
        serve = [sys.executable, "-m", "gateway", "serve", "--config", str(config)]
        running.append(start("gateway", serve, cwd=ROOT))
        wait_until_listening(running[-1], port)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url)
        servers = [str(entry["url"]) for entry in tomllib.loads(workers)["worker"]]
        yield running[-1], url, servers


# The client.


class Client:
    """Asks for the phases' online requests, and for offline ones all the time."""

    def __init__(self, url: str, phases: Iterable[Phase], seed: int) -> None:
        self._url = url
        self._phases = tuple(phases)
        self._random = Random(f"{seed}/requests")
        self._is_over = False
        self.answers: list[Answer] = []

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(OFFLINE_CLIENTS):
                group.create_task(self._offline(http))
            await self._online(http, group)
            self._is_over = True

    async def _online(self, http: aiohttp.ClientSession, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        for shape, seconds in self._phases:
            end_s = due_s + seconds
            while due_s < end_s:
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                group.create_task(self._ask(http, shape, is_online=True))
                due_s += self._random.expovariate(RATE_PER_S)

    async def _offline(self, http: aiohttp.ClientSession) -> None:
        while not self._is_over:
            await self._ask(http, OFFLINE, is_online=False)

    def _length(self, mean: int) -> int:
        return max(1, round(mean * self._random.uniform(0.6, 1.4)))

    async def _ask(self, http: aiohttp.ClientSession, shape: Shape, *, is_online: bool) -> None:
        prompt = self._random.choices(VOCABULARY, k=self._length(shape.prompt_tokens))
        tokens = self._length(shape.answer_tokens)
        expected = Script(pack(prompt), EngineConfig().eos_every).first(tokens)
        answer = Answer(is_online, expected)
        self.answers.append(answer)
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0},
            "stream": True,
        }
        headers = {
            "content-type": "application/json",
            "x-slackwater-class": "online" if is_online else "offline",
        }
        try:
            async with http.post(
                f"{self._url}/generate", data=orjson.dumps(body), headers=headers
            ) as response:
                await self._read(response, answer)
        except (aiohttp.ClientError, TimeoutError):
            answer.status = 0

    @staticmethod
    async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
        answer.status = response.status
        answer.workers = tuple(response.headers.get("x-slackwater-worker", "").split(","))
        async for line in response.content:
            if line.startswith(b"data: {"):
                answer.first_s = answer.first_s or time.time()
                answer.ids += orjson.loads(line[6:]).get("output_ids", ())
            elif line.startswith(b"data: [DONE]"):
                answer.ends += 1


async def left_on(servers: Iterable[str]) -> int:
    """Requests that the servers still have."""
    left = 0
    async with aiohttp.ClientSession() as http:
        for url in servers:
            async with http.get(f"{url}/v1/loads") as answer:
                loads = (await answer.json())["loads"]
                left += sum(it["num_running_reqs"] + it["num_waiting_reqs"] for it in loads)
    return left


# What is made of it.


def switches_in(log: str, answers: Iterable[Answer]) -> list[Switch]:
    """The gateway tells of each when it is over, and how long it was from the decision."""
    found = []
    for line in log.splitlines():
        told = _object(line)
        if told.get("event") == "role switch" and told["outcome"] == "done":
            over_s = datetime.fromisoformat(told["timestamp"]).timestamp()
            decided_s = over_s - told["took_s"]
            first_s = first_served(told["worker"], told["role"], over_s, answers)
            serving_s = None if first_s is None else first_s - decided_s
            found.append(
                Switch(told["worker"], told["role"], told["drained_s"], told["took_s"], serving_s)
            )
    return found


def _object(line: str) -> dict[str, Any]:
    try:
        told = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def first_served(worker: str, role: str, after_s: float, answers: Iterable[Answer]) -> float | None:
    """When the first token came of a request that this server prefilled, or decoded."""
    place = 0 if role == Role.PREFILL else -1
    times = (it.first_s for it in answers if it.first_s >= after_s and it.workers[place] == worker)
    return min(times, default=None)


def log_of(gateway: Running) -> str:
    return gateway.last_words(os.fstat(gateway.log.fileno()).st_size)


def played(report: Report, phases: tuple[Phase, ...], *, preempts: bool) -> list[Switch]:
    way = "offline work preempted" if preempts else "offline work waited for"
    with standing(preempts=preempts) as (gateway, url, servers):
        client = Client(url, phases, seed=1)
        uvloop.run(client.run())
        left = uvloop.run(left_on(servers))
        time.sleep(0.2)  # the log is written in pieces
        log = log_of(gateway)
    switches = switches_in(log, client.answers)
    report.tables.append(table_of(way, switches, client.answers))
    broken = sum(not it.is_whole for it in client.answers)
    for name, value in (
        ("requests that did not end once with the right tokens", broken),
        ("requests left on servers", left),
    ):
        report.checks.append(Check(name=f"{way}: {name}", value=value, target=0, unit=""))
    to_decode = sum(it.role == Role.DECODE and it.serving_s is not None for it in switches)
    name = f"{way}: prefill servers that became decode servers and served"
    report.checks.append(Check(name=name, value=to_decode, target=1, unit="", goal=Goal.AT_LEAST))
    return switches


def table_of(way: str, switches: Iterable[Switch], answers: list[Answer]) -> Table:
    online = sum(it.is_online for it in answers)
    title = f"{way}: {online} online requests, {len(answers) - online} offline"
    table = Table(title=title, title_justify="left")
    for column in ("server", "becomes", "empty after, s", "switched after, s", "serves after, s"):
        table.add_column(column, justify="right" if column.endswith(" s") else "left")
    for it in switches:
        serving = "-" if it.serving_s is None else number(it.serving_s)
        table.add_row(it.worker, it.role, number(it.drained_s), number(it.took_s), serving)
    return table


def spread_of(report: Report, way: str, switches: Iterable[Switch]) -> None:
    for role in (Role.DECODE, Role.PREFILL):
        times = [it.serving_s for it in switches if it.role == role and it.serving_s is not None]
        if times:
            report.spread[f"decision to serving as {role.value}, s, {way}"] = Spread.of(times)


def measure(phases: tuple[Phase, ...]) -> Report:
    report, watch = Report(title="role_switch"), Watch.begin()
    with_it = played(report, phases, preempts=True)
    without = played(report, phases, preempts=False)
    spread_of(report, "with preemption", with_it)
    spread_of(report, "without preemption", without)
    slowest = max((it.serving_s for it in with_it if it.serving_s is not None), default=None)
    report.checks.append(
        Check(name="decision to serving in the new role, with preemption, the longest",
              value=slowest, target=SWITCHED_WITHIN_S, unit="s")
    )  # fmt: skip
    report.notes.append("the emulated switch itself takes 0.4 s, as SGLang's on an idle CPU server")
    report.notes.append(watch.note())
    return report


def main() -> int:
    parser = command_line("role_switch", __doc__)
    parser.add_argument("--emulate", type=Path, metavar="FILE", help="only run the fleet, and "
                        "write its [[worker]] tables to FILE")  # fmt: skip
    asked = parser.parse_args()
    if asked.emulate is not None:
        uvloop.run(emulate(asked.emulate.write_text))
        return 0
    try:
        report = measure(QUICK if asked.quick else FULL)
    except DidNotStart as problem:
        print(problem, file=sys.stderr)
        return 2
    if asked.quick:
        seconds = [sum(lasts_s for _, lasts_s in phases) for phases in (QUICK, FULL)]
        told = "--quick: one shift instead of two, {:g} s of requests instead of {:g}"
        report.notes.append(told.format(*seconds))
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
