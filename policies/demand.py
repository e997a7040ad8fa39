"""What is asked of a fleet and what it has: the two values that ratio policies decide on."""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.roofline import CostModel


@dataclass(frozen=True, slots=True)
class Lengths:
    """In tokens; the cost of a prompt is convex in it, so that the mean alone is not enough."""

    mean: float = 0.0
    """0: none were seen; otherwise at least 1."""
    variance: float = 0.0

    @property
    def squared(self) -> float:
        """The mean of the squares."""
        return self.mean * self.mean + self.variance


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Requests of one class."""

    rate_per_s: float = 0.0
    burstiness: float = 1.0
    """Squared variation of the gaps between arrivals: 1 where they come independently."""
    prompt: Lengths = Lengths()
    answer: Lengths = Lengths()
    cached_share: float = 0.0
    """Of prompt tokens, that servers find in their caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    ttft_s: float = 2.0
    tpot_s: float = 0.1
    attained: float = 0.99
    """The share of requests that is to keep each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """At one look; rates are those of the next interval."""

    online: Flow = field(default_factory=Flow)
    """As many as the controller wants to be ready for: the forecast's upper quantile."""
    lasting_per_s: float = 0.0
    """The same rate over as long as a request may stay: decode servers feel no shorter burst. 0:
    not known."""
    expected: Flow = field(default_factory=Flow)
    """The same at the forecast itself."""
    offline: Flow = field(default_factory=Flow)
    targets: Targets = field(default_factory=Targets)
    waiting: int = 0
    """Online prompts that no server has begun."""
    waiting_tokens: int = 0
    oldest_wait_s: float = 0.0
    kv_use: float = 0.0
    """Of the fullest decode server."""
    decode_is_full: bool = False
    """No decode server may take one more: what waits, waits for them."""
    resident: int = 0
    """Requests that decode."""
    ttft_s: float | None = None
    """As seen of late, the mean; None where nothing was seen."""
    tpot_s: float | None = None
    stay_s: float | None = None
    """From arrival to the last token, the mean."""
    idle_s: float = 0.0
    """Since the last arrival."""
    interval_s: float = 10.0
    """Between two looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What one server of a role is."""

    cost: CostModel
    gpus: int = 1
    kv_tokens: int = 0
    max_running: int = 256
    chunk_tokens: int = 8192
    factor: float = 1.0
    """Its steps beside the cost model's, as learnt from its counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Servers by role; those on their way count where they are going."""

    prefills: int
    decodes: int
    prefill: Site
    decode: Site
    moving: int = 0
    """Servers that serve nobody at the moment: they drain, switch or start."""
    budget_gpus: int = 0
    """The most that may be used; 0: what there is, which then cannot be made less either."""
    switch_s: float = 5.0
    """From the decision until a server serves in its new role."""
    launch_s: float = 45.0

    @property
    def gpus(self) -> int:
        return self.gpus_of(self.prefills, self.decodes)

    def gpus_of(self, prefills: int, decodes: int) -> int:
        """Of another number of servers."""
        return prefills * self.prefill.gpus + decodes * self.decode.gpus

    @property
    def is_elastic(self) -> bool:
        return self.budget_gpus > 0

    @property
    def limit_gpus(self) -> int:
        return self.budget_gpus or self.gpus
