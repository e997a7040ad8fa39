"""Which engines do by themselves what the gateway would do from outside, and for how long.

A server that has our plug-in is told its mode and the shape of its steps, for the time of a lease;
what it took on is written into its worker, where the policies see it. Elsewhere, and whenever that
fails, the levers of stock SGLang stay in use.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import orjson
import structlog

from backends.base import Post
from backends.engine_words import MODES, NO_LINE, Feature, Heard, setting, states_of, told_line
from backends.fetch import fetch
from backends.http import HttpError
from backends.pause import pause
from backends.sglang import Server
from gateway.core import Core
from gateway.plugin_settings import OFF, PluginSettings
from policies.clock import Clock
from policies.ledger import SELECTS
from policies.types import Worker

log = structlog.get_logger("slackwater.worker")

ASK_S = 5.0
UNHEARD = "this gateway has no pyzmq: install it with the extra `plugin`"
BLIND = "it knows no step times yet, for want of a cost model here and of steps seen there"
BLIND_FOR_GOOD = "it knows no step times: it sees none without its `reports`, and [cost] tells none"
UNTAKEN = "it takes no settings from here: it is busy, or its admin key is not the worker's api_key"
STEPS_ALL = MODES[0]
_NUMBERS = {name: number for number, name in MODES.items()}

Hearing = Callable[[Post, Worker, Iterable[str]], Coroutine[Any, Any, None]]


class EngineLink:
    """One task a server that has the plug-in: it renews the lease and listens to the steps."""

    def __init__(
        self, post: Post, core: Core, clock: Clock, tasks: asyncio.TaskGroup, tpot_us: float
    ) -> None:
        self._post, self._core, self._clock, self._tasks = post, core, clock, tasks
        self._links: dict[str, asyncio.Task[None]] = {}
        self._said: dict[str, object] = {}
        self.heard: dict[str, Heard] = {}
        """What each server with a plug-in said of it last."""
        self.settings = PluginSettings()
        self.tpot_us = tpot_us
        self._hearing = hearing()

    async def meet(self, server: Server, info: Mapping[str, Any]) -> frozenset[str]:
        """What this engine does from now on; called whenever the server introduces itself."""
        name, heard = server.name, states_of(info)
        self._end(name)
        if heard is None:
            return frozenset()
        self.heard[name] = heard
        features = await self._push(server, heard)
        if features:
            self.heard[name] = replace(heard, mode=self._mode(features))
        self._say(name, heard, features)
        # Without features, too: whoever is busy answers late, and what failed may be tried again.
        if self._wanted(heard) or heard.faults or Feature.REPORTS in heard.features:
            self._links[name] = self._tasks.create_task(self._keep(server, heard, features))
        return features

    def forget(self, name: str) -> None:
        """Whoever comes under its name is met as somebody new."""
        self._said.pop(name, None)
        self._end(name)

    def _end(self, name: str) -> None:
        self.heard.pop(name, None)
        if (task := self._links.pop(name, None)) is not None:
            task.cancel()

    def close(self) -> None:
        for name in list(self._links):
            self.forget(name)

    async def _push(self, server: Server, heard: Heard) -> frozenset[str]:
        """What was taken on; nothing where the server does not take settings from us."""
        settings, wanted = self.settings, self._wanted(heard)
        values: dict[str, float] = {
            "mode": _NUMBERS[settings.decode] if Feature.DECODE in wanted else 0,
            "displace": int(Feature.PREFILL in wanted),
            "tpot_us": self.tpot_us,
            "hold_steps": settings.hold_steps,
            "most_parked_us": settings.most_parked_ms * 1e3,
            "lease_s": settings.lease_s,
            **self._line(server.name),
        }
        try:
            answer = await fetch(
                server.upstream,
                b"POST",
                b"/set_internal_state",
                setting(**values),
                timeout_s=ASK_S,
            )
            taken = orjson.loads(answer.body)
        except (HttpError, orjson.JSONDecodeError):
            return frozenset()
        if answer.status != 200 or not isinstance(taken, list) or not all(taken):
            return frozenset()
        return self._counted_on(server.name, heard)

    def _counted_on(self, name: str, heard: Heard) -> frozenset[str]:
        """Where an engine cannot tell how long steps are, everybody steps, and offline work is to
        be kept off from here as ever; `slack` minds targets, not who is online."""
        wanted = self._wanted(heard)
        if Feature.DECODE not in wanted or self.settings.decode != SELECTS:
            return wanted
        return wanted if self._is_blind(name, heard) else wanted | {SELECTS}

    def _is_blind(self, name: str, heard: Heard) -> bool:
        return not heard.knows_steps and self._line(name) == NO_LINE

    def _wanted(self, heard: Heard) -> frozenset[str]:
        settings = self.settings
        wants = {
            Feature.DECODE.value: settings.decode != OFF,
            Feature.PREFILL.value: settings.displace,
            Feature.REPORTS.value: settings.reports and self._hearing is not None,
        }
        return frozenset(name for name, is_on in wants.items() if is_on and name in heard.features)

    def _line(self, name: str) -> dict[str, float]:
        """The cost model's word on steps; without one the engine is to fit its own: of terms that
        were left out it would keep what another word, or gateway, had set."""
        ledger = self._core.ledgers.get(name)
        line = None if ledger is None or ledger.steps is None else ledger.steps.step_line
        return NO_LINE if line is None else told_line(line)

    def _mode(self, features: frozenset[str]) -> str:
        return self.settings.decode if Feature.DECODE in features else STEPS_ALL

    def _say(self, name: str, heard: Heard, features: frozenset[str]) -> None:
        """Once, and again when it has changed."""
        off = dict(heard.why_off)
        if self.settings.reports and self._hearing is None:
            off.setdefault(Feature.REPORTS.value, UNHEARD)
        off |= dict.fromkeys(self._wanted(heard) - features, UNTAKEN)
        uses = features - {SELECTS}
        if Feature.DECODE in uses and self._is_blind(name, heard):
            uses -= {Feature.DECODE}
            off[Feature.DECODE.value] = (
                BLIND if Feature.REPORTS in heard.features else BLIND_FOR_GOOD
            )
        mode = self._mode(features)
        said = (uses, mode, tuple(off.items()))
        if self._said.get(name) != said:
            self._said[name] = said
            log.info("engine plug-in", worker=name, uses=sorted(uses), mode=mode, off=off)

    async def _keep(self, server: Server, heard: Heard, features: frozenset[str]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                listening: asyncio.Task[None] | None = None
                if Feature.REPORTS in features and self._hearing is not None:
                    hearing_on = self._hearing(self._post, server.worker, heard.reports)
                    listening = group.create_task(hearing_on)
                await self._renew(server, features)
                if listening is not None:
                    listening.cancel()  # the next introduction begins anew
        except Exception as error:  # noqa: BLE001  # the task's edge: one odd server ends no other
            log.warning("engine plug-in is lost", worker=server.name, error=repr(error))
            _doubt(server)

    async def _renew(self, server: Server, features: frozenset[str]) -> None:
        """Until the engine is not what it was, or has not said so for as long as a lease goes."""
        lease_s = self.settings.lease_s
        over_s = self._clock.time() + lease_s
        while True:
            await pause(self._clock, lease_s / 3)
            stands = await self._stands(server, features)
            if stands:
                over_s = self._clock.time() + lease_s
            elif stands is False or self._clock.time() >= over_s:
                _doubt(server)
                return

    async def _stands(self, server: Server, features: frozenset[str]) -> bool | None:
        """Whether the engine is what it was; None where it has not said."""
        try:
            answer = await fetch(server.upstream, b"GET", b"/server_info", timeout_s=ASK_S)
            told = orjson.loads(answer.body)
        except (HttpError, orjson.JSONDecodeError):
            return None
        if answer.status != 200:
            return None
        if (heard := states_of(told)) is None:
            return False
        taken = await self._push(server, heard)
        if taken != features:
            wanted = self._counted_on(server.name, heard)
            return False if taken or wanted != features else None
        self.heard[server.name] = heard
        self._say(server.name, heard, features)
        return True


def hearing() -> Hearing | None:
    """None where pyzmq is not installed: not every gateway has engines that report."""
    try:
        module = importlib.import_module("gateway.step_reports")
    except ModuleNotFoundError as error:
        if error.name != "zmq":
            raise
        return None
    return cast("Hearing", module.heard)


def _doubt(server: Server) -> None:
    """The prober asks it anew; it is in use meanwhile."""
    server.is_known, server.is_doubted = False, True
