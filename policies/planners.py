"""DOPD and Dynamo's two planners as their code has them: what ours is measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from policies.demand import Demand, Fleet
from policies.ratio import Memory, Plan, Why, holds
from policies.sizing import largest_batch

AHEAD = 3
"""Intervals that the trend looks ahead, and that a new decode server is spared."""
DOPD_KV_BLOCKS, DOPD_BLOCK_TOKENS = 2040, 128
"""Constants of the published code: Llama-70B FP8, tp 2 on H100, 96 % of the memory."""
DOPD_IDLE_S = 50.0


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
    required = fleet.gpus_of(prefills, decodes)
    if required > limit or not fleet.is_elastic:
        prefills = max(1, int(prefills * limit / required))
        prefills = max(1, min(prefills, (limit - each_d) // each_p))
        decodes = max(1, (limit - prefills * each_p) // each_d)
    return Plan(prefills=prefills, decodes=decodes, why=why, terms=terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynLoad:
    """Thresholds on queues and memory, one step at a time."""

    queue_low: float = 0.2
    queue_high: float = 5.0
    kv_low: float = 0.5
    kv_high: float = 0.9
    waiting_kv: float = 0.02
    """What each prompt that waits adds to the use of memory."""
    headroom: float = 1.0
    """Loads are taken to be so many times what they are; not Dynamo's."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        queue = self.headroom * demand.waiting / max(1, fleet.prefills)
        kv_use = demand.kv_use + self.waiting_kv * demand.waiting / max(1, fleet.decodes)
        kv_use *= self.headroom
        series = (*memory.series, (queue, kv_use))[-AHEAD:]
        grace = max(0, memory.grace - 1)
        prefills = fleet.prefills + self._prefill_step(series, queue)
        decodes = fleet.decodes
        if kv_use > self.kv_high:
            decodes, grace = decodes + 1, AHEAD
        elif kv_use < self.kv_low and not grace:
            decodes -= 1
        terms = {"queue": queue, "kv_use": kv_use}
        plan = self._clamped(prefills, decodes, fleet, terms)
        return replace(memory, series=series, grace=grace), plan

    def _prefill_step(self, series: tuple[tuple[float, float], ...], queue: float) -> int:
        if queue < self.queue_low:
            return -1
        trend = (series[-1][0] - series[0][0]) / max(1, len(series) - 1)
        return 1 if queue > self.queue_high and queue + AHEAD * trend > self.queue_high else 0

    @staticmethod
    def _clamped(prefills: int, decodes: int, fleet: Fleet, terms: dict[str, float]) -> Plan:
        """What the budget has no room for is left; a fixed fleet only exchanges."""
        prefills, decodes = max(1, prefills), max(1, decodes)
        if not fleet.is_elastic:
            up = prefills - fleet.prefills
            down = decodes - fleet.decodes
            if up * down >= 0:
                return holds(fleet, Why.TREND, terms)
            return Plan(prefills=prefills, decodes=decodes, why=Why.TREND, terms=terms)
        limit = fleet.limit_gpus
        if fleet.gpus_of(prefills, decodes) > limit:
            decodes = min(decodes, fleet.decodes)
        if fleet.gpus_of(prefills, decodes) > limit:
            prefills = min(prefills, fleet.prefills)
        return Plan(prefills=prefills, decodes=decodes, why=Why.TREND, terms=terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynSla:
    """Throughput of a profile at the forecast load, corrected by what was seen."""

    headroom: float = 1.0
    """It plans for so many times the load; not Dynamo's."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        flow = demand.expected
        if not flow.prompt.mean or not flow.answer.mean:
            return memory, holds(fleet, Why.UNKNOWN)
        isl, osl = flow.prompt.mean, flow.answer.mean
        context = max(1, round(isl + osl / 2))
        prefill_time_s = fleet.prefill.cost.prefill_one(max(1, round(isl))).seconds
        prefill_each = isl / prefill_time_s / fleet.prefill.gpus
        late, slow = ttft_correction(demand, fleet), tpot_correction(demand, fleet, context)
        allowed_s = demand.targets.tpot_s / slow
        limit = largest_batch(fleet.decode.cost, context, allowed_s, fleet.decode.kv_tokens)
        count = max(1, min(limit.count, fleet.decode.max_running))
        step_time_s = fleet.decode.cost.decode(count, count * context).seconds
        decode_each = count / step_time_s / fleet.decode.gpus
        rate = flow.rate_per_s * self.headroom
        prompts, answers = rate * isl * min(1.0, late), rate * osl
        terms = {
            "prefill_tokens_per_s_per_gpu": prefill_each,
            "decode_tokens_per_s_per_gpu": decode_each,
            "ttft_factor": late,
            "tpot_factor": slow,
        }
        prefills = math.ceil(prompts / prefill_each / fleet.prefill.gpus)
        decodes = math.ceil(answers / decode_each / fleet.decode.gpus)
        return memory, within_budget(prefills, decodes, fleet, Why.RATIO, terms)
