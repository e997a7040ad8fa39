"""How many servers prefill and how many decode: the ratio policies, and the plan they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from policies.capacity import (
    FULLEST,
    Prefilling,
    decode_rate,
    mean_context,
    prefill_rate,
    prefill_share_s,
)
from policies.demand import Demand, Fleet
from policies.sizing import greatest

DOPD_KV_BLOCKS, DOPD_BLOCK_TOKENS = 2040, 128
"""Constants of the published code: Llama-70B FP8, tp 2 on H100, 96 % of the memory."""
DOPD_IDLE_S = 50.0


class Why(StrEnum):
    """Why a plan is as it is; it reaches the log and the metrics."""

    FIXED = "fixed"
    HOLDS = "holds"
    MOVING = "moves_under_way"
    DWELL = "dwell"
    IDLE = "idle"
    UNKNOWN = "nothing_known"
    CHANGED = "fleet_changed"
    SHORT_OF_PREFILL = "short_of_prefill"
    SHORT_OF_DECODE = "short_of_decode"
    SHORT_OF_BOTH = "short_of_both"
    SPARE = "spare"
    RATIO = "ratio"
    TREND = "trend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The servers of each role that are wanted, never none."""

    prefills: int
    decodes: int
    why: Why
    terms: Mapping[str, float] = field(default_factory=dict)
    """What the decision was computed from, for whoever asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a policy keeps between two looks."""

    needed: tuple[tuple[int, int, int], ...] = ()
    """When, how many prefill and how many decode servers would have been enough with some room."""
    grew_us: tuple[int | None, int | None] = (None, None)
    """When more prefill servers were wanted, and when more decode servers."""
    seen: tuple[int, int] = (0, 0)
    """The fleet at the last look."""
    series: tuple[tuple[float, float], ...] = ()
    """Loads of the last looks, for trends."""
    grace: int = 0
    """Looks for which a new decode server is spared."""


class Ratio(Protocol):
    """Asked at every look; it returns what it wants to remember."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]: ...


def holds(fleet: Fleet, why: Why, terms: Mapping[str, float] | None = None) -> Plan:
    return Plan(
        prefills=max(1, fleet.prefills),
        decodes=max(1, fleet.decodes),
        why=why,
        terms=terms or {},
    )


@dataclass(frozen=True, slots=True)
class Static:
    """The fleet as it is."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        return memory, holds(fleet, Why.FIXED)


@dataclass(frozen=True, slots=True)
class Dopd:
    """DOPD as its code has it: a count of one interval stands for concurrency, N_P ignores N_D."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        seen = (fleet.prefills, fleet.decodes)
        changed = memory.seen not in ((0, 0), seen)
        memory = replace(memory, seen=seen)
        if changed:
            return memory, holds(fleet, Why.CHANGED)
        if demand.idle_s > DOPD_IDLE_S and fleet.is_elastic:
            return memory, Plan(prefills=1, decodes=1, why=Why.IDLE)
        flow = demand.expected
        if not flow.rate_per_s or not flow.answer.mean or not flow.prompt.mean:
            return memory, holds(fleet, Why.UNKNOWN)
        prefills, decodes, terms = self._wanted(demand, fleet)
        return memory, within_budget(prefills, decodes, fleet, Why.RATIO, terms)

    def _wanted(self, demand: Demand, fleet: Fleet) -> tuple[int, int, dict[str, float]]:
        flow = demand.expected
        isl, osl = flow.prompt.mean, flow.answer.mean
        context = isl + osl / 2
        most = max(1, DOPD_KV_BLOCKS // math.ceil(context / DOPD_BLOCK_TOKENS))
        prefill_time_s = fleet.prefill.cost.prefill_one(max(1, round(isl))).seconds
        corrected = tpot_correction(demand, fleet, context)
        step_time_s = fleet.decode.cost.decode(most, round(most * context)).seconds * corrected
        ratio = most * prefill_time_s / (osl * step_time_s)
        requests = flow.rate_per_s * demand.interval_s
        terms = {"ratio": ratio, "batch": most, "requests": requests, "tpot_factor": corrected}
        return math.ceil(ratio), math.ceil(requests / most), terms


def tpot_correction(demand: Demand, fleet: Fleet, context: float) -> float:
    """Dynamo's factor: the step as seen beside the one of the profile at that concurrency."""
    if demand.tpot_s is None or demand.stay_s is None:
        return 1.0
    each = demand.expected.rate_per_s / max(1, fleet.decodes) * demand.stay_s
    count = max(1, round(each))
    profile_s = fleet.decode.cost.decode(count, round(count * context)).seconds
    return demand.tpot_s / profile_s


def ttft_correction(demand: Demand, fleet: Fleet) -> float:
    if demand.ttft_s is None:
        return 1.0
    tokens = max(1, round(demand.expected.prompt.mean))
    return demand.ttft_s / fleet.prefill.cost.prefill_one(tokens).seconds


def within_budget(
    prefills: int, decodes: int, fleet: Fleet, why: Why, terms: Mapping[str, float]
) -> Plan:
    """Scaled down as DOPD and Dynamo do; a fleet that cannot shrink gives the rest to decode."""
    prefills, decodes = max(1, prefills), max(1, decodes)
    each_p, each_d, limit = fleet.prefill.gpus, fleet.decode.gpus, fleet.limit_gpus
    required = prefills * each_p + decodes * each_d
    if required > limit or not fleet.is_elastic:
        prefills = max(1, int(prefills * limit / required))
        prefills = max(1, min(prefills, (limit - each_d) // each_p))
        decodes = max(1, (limit - prefills * each_p) // each_d)
    return Plan(prefills=prefills, decodes=decodes, why=why, terms=terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The fewest servers of each role that keep the targets, and what they follow from.

    A role that no fleet within the budget has enough of needs one more than the budget has.
    """

    prefills: int
    decodes: int
    terms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DopdPlus:
    """DOPD repaired: Little's law, the cost model, both targets at the forecast's upper quantile.

    Capacity is added as soon as it will be missing. It is taken away, or given to the other role,
    only where the rest would bear `band` more than is expected, and has for `dwell_s`.
    """

    band: float = 0.2
    """What another fleet must be better by."""
    ahead: float = 0.05
    """What is added bears so much more than is missing, so that noise does not add one by one."""
    dwell_s: float = 60.0
    """For so long fewer servers must have been enough."""
    fullest_kv: float = 0.95
    """Decode is short at once from here on."""
    late_wait: float = 0.5
    """Prefill is short at once when a prompt has waited this share of the TTFT target."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        need, roomy = self.need(demand, fleet), self.need(demand, fleet, 1.0 + self.band)
        if need is None or roomy is None:
            return replace(memory, needed=()), holds(fleet, Why.UNKNOWN)
        memory = self._remembering(memory, roomy, now_us)
        if fleet.moving:
            return memory, self._meanwhile(need, fleet)
        plan = self._plan(memory, need, roomy, demand, fleet, now_us)
        plan = self._without_return(plan, memory, fleet, now_us)
        grew_p, grew_d = memory.grew_us
        grew_p = now_us if plan.prefills > fleet.prefills else grew_p
        grew_d = now_us if plan.decodes > fleet.decodes else grew_d
        return replace(memory, grew_us=(grew_p, grew_d)), plan

    def _without_return(self, plan: Plan, memory: Memory, fleet: Fleet, now_us: int) -> Plan:
        """What a role was given it keeps for `dwell_s`: what waits meanwhile is not the rule."""
        dwells = [
            since_us is not None and now_us - since_us < self.dwell_s * 1e6
            for since_us in memory.grew_us
        ]
        prefills = max(plan.prefills, fleet.prefills) if dwells[0] else plan.prefills
        decodes = max(plan.decodes, fleet.decodes) if dwells[1] else plan.decodes
        if (prefills, decodes) == (plan.prefills, plan.decodes):
            return plan
        if prefills * fleet.prefill.gpus + decodes * fleet.decode.gpus > fleet.limit_gpus:
            return holds(fleet, Why.DWELL, plan.terms)
        return replace(plan, prefills=prefills, decodes=decodes)

    def is_urgent(self, demand: Demand) -> bool:
        """Whether to look again before the period is over."""
        waits = demand.oldest_wait_s > self.late_wait * demand.targets.ttft_s
        return waits or demand.kv_use > self.fullest_kv

    def need(self, demand: Demand, fleet: Fleet, more: float = 1.0) -> Need | None:
        """At `more` times the rate; None while nothing is known that could be reckoned with."""
        flow = demand.online if demand.online.prompt.mean else demand.offline
        if not flow.prompt.mean or not flow.answer.mean:
            return None
        rate = demand.online.rate_per_s * more
        lasting = (demand.lasting_per_s or demand.online.rate_per_s) * more
        targets = demand.targets
        prefilling = Prefilling.of(fleet.prefill, flow, targets)
        decode_each = decode_rate(1, fleet.decode, flow, targets)
        besides = self._besides_s(demand, fleet, prefilling.share_s)
        most = max(fleet.prefills, fleet.limit_gpus // fleet.prefill.gpus)
        prefills = least(
            lambda n: (
                prefilling.bears(n, rate) and rate * prefilling.share_s + besides <= FULLEST * n
            ),
            most,
        )
        wanted = lasting / decode_each
        if demand.offline.rate_per_s:
            wanted += demand.offline.rate_per_s / decode_rate(
                1, fleet.decode, demand.offline, targets
            )
        if demand.decode_is_full:
            wanted += demand.waiting / max(1.0, fleet.switch_s) / decode_each
        most = max(fleet.decodes, fleet.limit_gpus // fleet.decode.gpus)
        decodes = max(1, math.ceil(min(wanted, most + 1)))
        if demand.kv_use > self.fullest_kv and more == 1.0:
            decodes = max(decodes, fleet.decodes + 1)
        terms = {
            "rate_per_s": rate,
            "prefill_ms": 1e3 * prefilling.alone_s,
            "prefill_rate_each": prefilling.rate(1),
            "decode_rate_each": decode_each,
            "context_tokens": mean_context(flow),
            "need_prefills": prefills,
            "need_decodes": decodes,
        }
        return Need(prefills=prefills, decodes=decodes, terms=terms)

    @staticmethod
    def _besides_s(demand: Demand, fleet: Fleet, share_s: float) -> float:
        """Prefill servers that other work keeps busy: offline prompts, and what waits already.

        What waits is worth more servers only where it is not done before they serve.
        """
        lead_s = max(1.0, fleet.switch_s)
        waiting = demand.waiting_tokens / max(1.0, demand.online.prompt.mean)
        busy = 0.0 if demand.decode_is_full else waiting * share_s / lead_s
        if demand.offline.rate_per_s and demand.offline.prompt.mean:
            busy += demand.offline.rate_per_s * prefill_share_s(fleet.prefill, demand.offline)
        return busy

    def _remembering(self, memory: Memory, roomy: Need, now_us: int) -> Memory:
        """What was needed in the last `dwell_s`, and once before that."""
        kept = [*memory.needed, (now_us, roomy.prefills, roomy.decodes)]
        while len(kept) > 1 and kept[1][0] <= now_us - self.dwell_s * 1e6:
            del kept[0]
        return replace(memory, needed=tuple(kept))

    @staticmethod
    def _meanwhile(need: Need, fleet: Fleet) -> Plan:
        """While servers move, those that are missing all the same are started at once."""
        more = holds(fleet, Why.MOVING, need.terms)
        if not fleet.is_elastic:
            return more
        prefills, decodes = max(need.prefills, fleet.prefills), max(need.decodes, fleet.decodes)
        room = fleet.limit_gpus - fleet.gpus
        adds_p = min(prefills - fleet.prefills, room // fleet.prefill.gpus)
        room -= adds_p * fleet.prefill.gpus
        adds_d = min(decodes - fleet.decodes, room // fleet.decode.gpus)
        return replace(more, prefills=more.prefills + adds_p, decodes=more.decodes + adds_d)

    def _plan(
        self,
        memory: Memory,
        need: Need,
        roomy: Need,
        demand: Demand,
        fleet: Fleet,
        now_us: int,
    ) -> Plan:
        short_p, short_d = need.prefills - fleet.prefills, need.decodes - fleet.decodes
        if short_p <= 0 and short_d <= 0:
            return self._without_spare(memory, need, fleet, now_us)
        why = Why.SHORT_OF_PREFILL if short_d <= 0 else Why.SHORT_OF_DECODE
        why = Why.SHORT_OF_BOTH if short_p > 0 and short_d > 0 else why
        need = self.need(demand, fleet, 1.0 + self.ahead) or need
        prefills = fleet.prefills if short_p <= 0 else need.prefills
        decodes = fleet.decodes if short_d <= 0 else need.decodes
        short_p, short_d = prefills - fleet.prefills, decodes - fleet.decodes
        if short_d <= 0:
            decodes -= min(short_p, max(0, fleet.decodes - roomy.decodes))
        if short_p <= 0:
            prefills -= min(short_d, max(0, fleet.prefills - roomy.prefills))
        wanted = prefills * fleet.prefill.gpus + decodes * fleet.decode.gpus
        if wanted <= fleet.limit_gpus:
            return Plan(prefills=max(1, prefills), decodes=max(1, decodes), why=why,
                        terms=need.terms)  # fmt: skip
        return self._best_split(need, demand, fleet, why)

    def _without_spare(self, memory: Memory, need: Need, fleet: Fleet, now_us: int) -> Plan:
        prefills = max(each[1] for each in memory.needed)
        decodes = max(each[2] for each in memory.needed)
        if not fleet.is_elastic or (prefills >= fleet.prefills and decodes >= fleet.decodes):
            return holds(fleet, Why.HOLDS, need.terms)
        if now_us - memory.needed[0][0] < self.dwell_s * 1e6:
            return holds(fleet, Why.DWELL, need.terms)
        return Plan(
            prefills=max(1, min(fleet.prefills, prefills)),
            decodes=max(1, min(fleet.decodes, decodes)),
            why=Why.SPARE,
            terms=need.terms,
        )

    def _best_split(self, need: Need, demand: Demand, fleet: Fleet, why: Why) -> Plan:
        """Not enough for all: the split whose fuller role is least full, if it is worth a move."""
        present = self.pressure(fleet.prefills, fleet.decodes, demand, fleet)
        best, found = (present, 0, 0), (fleet.prefills, fleet.decodes)
        for prefills in range(1, fleet.limit_gpus // fleet.prefill.gpus + 1):
            left = fleet.limit_gpus - prefills * fleet.prefill.gpus
            decodes = left // fleet.decode.gpus
            if decodes < 1:
                break
            moves = abs(prefills - fleet.prefills)
            pressure = self.pressure(prefills, decodes, demand, fleet)
            if (pressure, moves, prefills) < best:
                best, found = (pressure, moves, prefills), (prefills, decodes)
        terms = {**need.terms, "pressure": present, "pressure_after": best[0]}
        grows = sum(found) > fleet.prefills + fleet.decodes
        if not grows and best[0] * (1 + self.band) > present:
            return holds(fleet, Why.HOLDS, terms)
        return Plan(prefills=found[0], decodes=found[1], why=why, terms=terms)

    def pressure(self, prefills: int, decodes: int, demand: Demand, fleet: Fleet) -> float:
        """The load of the fuller role beside what it bears; above 1 targets are missed."""
        flow, targets = demand.online, demand.targets
        rate = max(flow.rate_per_s, 1e-9)
        lasting = demand.lasting_per_s or rate
        lead_s = max(1.0, fleet.switch_s)
        waiting = demand.waiting_tokens / max(1.0, flow.prompt.mean) / lead_s
        for_prefill, for_decode = (0.0, waiting) if demand.decode_is_full else (waiting, 0.0)
        bears_p = prefill_rate(prefills, fleet.prefill, flow, targets)
        bears_d = decode_rate(decodes, fleet.decode, flow, targets)
        return max(
            (rate + for_prefill) / max(bears_p, 1e-9), (lasting + for_decode) / max(bears_d, 1e-9)
        )


def least(bears: Callable[[int], bool], most: int) -> int:
    """The fewest servers that bear it, `most` + 1 where none do; whatever some bear, more do."""
    return greatest(lambda count: not bears(count), 1, most) + 1
