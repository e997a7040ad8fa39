"""The fewest servers of each role that bear a load within its targets, and how full a split is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from policies.capacity import (
    FULLEST,
    Prefilling,
    decode_rate,
    mean_context,
    prefill_rate,
    prefill_share_s,
)
from policies.demand import Demand, Fleet, Flow
from policies.sizing import greatest


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The fewest servers of each role that keep the targets, and what they follow from.

    A role that no fleet within the budget has enough of needs one more than the budget has.
    """

    prefills: int
    decodes: int
    terms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reckoning:
    """One load on one fleet."""

    demand: Demand
    fleet: Fleet
    is_out_of_kv: bool = False
    """Decode servers are short by one, whatever the rates say."""

    def need(self, more: float = 1.0) -> Need | None:
        """At `more` times the rate; None while nothing is known that could be reckoned with."""
        demand, fleet = self.demand, self.fleet
        flow = demand.online if demand.online.prompt.mean else demand.offline
        if not flow.prompt.mean or not flow.answer.mean:
            return None
        rate = demand.online.rate_per_s * more
        prefilling = Prefilling.of(fleet.prefill, flow, demand.targets)
        decode_each = decode_rate(1, fleet.decode, flow, demand.targets)
        prefills = self._prefills(prefilling, rate)
        decodes = self._decodes(decode_each, more)
        if self.is_out_of_kv and more == 1.0:
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

    def _prefills(self, prefilling: Prefilling, rate: float) -> int:
        fleet, share_s = self.fleet, prefilling.share_s
        besides = self._besides_s(share_s)
        return least(
            lambda n: prefilling.bears(n, rate) and rate * share_s + besides <= FULLEST * n,
            max(fleet.prefills, fleet.limit_gpus // fleet.prefill.gpus),
        )

    def _besides_s(self, share_s: float) -> float:
        """Prefill servers that other work keeps busy: offline prompts, and what waits already.

        What waits is worth more servers only where it is not done before they serve.
        """
        demand, fleet = self.demand, self.fleet
        waiting = demand.waiting_tokens / max(1.0, demand.online.prompt.mean)
        busy = 0.0 if demand.decode_is_full else waiting * share_s / self._lead_s
        if demand.offline.rate_per_s and demand.offline.prompt.mean:
            busy += demand.offline.rate_per_s * prefill_share_s(fleet.prefill, demand.offline)
        return busy

    def _decodes(self, each: float, more: float) -> int:
        demand, fleet = self.demand, self.fleet
        wanted = (demand.lasting_per_s or demand.online.rate_per_s) * more / each
        if demand.offline.rate_per_s:
            wanted += demand.offline.rate_per_s / self._decode_rate(1, demand.offline)
        if demand.decode_is_full:
            wanted += demand.waiting / self._lead_s / each
        most = max(fleet.decodes, fleet.limit_gpus // fleet.decode.gpus)
        return max(1, math.ceil(min(wanted, most + 1)))

    def pressure(self, prefills: int, decodes: int, lasts_s: float) -> float:
        """The load of the fuller role beside what it bears; above 1 targets are missed.

        What waits counts as far as it has to be done while the split lasts: it waits for one role
        now and, if it weighs more, for the other one after each exchange.
        """
        demand = self.demand
        flow = demand.online
        rate = max(flow.rate_per_s, 1e-9)
        lasting = demand.lasting_per_s or rate
        lasts_s = max(lasts_s, self._lead_s)
        waiting = demand.waiting_tokens / max(1.0, flow.prompt.mean) / lasts_s
        for_prefill, for_decode = (0.0, waiting) if demand.decode_is_full else (waiting, 0.0)
        bears_p = prefill_rate(prefills, self.fleet.prefill, flow, demand.targets)
        bears_d = self._decode_rate(decodes, flow)
        return max(
            (rate + for_prefill) / max(bears_p, 1e-9), (lasting + for_decode) / max(bears_d, 1e-9)
        )

    def _decode_rate(self, servers: int, flow: Flow) -> float:
        return decode_rate(servers, self.fleet.decode, flow, self.demand.targets)

    @property
    def _lead_s(self) -> float:
        """Until another server would serve."""
        return max(1.0, self.fleet.switch_s)


def least(bears: Callable[[int], bool], most: int) -> int:
    """The fewest servers that bear it, `most` + 1 where none do; whatever some bear, more do."""
    return greatest(lambda count: not bears(count), 1, most) + 1
