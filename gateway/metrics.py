"""What Prometheus sees. Every label is bounded: classes, reasons, known servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from backends.exchange import Exchange
from gateway.core import Core
from policies.types import Job, Kind

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counters for what ended; gauges are read from the core when somebody asks."""

    def __init__(self, core: Core, now_us: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        requests = Counter(
            "slackwater_requests",
            "Requests that ended, by class and how",
            ("class", "outcome"),
            registry=self.registry,
        )
        self._requests = requests
        self._tokens = self._counter("slackwater_generated_tokens", "Tokens relayed")
        self._prompt = self._counter("slackwater_prompt_tokens", "Prompt tokens (estimated)")
        self._retries = self._counter("slackwater_retries", "Attempts after the first")
        self._queue = self._histogram("slackwater_queue_seconds", "Arrival to dispatch", _SECONDS)
        self._ttft = self._histogram("slackwater_ttft_seconds", "Arrival to first token", _SECONDS)
        self._tpot = self._histogram(
            "slackwater_tpot_seconds", "Mean time of a token after the first", _TOKEN_SECONDS
        )
        self._total = self._histogram("slackwater_request_seconds", "Arrival to end", _SECONDS)
        self._slo = Counter(
            "slackwater_slo",
            "Online requests that met or missed a target",
            ("target", "met"),
            registry=self.registry,
        )
        self.registry.register(_CoreGauges(core, now_us))

    def _counter(self, name: str, text: str) -> dict[Kind, Counter]:
        family = Counter(name, text, ("class",), registry=self.registry)
        return {kind: family.labels(kind.value) for kind in Kind}

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> dict[Kind, Histogram]:
        family = Histogram(name, text, ("class",), buckets=buckets, registry=self.registry)
        return {kind: family.labels(kind.value) for kind in Kind}

    def record(self, exchange: Exchange, job: Job, outcome: str) -> None:
        kind, times = job.kind, exchange.timeline
        self._requests.labels(kind.value, outcome).inc()
        self._prompt[kind].inc(job.prompt_tokens)
        if times.dispatched_us:
            self._queue[kind].observe((times.dispatched_us - times.arrived_us) / 1e6)
        if exchange.attempts > 1:
            self._retries[kind].inc(exchange.attempts - 1)
        if exchange.tokens:
            self._tokens[kind].inc(exchange.tokens)
        if times.ended_us:
            self._total[kind].observe((times.ended_us - times.arrived_us) / 1e6)
        if times.first_token_us:
            self._record_stream(exchange, job)

    def _record_stream(self, exchange: Exchange, job: Job) -> None:
        times = exchange.timeline
        self._ttft[job.kind].observe((times.first_token_us - times.arrived_us) / 1e6)
        tpot_us = exchange.tpot_us
        if tpot_us is not None:
            self._tpot[job.kind].observe(tpot_us / 1e6)
        if job.kind is Kind.ONLINE:
            met = times.first_token_us <= job.deadline_us
            self._slo.labels("ttft", str(met).lower()).inc()
            if tpot_us is not None:
                self._slo.labels("tpot", str(tpot_us <= job.tpot_us).lower()).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


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
        yield from self._workers()

    def _workers(self) -> Iterable[Metric]:
        now_us = self._now_us()
        gauges = {
            name: GaugeMetricFamily(f"slackwater_worker_{name}", text, labels=["worker"])
            for name, text in (
                ("usable", "1 when in rotation: up, not draining, breaker closed"),
                ("prefill_tokens", "Prompt tokens sent and not yet computed"),
                ("decodes", "Jobs resident"),
                ("context_tokens", "Tokens of their contexts"),
                ("reserved_tokens", "KV tokens booked"),
                ("foreign_tokens", "KV tokens that others use, by the server's own report"),
                ("load_age_seconds", "Age of the server's last load report"),
            )
        }
        for name, ledger in self._core.ledgers.items():
            gauges["usable"].add_metric([name], float(ledger.usable(now_us)))
            gauges["prefill_tokens"].add_metric([name], ledger.prefill_tokens)
            gauges["decodes"].add_metric([name], ledger.decodes)
            gauges["context_tokens"].add_metric([name], ledger.context_tokens)
            gauges["reserved_tokens"].add_metric([name], ledger.reserved_tokens)
            gauges["foreign_tokens"].add_metric([name], ledger.foreign_tokens)
            if ledger.load is not None:
                age_s = (now_us - ledger.load.seen_us) / 1e6
                gauges["load_age_seconds"].add_metric([name], age_s)
        return gauges.values()
