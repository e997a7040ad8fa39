"""DOPD repaired: when servers are added, exchanged or given up, so that nothing oscillates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from policies.demand import Demand, Fleet
from policies.need import Need, Reckoning
from policies.ratio import Memory, Plan, Why, holds


@dataclass(frozen=True, slots=True, kw_only=True)
class DopdPlus:
    """Little's law, the cost model, and both targets at the forecast's upper quantile.

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
        reckoning = Reckoning(demand, fleet, demand.kv_use > self.fullest_kv)
        need, roomy = reckoning.need(), reckoning.need(1.0 + self.band)
        if need is None or roomy is None:
            return replace(memory, needed=()), holds(fleet, Why.UNKNOWN)
        memory = self._remembering(memory, roomy, now_us)
        if fleet.moving:
            return memory, self._meanwhile(need, fleet)
        if need.prefills > fleet.prefills or need.decodes > fleet.decodes:
            plan = self._with_more(need, roomy, reckoning)
        else:
            plan = self._without_spare(memory, need, fleet, now_us)
        plan = self._without_return(plan, memory, fleet, now_us)
        grew_p, grew_d = memory.grew_us
        grew_p = now_us if plan.prefills > fleet.prefills else grew_p
        grew_d = now_us if plan.decodes > fleet.decodes else grew_d
        return replace(memory, grew_us=(grew_p, grew_d)), plan

    def is_urgent(self, demand: Demand) -> bool:
        """Whether to look again before the period is over."""
        waits = demand.oldest_wait_s > self.late_wait * demand.targets.ttft_s
        return waits or demand.kv_use > self.fullest_kv

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

    def _with_more(self, need: Need, roomy: Need, reckoning: Reckoning) -> Plan:
        """Servers are started, or taken from the other role as far as it has some to spare."""
        fleet, why = reckoning.fleet, _short_of(need, reckoning.fleet)
        need_p, need_d = need.prefills > fleet.prefills, need.decodes > fleet.decodes
        need = reckoning.need(1.0 + self.ahead) or need
        prefills = need.prefills if need_p else fleet.prefills
        decodes = need.decodes if need_d else fleet.decodes
        short_p, short_d = prefills - fleet.prefills, decodes - fleet.decodes
        if short_d <= 0:
            decodes -= min(short_p, max(0, fleet.decodes - roomy.decodes))
        if short_p <= 0:
            prefills -= min(short_d, max(0, fleet.prefills - roomy.prefills))
        if fleet.gpus_of(prefills, decodes) > fleet.limit_gpus:
            return self._best_split(need, reckoning, why)
        return Plan(prefills=max(1, prefills), decodes=max(1, decodes), why=why, terms=need.terms)

    def _best_split(self, need: Need, reckoning: Reckoning, why: Why) -> Plan:
        """Not enough for all: the split whose fuller role is least full, if it is worth a move."""
        fleet = reckoning.fleet
        present = reckoning.pressure(fleet.prefills, fleet.decodes, self.dwell_s)
        best, found = (present, 0, 0), (fleet.prefills, fleet.decodes)
        for prefills in range(1, fleet.limit_gpus // fleet.prefill.gpus + 1):
            left = fleet.limit_gpus - prefills * fleet.prefill.gpus
            decodes = left // fleet.decode.gpus
            if decodes < 1:
                break
            moves = abs(prefills - fleet.prefills)
            pressure = reckoning.pressure(prefills, decodes, self.dwell_s)
            if (pressure, moves, prefills) < best:
                best, found = (pressure, moves, prefills), (prefills, decodes)
        terms = {**need.terms, "pressure": present, "pressure_after": best[0]}
        grows = sum(found) > fleet.prefills + fleet.decodes
        if not grows and best[0] * (1 + self.band) > present:
            return holds(fleet, Why.HOLDS, terms)
        return Plan(prefills=found[0], decodes=found[1], why=why, terms=terms)

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
        if fleet.gpus_of(prefills, decodes) > fleet.limit_gpus:
            return holds(fleet, Why.DWELL, plan.terms)
        return replace(plan, prefills=prefills, decodes=decodes)


def _short_of(need: Need, fleet: Fleet) -> Why:
    if need.decodes <= fleet.decodes:
        return Why.SHORT_OF_PREFILL
    return Why.SHORT_OF_DECODE if need.prefills <= fleet.prefills else Why.SHORT_OF_BOTH
