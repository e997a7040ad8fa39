"""Every choice that the core leaves to policies, in one value."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.switching import SwitchRule
from policies.admit import Admit, Headroom
from policies.breaker import BreakerRule
from policies.displace import Displace, Never
from policies.gather import AtOnce, Gather
from policies.hold import Hold
from policies.hold import Never as NeverHold
from policies.order import Edf, Order
from policies.place import LeastWork, Place
from policies.pools import Pools, Shared
from policies.preempt import AbortRule, GiveWay, Stay
from policies.retry import RetryRule
from policies.standstill import Standstill
from policies.steps import Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Every choice that the core leaves to policies; replaced whole by a reload."""

    order: Order = field(default_factory=Edf)
    gather: Gather = field(default_factory=AtOnce)
    hold: Hold = field(default_factory=NeverHold)
    place: Place = field(default_factory=LeastWork)
    admit: Admit = field(default_factory=Headroom)
    displace: Displace = field(default_factory=Never)
    pools: Pools = field(default_factory=Shared)
    costs: Costs = field(default_factory=Costs)
    give_way: GiveWay = field(default_factory=Stay)
    aborts: AbortRule = field(default_factory=AbortRule)
    breaker: BreakerRule = field(default_factory=BreakerRule)
    retry: RetryRule = field(default_factory=RetryRule)
    switch: SwitchRule = field(default_factory=SwitchRule)
    standstill: Standstill | None = None
    """When servers stand still for others on the same GPU; None: never."""
    max_queued: int = 10_000
    """Jobs of one kind that may wait for one model."""
    load_stale_us: int = 5_000_000

    @property
    def takes_back(self) -> bool:
        """Whether offline work gives way to online work."""
        return not isinstance(self.give_way, Stay)

    @property
    def holds_back(self) -> bool:
        """Whether the first of a queue may wait though a server has room for it."""
        return self.gather.holds or self.hold.holds
