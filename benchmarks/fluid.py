"""The most offline tokens that any schedule could have served beside known online requests.

A linear program over bins of time. It keeps what no schedule can get around: the prefill seconds of
every prompt, step times that grow with batch and context, KV memory, when online requests come, and
when their first and last tokens are due. It relaxes everything else:

* requests are fluid: any part of a prompt or an answer may be computed in any bin, on any server of
  its role, and servers of a role are one large server;
* all arrivals and lengths are known, and preemption, migration and transfers cost nothing;
* prompts are packed without loss, so that the fixed time of a prefill step is never paid;
* online requests share one mean pace: steps longer than the target are made up for by shorter ones
  of other requests, and each answer may begin as late as its first token is due;
* the requests that may miss their targets cost nothing: the longest prompts are left out of the
  prefill servers' work, and the longest answers out of the decode servers'.

It does not relax the offline work: that is served in its mean proportions. A schedule that picks
the requests with short prompts and long answers out of an endless backlog would make more tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix, diags, eye, hstack, vstack

from backends.steptimes import StepTimes
from backends.workload import Ask

GRID = (0, 1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128, 160, 192,
        224, 256)  # fmt: skip
"""Sequences of one kind in a step; steps between these are mixtures of them."""
TANGENTS = 16

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """The fleet: so many prefill servers and decode servers, all alike."""

    prefills: int
    decodes: int
    times: StepTimes
    kv_tokens: int
    max_running: int

    @property
    def fixed_prefill_s(self) -> float:
        """Of a step, however little is in it."""
        return max(0.0, 2 * self.times.prefill_s([(128, 0)]) - self.times.prefill_s([(256, 0)]))

    def prefill_s(self, tokens: int) -> float:
        return self.times.prefill_s([(tokens, 0)]) - self.fixed_prefill_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What requests need in the mean; the steps of an answer's first token are the prompt's."""

    prefill_s: float
    output_tokens: float
    prompt_tokens: float
    context_tokens: float
    """Of a sequence, over all its decode steps."""

    @classmethod
    def of(cls, asks: Sequence[Ask], servers: Servers) -> Mix:
        steps = sum(max(0, it.output_tokens - 1) for it in asks)
        held = sum(
            max(0, it.output_tokens - 1) * (it.input_tokens + it.output_tokens / 2) for it in asks
        )
        return cls(
            prefill_s=sum(servers.prefill_s(it.input_tokens) for it in asks) / len(asks),
            output_tokens=sum(it.output_tokens for it in asks) / len(asks),
            prompt_tokens=sum(it.input_tokens for it in asks) / len(asks),
            context_tokens=held / steps if steps else 0.0,
        )

    @property
    def steps(self) -> float:
        return max(0.0, self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Frontier:
    """Offline decode tokens a second of one server against its online ones: lines above it."""

    slopes: Array
    offsets: Array
    most_online: float


def frontier(servers: Servers, online: Mix | None, offline: Mix, tpot_s: float) -> Frontier:
    """Tangents of a concave function, each of them from one small linear program."""
    steps = _steps(servers, online, offline)
    durations, ours, theirs = steps[:, 0], steps[:, 1], steps[:, 2]
    late = theirs * (durations - tpot_s)
    most = 0.0
    if online is not None:
        most = -_solve(-theirs, durations, late, None, theirs)[0]
    slopes, offsets = [], []
    for rate in np.linspace(0.0, 0.999 * most, TANGENTS if most else 1):
        value, slope = _solve(-ours, durations, late, rate, theirs)
        slopes.append(-slope)
        offsets.append(-value + slope * rate)
    return Frontier(np.array(slopes), np.array(offsets), most)


def _steps(servers: Servers, online: Mix | None, offline: Mix) -> Array:
    """Each possible step: how long it takes, its offline and its online sequences."""
    found = []
    for ours, theirs in product(GRID, GRID if online is not None else (0,)):
        context = ours * offline.context_tokens
        context += theirs * online.context_tokens if online is not None else 0.0
        if 0 < ours + theirs <= servers.max_running and context <= servers.kv_tokens:
            found.append((servers.times.decode_s(ours + theirs, round(context)), ours, theirs))
    return np.array(found)


def _solve(
    cost: Array, durations: Array, late: Array, rate: float | None, theirs: Array
) -> tuple[float, float]:
    """The least cost of a second, and how it changes with the rate of online tokens."""
    result = linprog(
        cost,
        A_ub=np.vstack([durations, late]),
        b_ub=[1.0, 0.0],
        A_eq=None if rate is None else theirs.reshape(1, -1),
        b_eq=None if rate is None else [rate],
        method="highs",
    )
    if result.status != 0:
        raise ValueError(f"no mixture of steps was found: {result.message}")
    return float(result.fun), 0.0 if rate is None else float(result.eqlin.marginals[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Online work over the bins: what may have been done by the end of each, and what must be."""

    open_prefill_s: Array
    due_prefill_s: Array
    open_steps: Array
    due_steps: Array


def demand(
    asks: Sequence[Ask], servers: Servers, targets: Targets, edges: Array, missing: int
) -> Demand:
    """`missing` requests may miss their targets: the most costly ones are left out."""
    bins = len(edges) - 1
    prefill = np.array([servers.prefill_s(it.input_tokens) for it in asks])
    steps = np.array([max(0, it.output_tokens - 1) for it in asks], dtype=float)
    came = np.array([it.arrival_s for it in asks])
    first_due = came + targets.ttft_s
    prefill = _without_largest(prefill, missing)
    steps_kept = _without_largest(steps, missing)

    def by_end(times: Array, amounts: Array) -> Array:
        """Within a bin, all come at its beginning and are due at its end: that only relaxes."""
        where = np.searchsorted(edges, times, side="right") - 1
        inside = where < bins
        return np.cumsum(np.bincount(where[inside], amounts[inside], minlength=bins)[:bins])

    return Demand(
        open_prefill_s=by_end(came, prefill),
        due_prefill_s=by_end(first_due, prefill),
        open_steps=by_end(came, steps_kept),
        due_steps=by_end(first_due + steps * targets.tpot_s, steps_kept),
    )


def _without_largest(values: Array, count: int) -> Array:
    kept = values.copy()
    if count:
        kept[np.argsort(values)[-count:]] = 0.0
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    tokens_per_s: float
    requests_per_s: float
    feasible: bool = True
    """Whether the online requests alone could keep their targets."""


def bound(
    servers: Servers,
    online: Sequence[Ask],
    offline: Mix,
    targets: Targets,
    *,
    from_s: float,
    until_s: float,
    missing: int = 0,
    bin_s: float = 1.0,
) -> Bound:
    """Offline tokens between `from_s` and `until_s`, with an endless backlog from the beginning."""
    edges = np.linspace(0.0, until_s, max(1, round(until_s / bin_s)) + 1)
    mix = Mix.of(online, servers) if online else None
    front = frontier(servers, mix, offline, targets.tpot_s)
    work = demand(online, servers, targets, edges, missing)
    value = _schedule(servers, offline, front, work, edges, from_s)
    if value is None:
        return Bound(tokens_per_s=0.0, requests_per_s=0.0, feasible=False)
    requests = value / offline.steps / (until_s - from_s)
    return Bound(tokens_per_s=requests * offline.output_tokens, requests_per_s=requests)


def _schedule(
    servers: Servers, offline: Mix, front: Frontier, work: Demand, edges: Array, from_s: float
) -> float | None:
    """Variables: sums by the end of each bin, of online and offline prefill and of their steps.

    In that order; a sum is bounded by what was due and by what had come.
    """
    bins, width = len(edges) - 1, float(edges[1] - edges[0])
    sums = eye(bins, format="csr")
    gain = sums - diags([np.ones(bins - 1)], [-1])
    none = csr_matrix((bins, bins))
    each = offline.steps / offline.prefill_s
    stock = servers.decodes * servers.kv_tokens / offline.prompt_tokens * offline.steps
    seconds = servers.decodes * width
    zero, inf = np.zeros(bins), np.full(bins, np.inf)
    rows = [
        ([gain, gain, none, none], -inf, np.full(bins, servers.prefills * width)),
        ([gain, none, none, none], zero, inf),
        ([none, gain, none, none], zero, inf),
        ([none, none, gain, none], zero, np.full(bins, front.most_online * seconds)),
        ([none, none, none, gain], zero, inf),
        ([none, each * sums, none, -sums], zero, np.full(bins, stock)),
    ]
    rows += [
        ([none, none, -slope * gain, gain], -inf, np.full(bins, offset * seconds))
        for slope, offset in zip(front.slopes, front.offsets, strict=True)
    ]
    matrix = vstack([hstack(blocks) for blocks, _, _ in rows], format="csr")
    low, high = (np.concatenate([row[side] for row in rows]) for side in (1, 2))
    counts = np.clip((edges[1:] - from_s) / width, 0.0, 1.0)
    result = milp(
        np.concatenate([np.zeros(3 * bins), -(gain.T @ counts)]),
        constraints=LinearConstraint(matrix, low - 1e-9, high + 1e-9),
        bounds=Bounds(
            np.concatenate([work.due_prefill_s, zero, work.due_steps, zero]) - 1e-9,
            np.concatenate([work.open_prefill_s, inf, work.open_steps, inf]) + 1e-9,
        ),
    )
    return float(-result.fun) if result.status == 0 else None
