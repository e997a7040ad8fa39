"""Gateways as processes of their own, over an emulated fleet in this one or in one of its own."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from benchmarks.processes import Running, all_stopped, cores_shared_out, free_port, start
from gateway.batch.client import BatchClient, BatchError
from policies.types import Pool, Role

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).parent.parent
OVER = frozenset({"completed", "failed", "expired", "cancelled"})
_POLL_S = 0.1
_START_S = 30.0


def specs(pairs: int, *, speed: float, max_running: int) -> tuple[ServerSpec, ...]:
    """Prefill and decode servers, the decode servers with so many seats."""
    made = []
    for number in range(1, pairs + 1):
        prefill = EngineConfig(name=f"prefill-{number}", role=Role.PREFILL)
        decode = EngineConfig(name=f"decode-{number}", role=Role.DECODE, max_running=max_running)
        made += [
            ServerSpec(engine=prefill, pool=Pool.RELAXED, speed=speed),
            ServerSpec(engine=decode, pool=Pool.RELAXED, speed=speed),
        ]
    return tuple(made)


@dataclass
class GatewayProcess:
    """`slackwater serve` on a port of its own; what it was told stays, whatever becomes of it."""

    name: str
    config: Path
    started: list[Running]
    port: int = field(default_factory=free_port)
    running: Running | None = None
    kills: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(self.config)]
        self.running = start(self.name, [*command, "--port", str(self.port)], cwd=ROOT)
        self.started.append(self.running)

    async def kill(self) -> None:
        """SIGKILL, and its end is waited for: nothing of it runs beside the next one."""
        assert self.running is not None
        self.running.signal(signal.SIGKILL)
        await asyncio.to_thread(self.running.process.wait)
        self.running.log.close()
        self.started.remove(self.running)
        self.running = None
        self.kills += 1

    async def stop(self, within_s: float = 30.0) -> int:
        """SIGTERM, as an orchestrator does; its exit code."""
        assert self.running is not None
        self.running.signal(signal.SIGTERM)
        return await asyncio.to_thread(self.running.process.wait, within_s)

    async def listens(self) -> None:
        async with asyncio.timeout(_START_S):
            while True:
                assert self.running is not None
                if self.running.ended:
                    raise RuntimeError(f"{self.name} has ended: {self.running.last_words()}")
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)


@dataclass
class BatchSite:
    fleet: EmulatedFleet
    gateways: Sequence[GatewayProcess]
    _before: int = 0
    """Tokens that servers had made when they were killed."""

    async def asked(self, ask: Any, *, patience_s: float = 60.0) -> Any:
        """Of whichever gateway answers, again and again: a client that does not give up."""
        until = asyncio.get_running_loop().time() + patience_s
        while True:
            for gateway in self.gateways:
                try:
                    async with BatchClient.connected(gateway.url, "") as client:
                        return await ask(client)
                except (BatchError, OSError) as error:
                    last = error
            if asyncio.get_running_loop().time() > until:
                raise last
            await asyncio.sleep(_POLL_S)

    async def submit(self, path: Path, endpoint: str, window: str = "24h") -> str:
        async def ask(client: BatchClient) -> str:
            file = await client.upload(path, lambda _: None)
            batch = await client.create(file["id"], endpoint, window, {})
            return str(batch["id"])

        return str(await self.asked(ask))

    async def batch(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.asked(lambda client: client.batch(batch_id))
        return found

    async def over(self, batch_id: str, *, within_s: float) -> dict[str, Any]:
        async with asyncio.timeout(within_s):
            while (batch := await self.batch(batch_id))["status"] not in OVER:  # noqa: ASYNC110 - another process
                await asyncio.sleep(_POLL_S)
        return batch

    async def lines(self, batch: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """Of the `output` or the `error` file."""
        if (file_id := batch[f"{name}_file_id"]) is None:
            return []

        async def ask(client: BatchClient) -> bytes:
            pieces: list[bytes] = []
            await client.download(file_id, pieces.append, lambda _: None)
            return b"".join(pieces)

        return [orjson.loads(line) for line in (await self.asked(ask)).splitlines()]

    def generated_tokens(self) -> int:
        """By all servers in all their lives."""
        counters = (engine.machine.counters for engine in self.fleet.engines.values())
        return self._before + sum(each.generated_tokens for each in counters)

    async def kill_server(self, name: str) -> None:
        counters = self.fleet.engines[name].machine.counters
        before = counters.generated_tokens
        await self.fleet.kill(name)
        await self.fleet.restart(name)
        after = self.fleet.engines[name].machine.counters.generated_tokens
        self._before += before - after


def config_text(workers: str, *, batch: str = "", sections: str = "") -> str:
    return f'[batch]\nfolder = "batches"\n{batch}\n[log]\nrequests = false\n{sections}\n{workers}'


@asynccontextmanager
async def standing(
    folder: Path,
    servers: Iterable[ServerSpec],
    *,
    gateways: int = 1,
    batch: str = "",
    sections: str = "",
) -> AsyncIterator[BatchSite]:
    """`batch` holds more keys of [batch], such as a database that the gateways share."""
    async with EmulatedFleet(tuple(servers)) as fleet:
        config = folder / "config.toml"
        config.write_text(config_text(fleet.toml(), batch=batch, sections=sections))
        with all_stopped() as started:
            made = [GatewayProcess(f"gateway-{i}", config, started) for i in range(1, gateways + 1)]
            for gateway in made:
                gateway.start()
            for gateway in made:
                await gateway.listens()
            yield BatchSite(fleet, made)


def write_rows(path: Path, rows: int, endpoint: str, bodies: Iterable[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        for number, body in zip(range(rows), bodies, strict=False):
            row = {
                "custom_id": f"row-{number}",
                "method": "POST",
                "url": endpoint,
                "body": body,
            }
            file.write(orjson.dumps(row) + b"\n")


def faults_in(rows: int, lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What must not be: nothing, one hopes."""
    seen = Counter(str(line["custom_id"]) for line in lines)
    wanted = {f"row-{number}" for number in range(rows)}
    return {
        "lost": len(wanted - seen.keys()),
        "doubled": sum(count - 1 for count in seen.values()),
        "unknown": len(seen.keys() - wanted),
    }


def few_servers(seats: int, *, prefill: int = 1) -> str:
    """So many seats for offline work: the fleet is one process, and with too many, what is
    measured is how busy that is."""
    servers = (
        *((f"prefill-{number}", "prefill", "relaxed") for number in range(1, prefill + 1)),
        ("strict", "decode", "strict"),
        ("relaxed", "decode", "relaxed"),
    )
    tables = [
        f'[[server]]\nname = "{name}"\nrole = "{role}"\npool = "{pool}"\n'
        for name, role, pool in servers
    ]
    return f"{''.join(tables)}max_running = {seats}\n"


@asynccontextmanager
async def apart(
    folder: Path, *, servers: str = "", batch: str = "", pinned: bool = False
) -> AsyncIterator[GatewayProcess]:
    """The fleet and the gateway, each a process of its own; `batch` holds more keys of [batch].
    `pinned`: as `cores_shared_out` has it."""
    with all_stopped() as started, cores_shared_out(pinned=pinned) as gateways_core:
        workers = ""
        if servers:
            (folder / "servers.toml").write_text(servers)
            command = [sys.executable, "-m", "gateway", "emulate", "--config"]
            fleet = start("fleet", [*command, str(folder / "servers.toml")], cwd=ROOT)
            started.append(fleet)
            await _until(lambda: "[[worker]]" in fleet.last_words(10_000))
            words = fleet.last_words(10_000)
            workers = words[words.index("[[worker]]") :]
        config = folder / "config.toml"
        config.write_text(config_text(workers, batch=batch))
        gateway = GatewayProcess("gateway", config, started)
        with gateways_core():
            gateway.start()
        await gateway.listens()
        yield gateway


async def _until(holds: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


async def submitted(client: BatchClient, path: Path) -> str:
    file = await client.upload(path, lambda _: None)
    return str((await client.create(file["id"], CHAT, "24h", {}))["id"])


async def becomes(
    client: BatchClient, batch_id: str, statuses: Sequence[str], within_s: float = 900.0
) -> dict[str, Any]:
    async with asyncio.timeout(within_s):
        while (batch := await client.batch(batch_id))["status"] not in statuses:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    return batch


async def all_cancelled(client: BatchClient) -> None:
    for batch in (await client.page(100, None))["data"]:
        if batch["status"] in ("validating", "in_progress"):
            await client.cancel(batch["id"])
        if batch["status"] not in OVER:
            await becomes(client, batch["id"], sorted(OVER))


def chats(rng: random.Random, tokens: int, words: int = 60) -> Iterator[dict[str, Any]]:
    while True:
        text = " ".join(str(rng.randrange(10_000)) for _ in range(words))
        yield {
            "model": "emulated",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "ignore_eos": True,
        }


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
