"""How many requests a second so many servers bear inside the targets, by the cost model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from policies.demand import Flow, Lengths, Site, Targets
from policies.sizing import greatest

WATERMARK = 0.92
"""Of a decode server's KV cache."""
FULLEST = 0.97
"""No server is planned to be busier than this, whatever the target."""
HALVINGS = 24


def prefill_s(site: Site, flow: Flow) -> float:
    """The mean time of one prompt by itself; the squares of the lengths count."""
    return _prompts_s(site, flow, 1)


def prefill_share_s(site: Site, flow: Flow) -> float:
    """A prompt's share of a full chunk, which is what a busy server works on."""
    new = max(1.0, flow.prompt.mean * (1 - flow.cached_share))
    together = max(1, int(site.chunk_tokens / new))
    return _prompts_s(site, flow, together) / together


def _prompts_s(site: Site, flow: Flow, count: int) -> float:
    new_share, cached = 1 - flow.cached_share, flow.cached_share
    new = max(1, round(count * flow.prompt.mean * new_share))
    pairs = count * flow.prompt.squared * new_share * (cached + 0.5 * new_share)
    context = round(count * flow.prompt.mean * cached)
    return site.cost.prefill_sums(count, new, context, pairs).seconds * site.factor


def _variation(site: Site, flow: Flow) -> float:
    """Squared, of the time of a prompt, from the slope of that time."""
    step = max(1.0, 0.1 * flow.prompt.mean)
    mean_s = prefill_s(site, flow)
    longer = Lengths(flow.prompt.mean + step, flow.prompt.variance)
    more = Flow(prompt=longer, cached_share=flow.cached_share)
    slope = (prefill_s(site, more) - mean_s) / step
    return slope * slope * flow.prompt.variance / (mean_s * mean_s)


def waits_share(servers: int, busy: float) -> float:
    """Erlang C: the share that waits, where `busy` servers of these are busy on average."""
    if busy >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = busy * blocked / (count + busy * blocked)
    use = busy / servers
    return blocked / (1 - use + use * blocked)


def late_share(
    servers: int, rate_per_s: float, service_s: float, slack_s: float, variation: float
) -> float:
    """Those that wait longer than `slack_s` in one queue (Allen and Cunneen's exponent)."""
    if slack_s <= 0 or rate_per_s * service_s >= servers:
        return 1.0
    spare_per_s = servers / service_s - rate_per_s
    waits = waits_share(servers, rate_per_s * service_s)
    return waits * math.exp(-spare_per_s * slack_s / max(variation, 1e-6))


@dataclass(frozen=True, slots=True)
class Prefilling:
    """One flow on servers of one kind: what decides how many of them keep the TTFT target."""

    alone_s: float
    share_s: float
    """Of a server, for each prompt."""
    slack_s: float
    variation: float
    late: float
    """The share of requests that may miss the target."""

    @classmethod
    def of(cls, site: Site, flow: Flow, targets: Targets) -> Prefilling:
        alone_s = prefill_s(site, flow)
        return cls(
            alone_s=alone_s,
            share_s=prefill_share_s(site, flow),
            slack_s=targets.ttft_s - alone_s,
            variation=0.5 * (flow.burstiness + _variation(site, flow)),
            late=1 - targets.attained,
        )

    def bears(self, servers: int, rate_per_s: float) -> bool:
        """Where even an idle server is late, what can be kept is that the queue does not grow."""
        if rate_per_s * self.share_s > FULLEST * servers:
            return False
        if self.slack_s <= 0:
            return True
        late = late_share(servers, rate_per_s, self.share_s, self.slack_s, self.variation)
        return late <= self.late

    def rate(self, servers: int) -> float:
        """The most requests a second."""
        low, high = 0.0, FULLEST * servers / self.share_s
        if self.bears(servers, high):
            return high
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.bears(servers, middle) else (low, middle)
        return low


def prefill_rate(servers: int, site: Site, flow: Flow, targets: Targets) -> float:
    """Requests a second that keep the TTFT target."""
    return Prefilling.of(site, flow, targets).rate(servers)


def mean_context(flow: Flow) -> float:
    """Of a request in the midst of its answer: long answers are met more often."""
    grown = flow.answer.squared / (2 * flow.answer.mean) if flow.answer.mean else 0.0
    return flow.prompt.mean + grown


def largest_decode_batch(site: Site, flow: Flow, targets: Targets) -> int:
    """Sequences whose step keeps the TPOT target and that fit into the cache."""
    context = max(1.0, mean_context(flow))
    seats = site.max_running
    if site.kv_tokens:
        seats = min(seats, int(WATERMARK * site.kv_tokens / context))
    return max(
        1, greatest(lambda count: step_s(site, count, context) <= targets.tpot_s, 1, max(1, seats))
    )


def step_s(site: Site, count: int, context: float) -> float:
    return site.cost.decode(count, round(count * context)).seconds * site.factor


def decode_rate(servers: int, site: Site, flow: Flow, targets: Targets) -> float:
    """Requests a second (Little's law): the batch, over the time that each of them stays in it.

    Nothing is taken off for chance: the forecast's quantile, at which this is asked, has it.
    """
    if flow.answer.mean <= 0:
        return math.inf
    most = largest_decode_batch(site, flow, targets)
    return servers * most / (flow.answer.mean * step_s(site, most, mean_context(flow)))
