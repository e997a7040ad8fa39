"""What the metrics page says of role switches and of the last look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.planning import Look
from policies.events import Outcome, SwitchOver
from policies.forecast import LAST
from policies.types import Role


class SwitchTotals:
    """Of all switches since the start."""

    def __init__(self) -> None:
        self.outcomes: dict[Outcome, int] = {}
        self._drained_s = self._took_s = 0.0

    def add(self, over: SwitchOver) -> None:
        self.outcomes[over.outcome] = self.outcomes.get(over.outcome, 0) + 1
        if over.outcome is not Outcome.HANGS:  # its end will be told, too
            self._drained_s += over.drained_us / 1e6
            self._took_s += over.took_us / 1e6

    def collect(self) -> Iterator[Metric]:
        switches = CounterMetricFamily(
            "slackwater_role_switches", "Role switches by how they ended", labels=["outcome"]
        )
        for outcome, count in self.outcomes.items():
            switches.add_metric([outcome.value], count)
        yield switches
        seconds = CounterMetricFamily(
            "slackwater_role_switch_seconds", "Time out of rotation", labels=["part"]
        )
        seconds.add_metric(["drain"], self._drained_s)
        seconds.add_metric(["switch"], self._took_s - self._drained_s)
        yield seconds


def gauge(name: str, words: str, value: float | None) -> Metric:
    """Without a value it is named, and nothing is said of it."""
    return GaugeMetricFamily(name, words, value=value)


def info_of(labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(
        "slackwater_ratio_info", "What decides, and who changes servers", labels=[*labels]
    )
    family.add_metric([*labels.values()], 1)
    return family


def of_look(look: Look | None, serving: Mapping[Role, int]) -> Iterator[Metric]:
    """As of the last look, but for what serves."""
    servers = GaugeMetricFamily(
        "slackwater_ratio_servers", "Servers of each role", labels=["role", "which"]
    )
    rate = GaugeMetricFamily(
        "slackwater_ratio_rate_per_s", "Online requests a second", labels=["which"]
    )
    errors = GaugeMetricFamily(
        "slackwater_forecast_error", "Errors over load, of late", labels=["by"]
    )
    if look is not None:
        wanted = {Role.PREFILL: look.plan.prefills, Role.DECODE: look.plan.decodes}
        need = {} if look.need is None else dict(zip(wanted, look.need, strict=True))
        for which, counts in (("had", serving), ("wanted", wanted), ("need", need)):
            for role, count in counts.items():
                servers.add_metric([role.value, which], count)
        rate.add_metric([LAST], look.forecast.last)
        rate.add_metric(["forecast"], look.forecast.point)
        rate.add_metric(["upper"], look.forecast.upper)
        for name, error in look.forecast.errors.items():
            errors.add_metric([name], error)
    yield from (servers, rate, errors)
