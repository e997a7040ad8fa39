"""The gateway as a whole: its parts are built, kept while it serves, and taken down in order."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from backends.actuators.relaunch import Relauncher
from backends.actuators.sglang import SglangTurn
from backends.actuators.turning import Turning, UnfitError
from backends.http import Upstream
from backends.pause import pause
from backends.sglang import Sglang
from gateway.actuation import ACTUATOR_KEYS, Surroundings
from gateway.actuator_demands import demand, turn_for
from gateway.batches import batches
from gateway.changes import changed_keys
from gateway.config import (
    Config,
    ConfigError,
    RatioSettings,
    WorkerEntry,
    patience_of,
    refuse_itself,
    worker_of,
    workers_of,
)
from gateway.core import Core
from gateway.door import Door
from gateway.driver import Driver
from gateway.engine_gauges import EngineGauges
from gateway.engine_link import EngineLink
from gateway.front import Front
from gateway.listening import listening
from gateway.log import WriteRequest, configure
from gateway.metrics import Metrics
from gateway.pages import Pages
from gateway.passing import Passing
from gateway.probe import Prober
from gateway.ratio_control import RatioControl
from gateway.relaxed import RelaxedWatch
from gateway.roll import Roll
from gateway.router import Router
from gateway.rulebook import rules_of
from policies.clock import Clock
from policies.events import Event, Wakeup, WorkerGone
from policies.types import Worker

log = structlog.get_logger("slackwater")

_FIRST_LOOK_S = 3.0
"""How long a start waits for servers to answer their first probe."""
_WATCH_S = 0.5
_DRAIN_POLL_S = 0.05
_LET_GO_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The configuration as flags and file give it, and what an operator may not expect of it."""

    config: Config
    is_emulated: bool = False
    """It names no server, so that the emulated ones are in their place."""
    flags_hide_workers: bool = False
    """The file names servers, and so do the flags, which go before it."""


class Gateway:
    """Everything between a socket that listens and the servers behind it."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        rng: random.Random,
        tasks: asyncio.TaskGroup,
        write_line: WriteRequest,
        *,
        fleet: Relauncher | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._rng = rng
        self._tasks = tasks
        self._has_fleet = fleet is not None
        self.backend = Sglang(clock, rng, patience_of(config.timeouts), self._connect)
        self.core = Core(rules_of(config))
        self.link = EngineLink(
            self._post, self.core, clock, tasks, config.classes.online.tpot_ms * 1e3
        )
        self.link.settings = config.plugin
        self.prober = Prober(self.backend, self._post, clock, config.telemetry, self.link.meet)
        self.roll = Roll(self.backend, self.prober, self._post, tasks, self.link.forget)
        around = Surroundings(
            backend=self.backend, clock=clock, rng=rng, tasks=tasks, roll=self.roll, fleet=fleet
        )
        turn = turn_for(config.ratio, around)
        self._actuator = Turning(turn, self.backend, clock, tasks, self.roll)
        self.control = RatioControl(self.core, clock, tasks, turn)
        self.driver = Driver(
            self.core, clock, self.backend, self.control.decided, actuator=self._actuator
        )
        self.control.adopt(config, self.driver)
        self.relaxed = RelaxedWatch(self.core, clock, config)
        self.metrics = Metrics(self.core, self.backend.now_us)
        self.metrics.registry.register(self.control)
        self.metrics.registry.register(EngineGauges(self.link.heard))
        self.front = Front(config, self.driver, self.backend, self.metrics, clock, rng, write_line)
        self._passing = Passing(self.front, self.core, self.backend, clock, rng)
        self.batches = batches(
            config.batch, self.front, self._passing, self.backend.runs, self.metrics, clock, rng
        )
        self._entries: dict[str, WorkerEntry] = {}
        self._runner: web.ServerRunner | None = None
        self.hurry = False
        """A drain waits for nobody any more."""
        self.port = 0

    async def start(self) -> None:
        """Listens once each server was asked for the first time; one that is down may come."""
        self._refuse_itself(self._config)
        try:
            await self._actuator.turn.open()
        except UnfitError as error:
            raise ConfigError(str(error)) from None
        looks = [self._add(entry) for entry in self._config.worker]
        await self._wait_for_first_looks(looks)
        pages = self.pages()
        more = [] if self.batches is None else self.batches.routes()
        if self.batches is not None:
            await self.batches.start(self._tasks)
        server = self._config.server
        listener = Door(
            Router([*self.front.routes(), *pages.routes(), *more]),
            request_factory=partial(_request, round(server.max_body_mb * 1_048_576)),
            access_log=None,
            handler_cancellation=True,
            logger=_wire_log(),
            keepalive_timeout=server.header_timeout_s,
        )
        self._say_what_predicts()
        self.relaxed.start()
        self._runner = web.ServerRunner(listener, shutdown_timeout=1.0)
        await self._runner.setup()
        with listening(server):
            await web.TCPSite(self._runner, server.host, server.port, backlog=4096).start()
        self.port = self._runner.addresses[0][1]
        log.info("listening", host=server.host, port=self.port, workers=len(self._entries))

    def _post(self, event: Event) -> None:
        self.driver.post(event)

    def pages(self) -> Pages:
        return Pages(
            self._config,
            self.front,
            self.driver,
            self.backend,
            self.prober,
            self.metrics,
            self._passing,
            self._tasks,
            self.link.forget,
        )

    def _say_what_predicts(self) -> None:
        ledgers = self.core.ledgers
        unknown = sorted(name for name, ledger in ledgers.items() if ledger.steps is None)
        if unknown:
            log.info(
                "no model and device under [cost] for some servers: their step times are ranked "
                "in the proportions of an 8B model on an H100, prefill times by what is seen",
                workers=unknown,
            )

    async def _wait_for_first_looks(self, looks: list[asyncio.Event]) -> None:
        try:
            async with asyncio.timeout(_FIRST_LOOK_S):
                for look in looks:
                    await look.wait()
        except TimeoutError:
            log.warning("some servers have not answered yet: going on without them")

    def _connect(self, worker: Worker, api_key: str) -> Upstream:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        return Upstream(
            worker.url, connect_timeout_s=self._config.timeouts.connect_s, headers=headers
        )

    def _add(self, entry: WorkerEntry) -> asyncio.Event:
        worker = worker_of(entry, "worker")
        known = self.core.ledgers.get(worker.name)
        self._entries[worker.name] = entry
        server = self.backend.add(worker, entry.api_key)
        if known is None or known.worker.url != worker.url:
            self.prober.expect(worker)
        return self.prober.watch(server, worker, self._tasks)

    def _remove(self, name: str) -> None:
        del self._entries[name]
        self.prober.forget(name)
        self.link.forget(name)
        self.driver.post(WorkerGone(name))
        self.backend.remove(name)

    def adopt(self, config: Config) -> list[str]:
        """A new configuration, without dropping a request; the keys that it has changed."""
        self._refuse_itself(config)
        running = self._config.server
        if asleep := changed_keys(running, config.server, "server."):
            log.warning("[server] has changed: that needs a restart", keys=asleep)
        batch = self._config.batch
        ratio = self._with_its_actuator(config.ratio)
        if config.batch != batch:
            log.warning("[batch] has changed: that needs a restart")
        config = replace(config, server=running, batch=batch, ratio=ratio)
        changed = changed_keys(self._config, config)
        self._config = config
        self.core.adopt(rules_of(config))
        self._tell_actuator(config)
        self.control.adopt(config, self.driver)
        self.driver.post(Wakeup())
        self.front.adopt(config)
        self.relaxed.adopt(config)
        self.backend.patience = patience_of(config.timeouts)
        self.prober.settings = config.telemetry
        self._tell_engines(config)
        wanted = {worker_of(entry, "worker").name: entry for entry in config.worker}
        # Those that come are there before others go: what waits for a server goes on waiting.
        for name, entry in wanted.items():
            if self._entries.get(name) != entry:
                self._add(entry)
        for name in list(self._entries):
            if name not in wanted:
                self._remove(name)
        return changed

    def _with_its_actuator(self, wanted: RatioSettings) -> RatioSettings:
        """Moves may be under way in it."""
        ours = self._config.ratio
        running = replace(wanted, **{key: getattr(ours, key) for key in ACTUATOR_KEYS})
        if asleep := changed_keys(running, wanted, "ratio."):
            log.warning("the actuator's settings have changed: that needs a restart", keys=asleep)
        demand(running, has_fleet=self._has_fleet)
        return running

    def _tell_engines(self, config: Config) -> None:
        """Those that have the plug-in are asked anew where something has changed for them."""
        tpot_us = config.classes.online.tpot_ms * 1e3
        if (config.plugin, tpot_us) != (self.link.settings, self.link.tpot_us):
            self.link.settings, self.link.tpot_us = config.plugin, tpot_us
            for server in self.backend.servers():
                if server.is_known and server.name in self.link.heard:
                    server.is_known, server.is_doubted = False, True

    def _tell_actuator(self, config: Config) -> None:
        if isinstance(turn := self._actuator.turn, SglangTurn):
            turn.switch_s = config.ratio.switch_s
            turn.graph_memory_gb = config.ratio.decode_cuda_graph_memory_gb

    def _refuse_itself(self, config: Config) -> None:
        listens = self._config.server
        for worker in workers_of(config):
            refuse_itself(worker, listens.host, self.port or listens.port)

    async def drain(self) -> None:
        """No new requests; those under way may end until the time for it is over."""
        self.front.draining = True
        if self.batches is not None:
            self.batches.drain(min(self._config.server.drain_s, self._config.batch.drain_s))
        until_s = self._clock.time() + self._config.server.drain_s
        log.info("draining", requests=len(self.front), for_s=self._config.server.drain_s)
        while len(self.front) and self._clock.time() < until_s and not self.hurry:
            await pause(self._clock, _DRAIN_POLL_S)
        if len(self.front):
            log.warning("cutting off what still runs", requests=len(self.front))
            self.front.cut_off()
            await pause(self._clock, _DRAIN_POLL_S)

    async def close(self) -> None:
        self.prober.close()
        self.relaxed.close()
        self.link.close()
        await self._let_all_go()
        self.control.close()
        await self._actuator.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self.batches is not None:
            await self.batches.close()
        self.backend.close()

    async def _let_all_go(self) -> None:
        """No server is left standing still that would answer."""
        standstill = self.backend.standstill
        standstill.let_all_go()
        until_s = self._clock.time() + _LET_GO_S
        while not standstill.is_settled and self._clock.time() < until_s:
            await pause(self._clock, _DRAIN_POLL_S)


async def run(
    read: Callable[[], Reading],
    path: Path | None,
    clock: Clock,
    rng: random.Random,
    greet: Callable[[int], object] = lambda port: None,
    *,
    fleet: Relauncher | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends it at once.

    `read` gives the configuration, now and whenever the file at `path` has changed; `greet` is
    told the port.
    """
    loop = asyncio.get_running_loop()
    stop, reload = asyncio.Event(), asyncio.Event()
    reading = read()
    write_line = configure(reading.config.log)
    async with asyncio.TaskGroup() as tasks:
        gateway = Gateway(reading.config, clock, rng, tasks, write_line, fleet=fleet)
        await gateway.start()
        greet(gateway.port)
        _say_whose_servers(reading)
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, _stop, stop, gateway)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        watcher = None
        if path is not None:
            reader = _Reader(gateway, read, reading)
            watcher = tasks.create_task(_watch(path, reload, clock, reader.adopt))
        await stop.wait()
        if watcher is not None:
            watcher.cancel()
        await gateway.drain()
        await gateway.close()


class _Reader:
    """Brings new readings in; whose servers answer is said again only when that has changed."""

    def __init__(self, gateway: Gateway, read: Callable[[], Reading], first: Reading) -> None:
        self._gateway = gateway
        self._read = read
        self._said = _whose_servers(first)

    def adopt(self) -> list[str]:
        reading = self._read()
        changed = self._gateway.adopt(reading.config)
        if (whose := _whose_servers(reading)) != self._said:
            self._said = whose
            _say_whose_servers(reading)
        return changed


def _whose_servers(reading: Reading) -> tuple[bool, bool, bool]:
    return reading.is_emulated, reading.flags_hide_workers, bool(reading.config.worker)


def _say_whose_servers(reading: Reading) -> None:
    workers = [worker.name for worker in workers_of(reading.config)]
    if reading.is_emulated:
        log.warning("no server is configured: the emulated ones answer", workers=workers)
    elif reading.flags_hide_workers:
        log.warning(
            "flags name the servers: the [[worker]] tables of the file do not count",
            workers=workers,
        )
    elif not workers:
        log.warning("no server is configured: requests are answered 503")


def _stop(stop: asyncio.Event, gateway: Gateway) -> None:
    if stop.is_set():
        gateway.hurry = True
        if gateway.batches is not None:
            gateway.batches.hurry()
    stop.set()


async def _watch(
    path: Path, reload: asyncio.Event, clock: Clock, adopt: Callable[[], list[str]]
) -> None:
    """SIGHUP, or a file that is not what it was, brings the new configuration in.

    A file that changes from one look to the next is still being written: half of one may be a
    configuration, too, of other servers or none.
    """
    seen = last = _stamp(path)
    while True:
        await pause(clock, _WATCH_S)
        last, stamp = _stamp(path), last
        is_new = stamp == last and stamp != seen
        if not (reload.is_set() or is_new):
            continue
        reload.clear()
        seen = last
        try:
            _refuse_to_wait_for(path)
            changed = adopt()
        except ConfigError as error:
            log.error("the new configuration is refused, the old one stays", error=str(error))
        except Exception:  # the watch's edge: a bug in a reload must not end the gateway
            log.exception("the new configuration could not be taken over")
        else:
            log.info("configuration reloaded", path=str(path), changed=changed)


def _wire_log() -> logging.Logger:
    """What aiohttp has to say: that a client does not speak HTTP is no error of ours."""
    logger = logging.getLogger("slackwater.http")
    if not logger.filters:
        logger.addFilter(_is_ours)
    return logger


def _is_ours(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


def _refuse_to_wait_for(path: Path) -> None:
    """Whoever reads a pipe waits for its writer, and everybody here would wait with it."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"cannot read {path}: not a file")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def _request(max_body_bytes: int, *parts: Any) -> web.BaseRequest:
    """As aiohttp makes it, with our limit on the body."""
    message, payload, protocol, writer, task = parts
    loop = asyncio.get_running_loop()
    return web.BaseRequest(
        message, payload, protocol, writer, task, loop, client_max_size=max_body_bytes
    )
