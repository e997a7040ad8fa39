"""What the levers of preemption cost on real SGLang, on this machine's CPU.

python -m benchmarks.sglang_levers [--json] [--repeat 5] [--starts 5] [--model tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp

from backends.fleet.fleet import Fleet
from backends.fleet.spec import FleetError, FleetSpec, Group
from policies.types import Pool, Role
from tests.conformance.under_test import Client, Leg, is_idle

KV_TOKENS = 65_536
CHUNK_TOKENS = 1024
RESUMED_TOKENS = 6000
LONG_TOKENS = 12_000
URGENT_TOKENS = 200
SLOW_STEP_S = 0.05
SERVERS = (
    Group(role=Role.PREFILL, flags=("--chunked-prefill-size", str(CHUNK_TOKENS))),
    Group(role=Role.DECODE, pool=Pool.STRICT),
    Group(role=Role.DECODE),
    Group(role=Role.UNIFIED),
)


@dataclass(slots=True)
class Table:
    """Repetitions of each quantity, in the unit that its name ends with."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "n": len(values),
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
            for name, values in self.values.items()
        }

    def text(self) -> str:
        rows = self.summary().items()
        return "\n".join(
            f"{name:<44} {row['median']:>10} {row['min']:>10} .. {row['max']:<10} n={row['n']}"
            for name, row in rows
        )


class Running:
    """A fleet as the suite's client addresses one."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.prefill, self.decode, self.relaxed, self.unified = (s.url for s in fleet.servers)

    def _name(self, url: str) -> str:
        return next(server.name for server in self._fleet.servers if server.url == url)

    def bootstrap_port(self, url: str) -> int:
        port = self._fleet.server(self._name(url)).bootstrap_port
        assert port is not None
        return port

    async def kill(self, url: str) -> None:
        await self._fleet.kill(self._name(url))

    async def start(self, url: str) -> None:
        await self._fleet.start(self._name(url))


@dataclass(frozen=True, slots=True)
class Bench:
    client: Client
    fleet: Running
    table: Table

    async def freed_s(self, url: str, began_s: float) -> float:
        while not is_idle(await self.client.loads(url)):  # noqa: ASYNC110 - a server has no events
            await asyncio.sleep(0.001)
        return time.perf_counter() - began_s

    async def running(self, rid: str) -> tuple[Leg, Leg]:
        legs = self.client.pair(self.client.prompt(50), 4000, rid=rid)
        await legs[1].begun.wait()
        await asyncio.sleep(0.3)
        return legs

    async def abort(self, *, step: str) -> None:
        rid = self.client.rid()
        _, decode = await self.running(rid)
        seen, began_s = len(decode.ids), time.perf_counter()
        await self.client.abort(self.fleet.decode, rid)
        freed_s = await self.freed_s(self.fleet.decode, began_s)
        await decode.task
        self.table.add(f"abort to freed slot, {step}, ms", 1000 * freed_s)
        self.table.add(f"abort to freed slot, {step}, steps", len(decode.ids) - seen)

    async def abort_at_full_speed(self) -> None:
        await self.abort(step="full speed")

    async def abort_at_slow_steps(self) -> None:
        await self.client.slow(self.fleet.decode, SLOW_STEP_S)
        await self.abort(step="50 ms steps")
        await self.client.slow(self.fleet.decode, None)

    async def disconnect(self) -> None:
        _, decode = await self.running(self.client.rid())
        began_s = time.perf_counter()
        decode.task.cancel()
        freed_s = await self.freed_s(self.fleet.decode, began_s)
        self.table.add("disconnect to freed slot, ms", 1000 * freed_s)

    async def first_token_s(self, prompt: list[int]) -> float:
        began_s = time.perf_counter()
        _, decode = self.client.pair(prompt, 2)
        await decode.begun.wait()
        waited_s = time.perf_counter() - began_s
        await decode.task
        return waited_s

    async def resume(self) -> None:
        """6,000 prompt tokens and 20 generated ones."""
        prompt = self.client.prompt(RESUMED_TOKENS)
        _, whole = await self.client.paired(prompt, 40)
        continued = prompt + whole.ids[:20]
        hit_s = await self.first_token_s(continued)
        await self.client.idle(self.fleet.prefill)
        await self.client.post(self.fleet.prefill + "/flush_cache", {})
        miss_s = await self.first_token_s(continued)
        self.table.add("resume, prompt in the radix cache, ms", 1000 * hit_s)
        self.table.add("resume, cache empty, ms", 1000 * miss_s)

    async def urgent(self, *, preempt: bool) -> None:
        rid = self.client.rid()
        long = self.client.pair(
            self.client.prompt(LONG_TOKENS), 2, rid=rid, decode=self.fleet.relaxed
        )
        await asyncio.sleep(0.3)
        began_s = time.perf_counter()
        if preempt:
            await self.client.abort(self.fleet.prefill, rid)
            await self.client.abort(self.fleet.relaxed, rid)
        await self.first_token_s(self.client.prompt(URGENT_TOKENS))
        how = "aborted" if preempt else "left alone"
        waited_ms = 1000 * (time.perf_counter() - began_s)
        self.table.add(f"200-token prompt behind 12,000, {how}, ms", waited_ms)
        await asyncio.gather(*(leg.task for leg in long))

    async def urgent_left(self) -> None:
        await self.urgent(preempt=False)

    async def urgent_preempting(self) -> None:
        await self.urgent(preempt=True)

    async def urgent_alone(self) -> None:
        waited_s = await self.first_token_s(self.client.prompt(URGENT_TOKENS))
        self.table.add("200-token prompt on an idle pair, ms", 1000 * waited_s)

    async def switch(self, url: str, name: str, body: dict[str, Any]) -> None:
        await self.client.idle(url)
        began_s = time.perf_counter()
        status, told = await self.client.post(url + "/pd_role_switch", body)
        if status != 200:
            raise FleetError(f"{name} was refused: {told}")
        self.table.add(f"role switch, {name}, ms", 1000 * (time.perf_counter() - began_s))

    async def roles(self) -> None:
        url = self.fleet.relaxed
        await self.switch(url, "decode to prefill", {"new_role": "prefill"})
        back = {"new_role": "decode", "decode_cuda_graph_memory_gb": 0}
        await self.switch(url, "prefill to decode", back)

    def all(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.abort_at_full_speed,
            self.abort_at_slow_steps,
            self.disconnect,
            self.resume,
            self.urgent_alone,
            self.urgent_left,
            self.urgent_preempting,
            self.roles,
        ]


async def start_once(spec: FleetSpec, table: Table) -> None:
    began_s = time.perf_counter()
    async with Fleet(spec) as fleet:
        table.add("start of 1 prefill + 2 decode + 1 unified, s", time.perf_counter() - began_s)
        table.add("resident memory when ready, MiB", fleet.resident_bytes() / (1 << 20))


async def measure(spec: FleetSpec, table: Table, repeat: int) -> None:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with Fleet(spec) as fleet:
        async with aiohttp.ClientSession(connector=connector) as http:
            running = Running(fleet)
            bench = Bench(Client(http, running, seed=1), running, table)
            for url in (running.decode, running.relaxed):
                await bench.client.paired(bench.client.prompt(50), 3, decode=url)
            for _ in range(repeat):
                for one in bench.all():
                    await one()
                    await bench.client.idle(running.prefill)
                    await bench.client.idle(running.decode)
        table.add("resident memory after the run, MiB", fleet.resident_bytes() / (1 << 20))


async def run(args: argparse.Namespace) -> Table:
    table = Table()
    spec = FleetSpec(model=args.model, kv_tokens=KV_TOKENS, servers=SERVERS)
    for _ in range(args.starts):
        await start_once(spec, table)
    await measure(spec, table, args.repeat)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    try:
        table = asyncio.run(run(args))
    except FleetError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'':<44} {'median':>10} {'min':>10} .. max")
    print(table.text())
    if args.json:
        when = datetime.now(UTC).date().isoformat()
        print(json.dumps({"date": when, "cores": os.cpu_count(), "levers": table.summary()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
