"""Where the plug-in is tried: real servers that have loaded it, unified or as a pair."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.fleet.spec import FleetSpec, Group
from policies.types import Role
from tests.conformance.sglang_fleet import RealServers
from tests.conformance.under_test import Client, Leg, until

KV_TOKENS = 2048
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
"""SGLang's own switch for tests: each 40 steps a request is taken off, and comes back."""
CHUNK_TOKENS = 64
STEP_S = 0.02
"""A step's floor where a test must act in the midst of something."""
FLOOR_S = 0.005
"""Of every step, so that requests run side by side on any machine."""
MODES = {"all": 0, "online-first": 1, "slack": 2, "random": 90, "faulty": 91}
_SMALL = ("--chunked-prefill-size", str(CHUNK_TOKENS))
_GRAMMAR = ("--grammar-backend", "xgrammar")
_WAITING = "--disable-overlap-schedule"
_DECODE = ("--num-reserved-decode-tokens", "32")

SERVERS = (
    Group(role=Role.UNIFIED, flags=(*_SMALL, *_GRAMMAR, _WAITING, "--enable-mixed-chunk")),
    Group(role=Role.UNIFIED, flags=(*_SMALL, *_GRAMMAR)),
    Group(role=Role.PREFILL, flags=_SMALL),
    Group(role=Role.DECODE, flags=(*_DECODE, _WAITING)),
    Group(role=Role.DECODE, flags=_DECODE),
)
"""One fleet: SGLang is imported but once, and both pairs share the server that prefills."""
GROUNDS = {
    "unified": (0, 0),
    "overlapping": (1, 1),
    "pair": (2, 3),
    "overlapping-pair": (2, 4),
}
"""Which servers compute prompts and answers."""


def spec(logs: Path) -> FleetSpec:
    return FleetSpec(
        logs=str(logs),
        kv_tokens=KV_TOKENS,
        overlap=True,
        plugin=True,
        env={"SLACKWATER_PLUGIN_DRILL": "1"},
        servers=SERVERS,
    )


class Ground:
    """The server whose steps are chosen, and the one before it where there are two."""

    def __init__(self, name: str, servers: RealServers) -> None:
        prefill, decode = GROUNDS[name]
        self.name = name
        self.servers = servers
        self.known: dict[str, dict[int, list[int]]] = {}
        """What stock SGLang answers here."""
        self.is_pair = prefill != decode
        self.overlaps = "overlapping" in name
        self.url = servers.servers[decode].url
        self.decode = self.relaxed = self.unified = self.url
        self.prefill = servers.servers[prefill].url
        """The server that computes prompts."""

    def bootstrap_port(self, url: str) -> int:
        return self.servers.bootstrap_port(url)

    async def kill(self, url: str) -> None:
        await self.servers.kill(url)

    async def start(self, url: str) -> None:
        await self.servers.start(url)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a wave."""

    ids: list[int]
    tokens: int
    offline: bool = False
    tpot_ms: float = 0.0
    sampling: dict[str, Any] | None = None
    more: dict[str, Any] | None = None


class Trial:
    """Requests to a ground, and its plug-in's state and settings."""

    def __init__(self, ground: Ground, client: Client) -> None:
        self.ground, self.client = ground, client
        self._rng = random.Random(ground.name)
        """The same asks in every test, so that stock SGLang is asked but once."""

    def asks(self, count: int, *, prompt: int = 150, tokens: int = 40, **more: Any) -> list[Ask]:
        """Of many lengths; every second one is offline."""
        return [
            Ask(
                self.prompt(20 + (i * 37) % prompt),
                tokens // 3 + (i * 13) % tokens,
                offline=i % 2 == 1,
                **more,
            )
            for i in range(count)
        ]

    def prompt(self, tokens: int) -> list[int]:
        return [self._rng.randint(20, 1000) for _ in range(tokens)]

    def send(self, ask: Ask, **more: Any) -> Leg:
        """The leg that answers."""
        told: dict[str, Any] = {"slackwater_class": "offline" if ask.offline else "online"}
        if ask.tpot_ms:
            told["slackwater_tpot_ms"] = ask.tpot_ms
        sampling = {
            "max_new_tokens": ask.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": told,
            **(ask.sampling or {}),
        }
        body = {"sampling_params": sampling, **(ask.more or {}), **more}
        client, ground = self.client, self.ground
        if not ground.is_pair:
            return client.generate(ground.url, ask.ids, ask.tokens, **body)
        return client.pair(ask.ids, ask.tokens, **body)[1]

    async def wave(self, asks: Sequence[Ask], *, every_s: float = 0.01) -> list[list[int]]:
        """What each was answered; they come one after another."""
        legs: list[Leg] = []
        for ask in asks:
            legs.append(self.send(ask))
            await asyncio.sleep(every_s)
        for leg in legs:
            await leg.task
            assert leg.finish["type"] in ("length", "stop"), leg.finish
        return [leg.ids for leg in legs]

    async def stock(self, asks: Sequence[Ask]) -> dict[int, list[int]]:
        """What SGLang answers by itself, of those to which it answers the same twice."""
        known = self.ground.known
        if (key := repr(asks)) not in known:
            await self.set("all")
            await self.slow(None)
            first, second = await self.wave(asks), await self.wave(asks)
            await self.slow(FLOOR_S)
            known[key] = {i: ids for i, ids in enumerate(first) if ids == second[i]}
            assert len(known[key]) >= 0.9 * len(asks)
        return known[key]

    async def same(self, asks: Sequence[Ask], stock: dict[int, list[int]]) -> None:
        """In the mode that was set, and with steps of fewer than all."""
        before = await self.state()
        got = await self.wave(asks)
        after = await self.state()
        assert [i for i, ids in stock.items() if got[i] != ids] == []
        assert after["views"] > before["views"], (before, after)
        assert after["features"]["decode"]["on"], after

    async def set(self, mode: str = "", url: str = "", **values: Any) -> None:
        told: dict[str, float] = {"slackwater_mode": MODES[mode]} if mode else {}
        told |= {f"slackwater_{name}": value for name, value in values.items()}
        url = url or self.ground.url
        status, answer = await self.client.post(url + "/set_internal_state", {"server_args": told})
        assert (status, answer) == (200, [True])

    async def state(self, url: str = "") -> dict[str, Any]:
        _, info = await self.client.get((url or self.ground.url) + "/server_info")
        state: dict[str, Any] = info["internal_states"][0]["slackwater"]
        return state

    async def until(self, key: str, value: int, url: str = "") -> None:
        await until(lambda: self.state(url), lambda state: state[key] >= value)

    async def waits(self, url: str) -> None:
        """Until a prompt waits for another's end."""
        await self.client.until(url, lambda load: load["queues"]["waiting"] > 0)

    async def slow(self, step_s: float | None) -> None:
        for url in {self.ground.url, self.ground.prefill}:
            await self.client.slow(url, step_s)

    async def retracted(self) -> float:
        _, told = await self.client.get(self.ground.url + "/metrics")
        lines = [line for line in told.splitlines() if "retracted_requests_total" in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#"))
