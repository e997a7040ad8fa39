"""The policies by the names that config.toml uses."""

from __future__ import annotations

from policies.admit import Headroom
from policies.order import Edf, Fcfs
from policies.place import LeastWork, RoundRobin
from policies.pools import ByLatency, Shared

ORDER = {"fcfs": Fcfs, "edf": Edf}
PLACE = {"least-work": LeastWork, "round-robin": RoundRobin}
POOLS = {"none": Shared, "latency": ByLatency}
ADMIT = {"headroom": Headroom}
