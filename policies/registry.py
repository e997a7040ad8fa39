"""The policies by the names that config.toml uses."""

from __future__ import annotations

from policies.displace import ByCost, Cheapest, Displace, Never, Slices
from policies.dopd_plus import DopdPlus
from policies.gather import AtOnce, ByLength, Gather
from policies.hold import ForSlack as HoldForSlack
from policies.hold import Hold
from policies.hold import Never as NeverHold
from policies.hrrn import Hrrn
from policies.lengths import LengthSplit
from policies.order import Edf, Fcfs, Order, Shortest
from policies.place import CacheAware, LeastWork, Place, PowerOfTwo, RoundRobin
from policies.planners import Dopd, DynLoad, DynSla
from policies.pools import ByLatency, Pools, Shared
from policies.preempt import ForSlack, GiveWay, Stay
from policies.ratio import Ratio, Static
from policies.salvage import Salvage
from policies.slack import Kairos

ORDER: dict[str, type[Order]] = {
    "fcfs": Fcfs,
    "edf": Edf,
    "shortest": Shortest,
    "hrrn": Hrrn,
    "kairos": Kairos,
    "salvage": Salvage,
}
DISPLACE: dict[str, type[Displace]] = {
    "none": Never,
    "by-cost": ByCost,
    "slices": Slices,
    "cheapest": Cheapest,
}
GATHER: dict[str, type[Gather]] = {"none": AtOnce, "by-length": ByLength}
HOLD: dict[str, type[Hold]] = {"none": NeverHold, "slack": HoldForSlack}
PLACE: dict[str, type[Place]] = {
    "least-work": LeastWork,
    "round-robin": RoundRobin,
    "power-of-two": PowerOfTwo,
    "cache-aware": CacheAware,
    "length-split": LengthSplit,
}
POOLS: dict[str, type[Pools]] = {"none": Shared, "latency": ByLatency}
PREEMPT: dict[str, type[GiveWay]] = {"none": Stay, "slack": ForSlack}
RATIO: dict[str, type[Ratio]] = {
    "static": Static,
    "dopd": Dopd,
    "dopd+": DopdPlus,
    "dyn-load": DynLoad,
    "dyn-sla": DynSla,
}
