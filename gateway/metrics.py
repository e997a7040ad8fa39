"""What Prometheus sees. Every label is bounded: classes, reasons, known servers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from backends.exchange import Exchange
from gateway.core import Core
from policies.ledger import Ledger
from policies.types import Job, Kind

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Tally:
    """A histogram in plain numbers: a fifth of what the client library's costs to write."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def cumulated(self) -> tuple[list[tuple[str, float]], float]:
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True)), self._sum


class Counts(Collector):
    """A counter with labels, in a plain dict."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._values: dict[tuple[str, ...], int] = {}

    def add(self, number: int, *labels: str) -> None:
        self._values[labels] = self._values.get(labels, 0) + number

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric([str(label) for label in labels], value)
        yield family


class _Histograms(Collector):
    def __init__(self, name: str, text: str, tallies: dict[Kind, Tally]) -> None:
        self._name = name
        self._text = text
        self._tallies = tallies

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["class"])
        for kind, tally in self._tallies.items():
            buckets, total = tally.cumulated()
            family.add_metric([kind.value], buckets, total)
        yield family


class Metrics:
    """Numbers about what ended; gauges are read from the core when somebody asks."""

    def __init__(self, core: Core, now_us: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        count = self._counter
        self._requests = count("requests", "Requests that ended", "class", "outcome")
        self._tokens = count("generated_tokens", "Tokens relayed", "class")
        self._prompt = count("prompt_tokens", "Prompt tokens (estimated)", "class")
        self._retries = count("retries", "Attempts after the first", "class")
        self._slo = count("slo", "Online requests that met or missed a target", "target", "met")
        tally = self._histogram
        self._queue = tally("queue_seconds", "Arrival to dispatch", _SECONDS)
        self._ttft = tally("ttft_seconds", "Arrival to first token", _SECONDS)
        self._tpot = tally("tpot_seconds", "Mean time of a token after the first", _TOKEN_SECONDS)
        self._total = tally("request_seconds", "Arrival to end", _SECONDS)
        self.registry.register(_CoreGauges(core, now_us))

    def _counter(self, name: str, text: str, *labels: str) -> Counts:
        counts = Counts(f"slackwater_{name}", text, labels)
        self.registry.register(counts)
        return counts

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> dict[Kind, Tally]:
        tallies = {kind: Tally(bounds) for kind in Kind}
        self.registry.register(_Histograms(f"slackwater_{name}", text, tallies))
        return tallies

    def record(self, exchange: Exchange, job: Job, outcome: str) -> None:
        kind, times = job.kind, exchange.timeline
        arrived_us = times.arrived_us
        self._requests.add(1, kind, outcome)
        self._prompt.add(job.prompt_tokens, kind)
        self._tokens.add(exchange.tokens, kind)
        if exchange.attempts > 1:
            self._retries.add(exchange.attempts - 1, kind)
        if times.dispatched_us:
            self._queue[kind].observe((times.dispatched_us - arrived_us) / 1e6)
        if times.ended_us:
            self._total[kind].observe((times.ended_us - arrived_us) / 1e6)
        if times.first_token_us:
            self._record_stream(exchange, job)
        if kind is Kind.ONLINE and exchange.began_us:
            self._record_targets(exchange, job)

    def refused(self, outcome: str) -> None:
        """It became no job, so it has no class."""
        self._requests.add(1, "none", outcome)

    def _record_stream(self, exchange: Exchange, job: Job) -> None:
        times = exchange.timeline
        self._ttft[job.kind].observe((times.first_token_us - times.arrived_us) / 1e6)
        tpot_us = exchange.tpot_us
        if tpot_us is not None:
            self._tpot[job.kind].observe(tpot_us / 1e6)

    def _record_targets(self, exchange: Exchange, job: Job) -> None:
        self._slo.add(1, "ttft", _YES_NO[exchange.began_us <= job.deadline_us])
        tpot_us = exchange.tpot_us
        if tpot_us is not None:
            self._slo.add(1, "tpot", _YES_NO[tpot_us <= job.tpot_us])

    def render(self) -> bytes:
        return generate_latest(self.registry)


_YES_NO = {True: "true", False: "false"}


class _CoreGauges(Collector):
    def __init__(self, core: Core, now_us: Callable[[], int]) -> None:
        self._core = core
        self._now_us = now_us

    def collect(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily("slackwater_queued_jobs", "Jobs that wait", labels=["class"])
        placed = GaugeMetricFamily("slackwater_placed_jobs", "Jobs at servers", labels=["class"])
        for kind in Kind:
            queued.add_metric([kind.value], self._core.queued(kind))
            placed.add_metric([kind.value], self._core.placed(kind))
        yield from (queued, placed)
        budget = GaugeMetricFamily("slackwater_retry_budget_tokens", "Prompt tokens for retries")
        budget.add_metric([], self._core.retry_budget_tokens)
        yield budget
        yield from self._preemptions()
        yield from self._workers()

    def _preemptions(self) -> Iterable[Metric]:
        accounts, budget = self._core.accounts, self._core.abort_budget
        taken = CounterMetricFamily(
            "slackwater_preemptions",
            "Jobs taken off their servers to go on later",
            labels=["class", "worker", "reason"],
        )
        for (kind, worker, reason), count in accounts.preemptions.items():
            taken.add_metric([kind.value, worker, reason.value], count)
        lost = CounterMetricFamily(
            "slackwater_preemption_lost_tokens", "Generated, and generated again", labels=["class"]
        )
        again = CounterMetricFamily(
            "slackwater_preemption_prompt_tokens",
            "Prompt tokens sent again, what a prefix cache holds included",
            labels=["class"],
        )
        for kind in Kind:
            lost.add_metric([kind.value], accounts.lost_tokens[kind])
            again.add_metric([kind.value], accounts.resent_tokens[kind])
        left = GaugeMetricFamily("slackwater_abort_budget", "Preemptions that may be made at once")
        left.add_metric([], budget.left(self._now_us()))
        shut = CounterMetricFamily("slackwater_abort_budget_spent", "Times that it was used up")
        shut.add_metric([], budget.shut)
        return (taken, lost, again, left, shut)

    def _workers(self) -> Iterable[Metric]:
        now_us = self._now_us()
        gauges = {
            name: GaugeMetricFamily(f"slackwater_worker_{name}", text, labels=["worker"])
            for name, text in (
                ("usable", "1 when in rotation: up, not draining, breaker closed"),
                ("stands_back", "1 while online work on its GPU keeps offline work away"),
                ("prefill_tokens", "Prompt tokens sent and not yet computed"),
                ("decodes", "Jobs resident"),
                ("context_tokens", "Tokens of their contexts"),
                ("reserved_tokens", "KV tokens booked"),
                ("foreign_tokens", "KV tokens that others use, by the server's own report"),
                ("offline_decodes", "Offline jobs among those resident"),
                ("online_expected", "Online jobs that room is kept for"),
                ("step_slack", "Share of the tightest TPOT target that a step leaves"),
                ("load_age_seconds", "Age of the server's last load report"),
            )
        }
        for name, ledger in self._core.ledgers.items():
            gauges["usable"].add_metric([name], float(ledger.usable(now_us)))
            gauges["stands_back"].add_metric([name], float(ledger.stands_back))
            gauges["prefill_tokens"].add_metric([name], ledger.prefill_tokens)
            gauges["decodes"].add_metric([name], ledger.decodes)
            gauges["context_tokens"].add_metric([name], ledger.context_tokens)
            gauges["reserved_tokens"].add_metric([name], ledger.reserved_tokens)
            gauges["foreign_tokens"].add_metric([name], ledger.foreign_tokens)
            gauges["offline_decodes"].add_metric([name], ledger.offline.decodes)
            gauges["online_expected"].add_metric([name], ledger.online.expected)
            if (slack := _step_slack(ledger)) is not None:
                gauges["step_slack"].add_metric([name], slack)
            if ledger.load is not None:
                age_s = (now_us - ledger.load.seen_us) / 1e6
                gauges["load_age_seconds"].add_metric([name], age_s)
        yield from gauges.values()
        engine = GaugeMetricFamily(
            "slackwater_worker_engine",
            "1 for each feature of the plug-in that is in use there",
            labels=["worker", "feature"],
        )
        for name, ledger in self._core.ledgers.items():
            for feature in sorted(ledger.worker.engine):
                engine.add_metric([name, feature], 1)
        yield engine
        yield from self._corrections(now_us)

    def _corrections(self, now_us: int) -> Iterable[Metric]:
        """How far the cost model's predictions of each server are corrected."""
        labels = ["worker", "phase"]
        size, error, age = (
            GaugeMetricFamily(f"slackwater_worker_{name}", text, labels=labels)
            for name, text in (
                ("correction", "Measured over predicted step time, less 1"),
                ("correction_error", "Median relative error that the correction leaves"),
                ("correction_age_seconds", "Since the last step that counted"),
            )
        )
        for name, ledger in self._core.ledgers.items():
            for phase, it in ledger.steps.corrections.items() if ledger.steps else ():
                size.add_metric([name, phase], it.size)
                if it.steps:
                    error.add_metric([name, phase], it.error)
                    age.add_metric([name, phase], it.age_us(now_us) / 1e6)
        return (size, error, age)


def _step_slack(ledger: Ledger) -> float | None:
    """Only where steps are predicted and somebody is there who has a target."""
    if ledger.steps is None or not (target_us := ledger.online.tightest_us(0)):
        return None
    context_tokens = ledger.context_tokens + ledger.foreign_tokens
    return 1 - ledger.steps.decode_us(ledger.decodes, context_tokens) / target_us
