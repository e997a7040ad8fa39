"""A small fleet in virtual time behind the real core and driver, with a random day of traffic."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

from backends.engine import Engine, EngineConfig, Fabric, named_prompt
from backends.simulated import Grid, SimulatedBackend, Work, load_of, worker_of
from backends.steptimes import LinearStepTimes, Noisy
from gateway.core import Core, Rules
from gateway.driver import Driver
from policies.clock import Clock
from policies.events import Arrived, Decision, LoadReport
from policies.order import Edf
from policies.pools import ByLatency
from policies.retry import RetryRule
from policies.types import Job, Kind, Pool, Role, Worker
from tests.gateway.talk import offline, online

RULES = Rules(order=Edf(), pools=ByLatency(), retry=RetryRule(backoff_us=100_000))
POLL_S = 0.5


class Fleet:
    """Engines, backend, driver and core on one clock; decisions are kept as they fall."""

    def __init__(
        self,
        clock: Clock,
        roles: Iterable[Role] = (Role.PREFILL, Role.DECODE, Role.DECODE, Role.UNIFIED),
        rules: Rules = RULES,
        seed: int = 0,
        kv_tokens: int = 8000,
    ) -> None:
        self.clock = Grid(clock)
        self.trace: list[tuple[int, Decision]] = []
        self._open = 0
        self.over = asyncio.Event()
        fabric = Fabric(self.clock)
        engines = []
        for i, role in enumerate(roles):
            config = EngineConfig(
                name=f"{role.value}{i}",
                role=role,
                model="",
                bootstrap_port=9000 + i,
                kv_tokens=kv_tokens,
                max_running=16,
                chunk_tokens=2048,
                heartbeat_s=1.0,
            )
            times = Noisy(LinearStepTimes(), random.Random(seed * 100 + i))
            engines.append(Engine(config, self.clock, times, fabric))
        self.backend = SimulatedBackend(engines, self.clock)
        self.core = Core(rules, [self.worker(engine) for engine in engines])
        self.driver = Driver(self.core, self.clock, self.backend, self._observe)

    @staticmethod
    def worker(engine: Engine) -> Worker:
        """The last server of each kind is a relaxed one."""
        worker = worker_of(engine)
        pool = Pool.STRICT if engine.name == "decode1" else Pool.RELAXED
        return Worker(**{f: getattr(worker, f) for f in worker.__slots__} | {"pool": pool})

    def _observe(self, now_us: int, decision: Decision) -> None:
        self.trace.append((now_us, decision))

    def ask(self, job: Job, answer_tokens: int = 10) -> None:
        """The job arrives at its own time."""
        prompt = named_prompt((job.id, job.prompt_tokens))
        work = Work(prompt=prompt, answer_tokens=answer_tokens)
        self.clock.call_at(job.arrival_us / 1e6, self._arrive, job, work)
        self._open += 1

    def _arrive(self, job: Job, work: Work) -> None:
        self._open -= 1
        self.backend.open(job.id, work)
        self.driver.post(Arrived(job))

    def at(self, seconds: float, callback: object, *args: object) -> None:
        self.clock.call_at(seconds, callback, *args)  # type: ignore[arg-type]  # any callable

    def poll(self) -> None:
        """Loads are reported until the last job has ended."""
        now_us = round(self.clock.time() * 1e6)
        for name, engine in self.backend.engines.items():
            if engine.alive:
                self.driver.post(LoadReport(name, load_of(engine, now_us)))
        if self._open or len(self.backend):
            self.clock.call_at(self.clock.time() + POLL_S, self.poll)
        else:
            self.over.set()


def traffic(seed: int, count: int) -> list[tuple[Job, int]]:
    """Jobs of both kinds and the lengths of their answers, which no policy sees."""
    rng = random.Random(seed)
    now_us, jobs = 0, []
    for i in range(count):
        now_us += round(rng.expovariate(1 / 8_000)) // 1000 * 1000
        make = online if rng.random() < 0.6 else offline
        job = make(f"j{i:03}", rng.randint(20, 2000), now_us, max_tokens=rng.randint(4, 24))
        jobs.append((job, rng.randint(1, 16)))
    return jobs


def left_over(fleet: Fleet) -> dict[str, object]:
    """What should be nothing once all jobs have ended."""
    ledgers = fleet.core.ledgers.values()
    left = {
        "jobs": len(fleet.core),
        "work": len(fleet.backend),
        "residents": sum(len(engine.residents) for engine in fleet.backend.engines.values()),
        "placed": sum(fleet.core.placed(kind) for kind in Kind),
        "tokens": sum(abs(e.prefill_tokens) + abs(e.reserved_tokens) for e in ledgers),
        "context": sum(abs(e.context_tokens) for e in ledgers),
    }
    return {name: value for name, value in left.items() if value}
