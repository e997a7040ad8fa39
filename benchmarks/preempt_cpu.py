"""What a preemption and its resume cost the gateway: the core alone, and the whole process."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop

from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from benchmarks.fidelity import ROOT, wait_for, wait_until_ready
from benchmarks.processes import all_stopped, cpu_s, free_port, start, wait_until_listening
from gateway.clock import LiveClock
from gateway.core import Core, Rules
from policies.events import Arrived, Event, FirstToken, Preempted, PrefillDone, Progress, Recall
from policies.types import Job, Kind, Role, Worker

OFFLINE = {"x-slackwater-class": "offline"}
BESIDE = 100
"""Jobs that run beside the one that is taken off."""
SPEED = 0.2
"""Of the emulated servers: so slow that the relayed tokens cost little beside all else."""
_NEVER_US = 10**15


def core_us(cycles: int) -> tuple[list[float], list[float]]:
    """CPU of the calls in which a job is taken off, and of those in which it is back and goes."""
    core = Core(Rules(), [_server("p", Role.PREFILL), _server("d", Role.DECODE)])
    for number in range(BESIDE):
        core.handle([Arrived(_job(str(number)))], number)
        core.handle([PrefillDone(str(number)), FirstToken(str(number))], number)
    off, back = [], []
    for cycle in range(cycles):
        job_id, now_us = str(cycle % BESIDE), 1000 * (1 + cycle)
        core.handle([Progress(((job_id, 5),))], now_us)
        off.append(_timed(core, Recall(job_id), now_us))
        back.append(_timed(core, Preempted(job_id, 5), now_us))
        core.handle([PrefillDone(job_id), FirstToken(job_id)], now_us)
    return off, back


def _timed(core: Core, event: Event, now_us: int) -> float:
    began_s = time.process_time()
    decisions = core.handle([event], now_us)
    took_s = time.process_time() - began_s
    if not decisions:
        raise RuntimeError(f"{event} changed nothing")
    return took_s * 1e6


def _server(name: str, role: Role) -> Worker:
    return Worker(name=name, url=f"http://{name}", role=role, kv_tokens=10_000_000)


def _job(name: str) -> Job:
    return Job(
        id=name,
        kind=Kind.OFFLINE,
        model="",
        prompt_tokens=100,
        max_tokens=1_000_000,
        arrival_us=0,
        deadline_us=_NEVER_US,
        give_up_us=_NEVER_US,
    )


# The whole process, before emulated servers.


@dataclass(frozen=True, slots=True)
class Spent:
    """By the gateway, for so many online requests."""

    cpu_ms: float
    requests: int
    preemptions: int

    @property
    def each_ms(self) -> float:
        return self.cpu_ms / self.requests


def specs(seats: int) -> list[ServerSpec]:
    """With one seat each online request takes it from the offline one, with two none does."""
    engines = (
        EngineConfig(name="p", role=Role.PREFILL),
        EngineConfig(name="d", role=Role.DECODE, max_running=seats),
    )
    return [ServerSpec(engine=it, incremental=True, speed=SPEED) for it in engines]


async def emulate(seats: int, tell: Callable[[str], object]) -> None:
    """The fleet over HTTP until interrupted; told its [[worker]] tables."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    async with EmulatedFleet(specs(seats), LiveClock(loop)) as servers:
        tell(servers.toml())
        await stop.wait()


@contextmanager
def standing(seats: int) -> Iterator[tuple[int, str]]:
    """The gateway's process and its address."""
    with all_stopped() as running, tempfile.TemporaryDirectory() as name:
        tables, config = Path(name) / "workers.toml", Path(name) / "config.toml"
        options = ["--emulate", str(tables), "--seats", str(seats)]
        fleet = [sys.executable, "-m", "benchmarks.preempt_cpu", *options]
        running.append(start("fleet", fleet, cwd=ROOT))
        wait_for(running[-1], tables)
        port = free_port()
        config.write_text(
            f"[server]\nport = {port}\n[colocation]\naborts_per_s = 1000\nabort_burst = 1000\n"
            f'[log]\nlevel = "error"\nrequests = false\n{tables.read_text()}'
        )
        serve = [sys.executable, "-m", "gateway", "serve", "--config", str(config)]
        running.append(start("gateway", serve, cwd=ROOT))
        wait_until_listening(running[-1], port)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url)
        yield running[-1].pid, url


def spent(seats: int, requests: int) -> Spent:
    with standing(seats) as (pid, url):
        return uvloop.run(_spend(pid, url, requests))


async def _spend(pid: int, url: str, requests: int) -> Spent:
    async with aiohttp.ClientSession() as http:
        offline = asyncio.ensure_future(_ask(http, url, 4000, OFFLINE))
        await asyncio.sleep(1.0)
        before_s = cpu_s(pid)
        for _ in range(requests):
            await _ask(http, url, 1, {})
            await asyncio.sleep(0.15)  # the offline one is back by then
        used_s = cpu_s(pid) - before_s
        async with http.get(f"{url}/metrics") as answer:
            told = (await answer.text()).splitlines()
        offline.cancel()
    lines = [line for line in told if line.startswith("slackwater_preemptions_total{")]
    taken = sum(float(line.rpartition(" ")[2]) for line in lines)
    return Spent(used_s * 1e3, requests, int(taken))


async def _ask(http: aiohttp.ClientSession, url: str, tokens: int, headers: dict[str, str]) -> None:
    sampling = {"max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": [7] * 50, "sampling_params": sampling}
    async with http.post(f"{url}/generate", json=body, headers=headers) as answer:
        await answer.read()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preempt_cpu",
        description="Only the fleet of benchmarks.preempt, until interrupted.",
    )
    parser.add_argument("--emulate", type=Path, required=True, metavar="FILE",
                        help="where the [[worker]] tables are written")  # fmt: skip
    parser.add_argument("--seats", type=int, required=True)
    asked = parser.parse_args()
    uvloop.run(emulate(asked.seats, asked.emulate.write_text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
