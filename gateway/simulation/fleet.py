"""The servers of a scenario as engines: how large each is, and how long its steps take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from backends.engine import Engine, EngineConfig, Fabric, patched
from backends.simulated import worker_of
from backends.steptimes import FittedStepTimes, Noisy, StepTimes, read_table
from gateway.predict import read_model
from gateway.scenario import FitEntry, FleetEntry, ServerEntry
from gateway.settings import ConfigError
from policies.clock import Clock
from policies.constants import Constants, ConstantsError, lookup
from policies.devices import UnknownDevice, device_named
from policies.models import ModelError
from policies.roofline import CostModel, DoesNotFit, Parallel, build, prefill_batch
from policies.shipped import SHIPPED
from policies.sizing import capacity_tokens
from policies.types import Role, Worker

FIRST_BOOTSTRAP_PORT = 9000
BELIEVED = 1.1
"""How far an engine's own belief about its steps is from the truth, before it has seen any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """One server before there is an engine."""

    entry: ServerEntry
    config: EngineConfig
    times: StepTimes
    times_source: str
    believed: StepTimes
    """What a patched engine takes its steps to be, before it has seen any."""
    gpus: int

    @property
    def paid_from_s(self) -> float | None:
        """None: it is not started."""
        return None if self.entry.parked else self.entry.joins_s

    @property
    def serves_from_s(self) -> float:
        return self.entry.joins_s + self.entry.start_up_s if self.entry.joins_s else 0.0


@dataclass(frozen=True, slots=True)
class Modelled:
    """Step times by the cost model, for machines that nobody has measured here."""

    cost: CostModel

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.cost.cost(prefill_batch(chunks)).seconds

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return self.cost.decode(batch, context_tokens).seconds


def stock(plan: ServerPlan, clock: Clock, times: StepTimes, fabric: Fabric) -> Engine:
    engine = Engine(plan.config, clock, times, fabric)
    engine.leaps = True
    return engine


def with_more(plan: ServerPlan, clock: Clock, times: StepTimes, fabric: Fabric) -> Engine:
    """Every step is decided on its own, so none are counted together."""
    return patched(plan.config, clock, times, fabric, plan.believed)


ENGINES: dict[str, Callable[[ServerPlan, Clock, StepTimes, Fabric], Engine]] = {
    "stock": stock,
    "patched": with_more,
}
"""The engine of each mode that a scenario may name."""


def moved(constants: Constants) -> Constants:
    """A machine some percent worse than predictions take it to be, and not evenly so."""
    return replace(
        constants,
        gemm_efficiency=constants.gemm_efficiency * 0.93,
        attention_efficiency=constants.attention_efficiency * 0.88,
        weight_efficiency=constants.weight_efficiency * 0.95,
        kv_efficiency=constants.kv_efficiency * 0.92,
        prefill_layer_us=constants.prefill_layer_us * 1.2,
        decode_layer_us=constants.decode_layer_us * 1.1,
        source=f"{constants.source}; moved away from by 5 to 20 %",
    )


def servers_of(fleet: FleetEntry, data: Path) -> list[ServerPlan]:
    plans: list[ServerPlan] = []
    for entry in fleet.server:
        try:
            like = _plan(fleet, entry, data)
        except (ConstantsError, DoesNotFit, ModelError, UnknownDevice, ValueError) as error:
            raise ConfigError(f"fleet {fleet.name!r}: {error}") from error
        for number in range(1, entry.count + 1):
            name = f"{entry.name or entry.role}-{number}"
            port = FIRST_BOOTSTRAP_PORT + len(plans)
            host = f"{entry.host}-{number}" if entry.host else ""
            config = replace(like.config, name=name, host=host, bootstrap_port=port)
            plans.append(replace(like, config=config))
    names = [plan.config.name for plan in plans]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"fleet {fleet.name!r}: two servers are called {doubled[0]!r}")
    return _paid_once(plans)


def _paid_once(plans: list[ServerPlan]) -> list[ServerPlan]:
    """A GPU that is shared counts with the first of its servers."""
    hosts = [plan.config.host for plan in plans]
    return [
        replace(plan, gpus=0) if host and host in hosts[:index] else plan
        for index, (plan, host) in enumerate(zip(plans, hosts, strict=True))
    ]


def _plan(fleet: FleetEntry, entry: ServerEntry, data: Path) -> ServerPlan:
    tp = entry.tp or fleet.tp
    device = device_named(entry.device or fleet.device)
    model = read_model(entry.model or fleet.model)
    constants = lookup(SHIPPED, device.name, model.family, tp)
    cost = build(model, device, moved(constants), Parallel(tp=tp))
    times, source = _times(fleet, entry, data, cost, tp)
    believed: StepTimes = Modelled(build(model, device, constants, Parallel(tp=tp)))
    if fleet.fit.prefill_token_us:
        believed = fitted(fleet.fit, error=BELIEVED)
    if entry.host and not entry.kv_tokens:
        raise ValueError("servers that share a GPU (`host`) need `kv_tokens`")
    config = EngineConfig(
        role=entry.role,
        model="",
        kv_tokens=entry.kv_tokens or capacity_tokens(cost),
        max_running=entry.max_running,
        chunk_tokens=entry.chunk_tokens,
        page_tokens=entry.page_tokens,
        schedule_policy=entry.schedule_policy,
        straggler=fleet.straggler,
        packing=fleet.packing,
        prefill_order=fleet.prefill_order,
        interrupt_layers=model.layers if fleet.interrupt else 0,
        context_tokens=entry.context_tokens,
        kv_bytes_per_token=round(cost.kv_bytes_per_token),
        link_bytes_per_s=entry.link_gb_s * 1e9,
        link_latency_s=entry.link_latency_ms / 1e3,
        ingest_s=entry.ingest_ms / 1e3,
        role_switch_s=entry.role_switch_s,
        priority=entry.priority,
    )
    return ServerPlan(
        entry=entry,
        config=config,
        times=times,
        times_source=source,
        believed=believed,
        gpus=tp,
    )


def fitted(fit: FitEntry, *, error: float = 1.0) -> FittedStepTimes:
    """With `error`, fixed costs are that factor too small and those of tokens too large."""
    return FittedStepTimes(
        prefill_base_s=fit.prefill_ms * 1e-3 / error,
        prefill_token_s=fit.prefill_token_us * 1e-6 * error,
        prefill_pair_s=fit.prefill_pair_ns * 1e-9 / error,
        decode_base_s=fit.decode_ms * 1e-3 / error,
        decode_context_token_s=fit.decode_token_us * 1e-6 * error,
        decode_sequence_s=fit.decode_sequence_us * 1e-6 * error,
        decode_experts_s=fit.decode_experts_ms * 1e-3 / error,
        experts=fit.experts,
        experts_per_token=fit.experts_per_token,
    )


def _times(
    fleet: FleetEntry, entry: ServerEntry, data: Path, cost: CostModel, tp: int
) -> tuple[StepTimes, str]:
    """Measured steps belong to the fleet's own machine; a server that differs is modelled."""
    if fleet.fit.prefill_token_us:
        return fitted(fleet.fit), "the constants of the scenario's fit"
    path = data / fleet.table
    is_the_fleets = not (entry.device or entry.model) and tp == fleet.tp
    if fleet.table and is_the_fleets and path.is_file():
        system, model = fleet.table_system, fleet.table_model
        table = read_table(path, system=system, model=model, tp=tp)
        return table, f"measured: {model} tp{tp} on {system}, {path.name}"
    absent = f"{path} is not there; " if fleet.table and is_the_fleets else ""
    return Modelled(cost), f"{absent}cost model: {cost.source}"


def capacities(plans: Sequence[ServerPlan]) -> dict[Role, int]:
    """The largest request that some server of each role can hold, prompt and answer together."""
    largest: dict[Role, int] = {}
    for plan in plans:
        role = plan.config.role
        largest[role] = max(largest.get(role, 0), plan.config.max_request_tokens)
    return largest


def fits(prompt_tokens: int, output_tokens: int, largest: dict[Role, int]) -> bool:
    both = prompt_tokens + output_tokens
    if both <= largest.get(Role.UNIFIED, 0):
        return True
    return prompt_tokens < largest.get(Role.PREFILL, 0) and both <= largest.get(Role.DECODE, 0)


def engines_of(
    plans: Sequence[ServerPlan], fleet: FleetEntry, clock: Clock, random: Random
) -> list[Engine]:
    """Each with noise of its own, so that one more step on one moves no other."""
    noise, kind = fleet.noise, ENGINES[fleet.mode]
    fabric = Fabric(clock)
    engines = []
    for plan in plans:
        own = Random(random.getrandbits(64))
        times = Noisy(plan.times, own, noise) if noise else plan.times
        engine = kind(plan, clock, times, fabric)
        engine.slow_factor = 1 / plan.entry.speed
        engines.append(engine)
    return engines


def worker_for(engine: Engine, plan: ServerPlan) -> Worker:
    return replace(worker_of(engine), pool=plan.entry.pool)
