"""Which servers `slackwater calibrate` measures, and what hardware they are taken for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from backends.calibration_run import (
    CannotMeasure,
    Facts,
    Findings,
    Measuring,
    Peer,
    Plan,
    Report,
    Target,
    facts_of,
    planned,
)
from backends.http import Upstream
from gateway.predict import read_model
from policies.calibration import Sample, Setup
from policies.clock import Clock
from policies.devices import device_named
from policies.models import ModelError
from policies.roofline import Parallel

_ROLES = {"prefill": "a prefill server", "decode": "a decode server", "null": "a unified server"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says; empty is what the servers say."""

    targets: tuple[tuple[str, str], ...]
    """(prefill, decode), the same address twice for a unified server."""
    model: str = ""
    device: str = ""
    tp: int = 0
    api_key: str = ""
    seconds: float = 90.0


@dataclass(slots=True, kw_only=True)
class Measured:
    setup: Setup
    urls: list[str] = field(default_factory=list)
    found: list[Findings] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        return [sample for found in self.found for sample in found.samples()]

    @property
    def behind_prefixes(self) -> list[Sample]:
        return [sample for found in self.found for sample in found.behind_prefixes()]

    @property
    def overheads_s(self) -> list[float]:
        return [overhead for found in self.found for overhead in found.overheads]

    @property
    def disturbed(self) -> int:
        return sum(found.disturbed for found in self.found)


async def measure_servers(
    asked: Asked,
    clock: Clock,
    rng: random.Random,
    report: Report,
    plan_of: Callable[[Facts, Facts], Plan] = planned,
) -> Measured:
    """All targets, one after the other. Raises CannotMeasure, ModelError, UnknownDevice."""
    upstreams: list[Upstream] = []

    def peer(url: str) -> Peer:
        headers = {"authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
        upstreams.append(Upstream(url.rstrip("/"), headers=headers))
        return Peer(url.rstrip("/"), upstreams[-1])

    measured: Measured | None = None
    try:
        for number, (prefill, decode) in enumerate(asked.targets):
            one = peer(prefill)
            target = Target(one, one if decode == prefill else peer(decode))
            facts = await _facts(target)
            setup = _setup_of(asked, facts[1])
            if measured is None:
                measured = Measured(setup=setup)
            elif measured.setup != setup:
                raise CannotMeasure(
                    f"{decode} runs {setup.model.name}, {measured.urls[0]} "
                    f"{measured.setup.model.name}: calibrate them apart"
                )
            measuring = Measuring(
                target,
                facts,
                setup.model.vocabulary,
                clock,
                rng,
                plan=plan_of(*facts),
                budget_s=asked.seconds / len(asked.targets),
                report=_share_of(report, number, len(asked.targets), decode),
            )
            measured.urls.append(decode if one is target.decode else f"{prefill} with {decode}")
            measured.found.append(await measuring.run())
    finally:
        for upstream in upstreams:
            upstream.close()
    if measured is None:
        raise CannotMeasure("no server is named")
    return measured


def _share_of(report: Report, number: int, count: int, url: str) -> Report:
    return lambda share, what: report((number + share) / count, f"{url}: {what}")


async def _facts(target: Target) -> tuple[Facts, Facts]:
    facts = await facts_of(target.prefill)
    _check_role(target.prefill, facts, "prefill" if target.is_pair else "null")
    if not target.is_pair:
        return facts, facts
    other = await facts_of(target.decode)
    _check_role(target.decode, other, "decode")
    return facts, other


def _check_role(peer: Peer, facts: Facts, wanted: str) -> None:
    if facts.mode == wanted:
        return
    hint = "" if wanted != "null" else ": measure it as --prefill URL --decode URL"
    found = _ROLES.get(facts.mode, f"a server in mode {facts.mode!r}")
    raise CannotMeasure(f"{peer.url} is {found}, not {_ROLES[wanted]}{hint}")


def _setup_of(asked: Asked, facts: Facts) -> Setup:
    """The operator's word, then the server's."""
    device = asked.device or facts.accelerator
    if not device:
        raise CannotMeasure("the server does not say what it runs on: name it with --gpu")
    return Setup(
        model=read_model(asked.model or _known_model(facts.model_path)),
        device=device_named(device),
        parallel=Parallel(tp=asked.tp or facts.tp),
    )


def _known_model(path: str) -> str:
    try:
        read_model(path)
    except ModelError as error:
        raise ModelError(
            f"the server's model {path!r} is no folder here and no known name: "
            "name it with --model (a config.json will do)"
        ) from error
    return path
