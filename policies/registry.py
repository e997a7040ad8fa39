"""The policies by the names that config.toml uses."""

from __future__ import annotations

from policies.order import Edf, Fcfs, Order
from policies.place import LeastWork, Place, RoundRobin
from policies.pools import ByLatency, Pools, Shared
from policies.preempt import ForSlack, GiveWay, Never

ORDER: dict[str, type[Order]] = {"fcfs": Fcfs, "edf": Edf}
PLACE: dict[str, type[Place]] = {"least-work": LeastWork, "round-robin": RoundRobin}
POOLS: dict[str, type[Pools]] = {"none": Shared, "latency": ByLatency}
PREEMPT: dict[str, type[GiveWay]] = {"none": Never, "slack": ForSlack}
