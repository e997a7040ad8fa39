"""What Prometheus sees of engines that have the plug-in: what each of them said of itself last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from backends.engine_words import Heard


class EngineGauges(Collector):
    """As old as the last renewal of a lease: nobody is asked for them."""

    def __init__(self, heard: Mapping[str, Heard]) -> None:
        self._heard = heard

    def collect(self) -> Iterator[Metric]:
        mode = GaugeMetricFamily(
            "slackwater_worker_engine_mode",
            "1 for who takes its decode steps",
            labels=["worker", "mode"],
        )
        parked, aside = (
            GaugeMetricFamily(f"slackwater_worker_engine_{name}", text, labels=["worker"])
            for name, text in (
                ("parked", "Running requests that sit a decode step out"),
                ("aside", "Offline prompts that are put aside for online ones"),
            )
        )
        views, displaced = (
            CounterMetricFamily(f"slackwater_worker_engine_{name}", text, labels=["worker"])
            for name, text in (
                ("views", "Choices of fewer than all for a decode step"),
                ("displaced", "Times that an offline prompt was put aside"),
            )
        )
        for name, heard in self._heard.items():
            mode.add_metric([name, heard.mode], 1)
            parked.add_metric([name], heard.parked)
            aside.add_metric([name], heard.aside)
            views.add_metric([name], heard.views)
            displaced.add_metric([name], heard.displaced)
        yield from (mode, parked, aside, views, displaced)
