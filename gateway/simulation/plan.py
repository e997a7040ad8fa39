"""Whether the parts of a scenario fit together, and what the files hold that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.workload import (
    LENGTHS,
    TIMED,
    Empirical,
    Lengths,
    LogNormal,
    Trace,
    WorkloadError,
    read_lengths,
    read_trace,
)
from gateway.scenario import (
    TRACE,
    BadRows,
    FleetEntry,
    PolicyEntry,
    Scenario,
    Swept,
    WorkloadEntry,
)
from gateway.settings import ConfigError, decode, read_toml
from gateway.simulation.oracles import NO_ORACLE
from policies.types import Kind, Role

PUBLIC = {
    "azure_2023": "https://github.com/Azure/AzurePublicDataset",
    "mooncake_fast25": "https://github.com/kvcache-ai/Mooncake",
    "vidur": "https://github.com/microsoft/vidur",
}
"""Where the public traces are, by how the names of their files begin in the shipped scenarios."""


@dataclass(frozen=True, slots=True)
class Source:
    """A class of requests with what its files hold."""

    entry: WorkloadEntry
    trace: Trace | None = None
    """Of arrivals and lengths, or of lengths alone."""

    @property
    def is_replayed(self) -> bool:
        return self.entry.arrivals == TRACE

    def end_s(self, scale: float) -> float:
        """When the last row of the trace comes, a moment later."""
        rows = self.trace.rows if self.trace is not None else ()
        last_s = rows[-1].arrival_s if rows else 0.0
        entry = self.entry
        return (last_s - entry.from_s + entry.tick_s) / (entry.rate_scale * scale) + 1e-6

    def law_of_lengths(self) -> Lengths:
        if self.trace is not None:
            return Empirical(self.trace.rows)
        entry = self.entry
        return LogNormal(
            input_median=entry.input_median,
            input_sigma=entry.input_sigma,
            input_max=entry.input_max,
            output_median=entry.output_median,
            output_sigma=entry.output_sigma,
            output_max=entry.output_max,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A scenario whose files are found and read."""

    scenario: Scenario
    sources: tuple[Source, ...]
    data: Path

    def until_s(self, load: float) -> float:
        """When arrivals end: as the scenario says, or with the longest trace."""
        if self.scenario.duration_s:
            return self.scenario.duration_s
        ends = [it.end_s(self.scale(it.entry, load)) for it in self.sources if it.is_replayed]
        if not ends:
            raise ConfigError("duration_s is needed where no workload is a trace")
        return max(ends)

    def scale(self, entry: WorkloadEntry, load: float) -> float:
        """What a sweep's value multiplies this workload with."""
        swept = Kind.ONLINE if self.scenario.sweep.of is Swept.RATE else Kind.OFFLINE
        return load if entry.kind is swept else 1.0


def load(path: Path, data: Path | None = None) -> Plan:
    """Reads the scenario, and with it every trace that it names."""
    scenario = decode(Scenario, read_toml(path))
    return planned(scenario, data or path.parent / scenario.data)


def planned(scenario: Scenario, data: Path) -> Plan:
    """Traces and tables are looked for in `data`."""
    check(scenario)
    data = data.resolve()
    entries = enumerate(scenario.workload)
    sources = tuple(_source(entry, f"workload[{i}]", data) for i, entry in entries)
    plan = Plan(scenario=scenario, sources=sources, data=data)
    for load in scenario.sweep.values:
        if not plan.until_s(load) > scenario.warm_up_s:
            raise ConfigError(
                f"warm_up_s {scenario.warm_up_s:g} leaves nothing to count: arrivals end after "
                f"{plan.until_s(load):g} s"
            )
    return plan


def check(scenario: Scenario) -> None:
    """What no single key can know."""
    if not scenario.workload:
        raise ConfigError("a scenario needs at least one [[workload]]")
    if not any(fleet.server for fleet in scenario.fleet):
        raise ConfigError("a scenario needs a [[fleet]] with at least one [[fleet.server]]")
    if not scenario.policy or not scenario.seeds or not scenario.sweep.values:
        raise ConfigError("a scenario needs at least one policy, one seed and one sweep value")
    if min(scenario.sweep.values) <= 0:
        raise ConfigError(f"sweep.values must be positive, got {list(scenario.sweep.values)}")
    for what in ("fleet", "workload", "policy"):
        _distinct([entry.name for entry in getattr(scenario, what)], what)
    fleets = [fleet.name for fleet in scenario.fleet]
    for i, policy in enumerate(scenario.policy):
        _check_policy(policy, fleets, f"policy[{i}]")
    for i, fleet in enumerate(scenario.fleet):
        _check_roles(fleet, f"fleet[{i}]")
    for i, workload in enumerate(scenario.workload):
        _check_lengths(workload, f"workload[{i}]")
    _check_runs(scenario)


def _check_lengths(entry: WorkloadEntry, where: str) -> None:
    drawn = not (entry.trace or entry.lengths)
    if drawn and entry.input_median > entry.input_max:
        raise ConfigError(
            f"{where}.input_median {entry.input_median:g} is above its input_max "
            f"{entry.input_max}: more than half of the prompts would be as long as that"
        )


def _check_runs(scenario: Scenario) -> None:
    seeds = scenario.seeds
    if doubled := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ConfigError(f"seeds has {doubled[0]} twice: the same run would be made again")
    kinds = {entry.kind for entry in scenario.workload}
    if scenario.sweep.of is Swept.OFFLINE and Kind.OFFLINE not in kinds:
        raise ConfigError('sweep.of = "offline" needs a [[workload]] with kind = "offline"')


def _distinct(names: Sequence[str], what: str) -> None:
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two [[{what}]] are called {doubled[0]!r}")


def _check_policy(policy: PolicyEntry, fleets: Sequence[str], where: str) -> None:
    if policy.fleet and policy.fleet not in fleets:
        raise ConfigError(f"{where}.fleet must be one of {fleets}, got {policy.fleet!r}")
    if policy.ratio.policy != "static" and not policy.cost.model:
        raise ConfigError(f"{where}.ratio needs {where}.cost, as in config.toml")
    if policy.oracle != NO_ORACLE and "oracle" not in policy.name:
        raise ConfigError(
            f'{where}.name must have "oracle" in it, as a warning in every table: '
            f"{policy.oracle} knows what no gateway can; got {policy.name!r}"
        )


def _check_roles(fleet: FleetEntry, where: str) -> None:
    roles = {it.role for it in fleet.server if not (it.joins_s or it.parked)}
    if Role.UNIFIED not in roles and not {Role.PREFILL, Role.DECODE} <= roles:
        raise ConfigError(
            f"{where} can serve nothing at the beginning: it needs a unified server, or a prefill "
            "and a decode server, that does not join later"
        )


def _source(entry: WorkloadEntry, where: str, data: Path) -> Source:
    if (entry.arrivals == TRACE) != bool(entry.trace):
        raise ConfigError(f'{where}: arrivals = "trace" and a path in trace belong together')
    if not (entry.trace or entry.lengths):
        return Source(entry)
    key, name = ("trace", entry.trace) if entry.trace else ("lengths", entry.lengths)
    path = data / name
    if path.is_dir():
        raise ConfigError(f"{where}.{key}: {path} is a directory, and a CSV is needed")
    if not path.is_file():
        raise ConfigError(f"{where}.{key}: {path} is not there. {_wanted(key, name)}")
    read = read_trace if entry.trace else read_lengths
    try:
        found = read(path, skip_bad=entry.bad_rows is BadRows.SKIP)
    except WorkloadError as error:
        raise ConfigError(f"{where}.{key}: {error}") from error
    last_s = found.rows[-1].arrival_s
    if entry.trace and entry.from_s > last_s:
        raise ConfigError(
            f"{where}.from_s {entry.from_s:g} is past the end of {path}: "
            f"its last row comes at {last_s:g} s"
        )
    return Source(entry, found)


def _wanted(key: str, name: str) -> str:
    """Where a file that is missing may come from, and what it has to hold."""
    columns = ", ".join(LENGTHS if key == "lengths" else TIMED)
    file = name.rpartition("/")[2]
    public = next((url for begin, url in PUBLIC.items() if file.startswith(begin)), "")
    origin = f"It is made from {public}: docs/simulator.md, Traces, says how. " if public else ""
    return (
        f"{origin}Say with --data in which folder {name} lies, or name another CSV with the "
        f"columns {columns}. Without any trace there is benchmarks/scenarios/bursty-chat.toml"
    )
