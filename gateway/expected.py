"""What load is to be expected: what came in at the front door, and the forecasts of it."""

from __future__ import annotations

from gateway.ingress import Ingress
from policies.demand import Flow
from policies.forecast import Outlook, Prediction
from policies.types import Kind

ANOTHER_KIND = 4.0
"""Where prompts or answers are so many times as long as they were, or as short, what was learnt of
the arrivals before is forgotten: peaks of short requests are no measure for long ones."""


class Expected:
    """Told when an interval is over; lengths are those of `flows`, rates are forecast."""

    def __init__(self, now_us: int, quantile: float) -> None:
        self.ingress = Ingress(now_us)
        self.flows: dict[Kind, Flow] = {}
        """Of the last interval; none before the first one is over."""
        self._rates = {kind: Outlook(quantile=quantile) for kind in Kind}
        self._steady = Outlook(quantile=quantile)
        """Of online requests, over as long as it takes to get a server: what comes and goes within
        that time is not helped by one."""
        self._lasting = Outlook(quantile=quantile)
        """The same over as long as one of them stays, too."""
        self._like: tuple[float, float] | None = None
        """Prompts and answers of the kind of load that the forecasts have seen."""

    def adopt(self, quantile: float) -> None:
        for outlook in (*self._rates.values(), self._steady, self._lasting):
            outlook.quantile = quantile

    def observe(self, interval_s: float, lead_s: float, tpot_s: float, now_us: int) -> None:
        """The interval that has just ended; it takes `lead_s` to get a server."""
        for kind in Kind:
            self.flows[kind] = self.ingress.look(kind, interval_s, now_us)
        online = self.flows[Kind.ONLINE]
        if self._is_another_kind(online):
            for outlook in (self._rates[Kind.ONLINE], self._steady, self._lasting):
                outlook.forget()
        for kind, flow in self.flows.items():
            self._rates[kind].observe(flow.rate_per_s)
        lead_s = max(interval_s, lead_s)
        stay_s = online.answer.mean * tpot_s
        self._steady.observe(self._rate_per_s(lead_s, now_us))
        self._lasting.observe(self._rate_per_s(max(lead_s, stay_s), now_us))

    def _rate_per_s(self, span_s: float, now_us: int) -> float:
        return self.ingress.monitor.rate_per_s(Kind.ONLINE, round(span_s * 1e6), now_us)

    def _is_another_kind(self, flow: Flow) -> bool:
        now = (flow.prompt.mean, flow.answer.mean)
        if not all(now):
            return False
        was, self._like = self._like or now, self._like or now
        factors = (max(a / b, b / a) for a, b in zip(now, was, strict=True))
        if max(factors) < ANOTHER_KIND:
            return False
        self._like = now
        return True

    def forecast(self, kind: Kind) -> Prediction:
        return self._rates[kind].predict()

    @property
    def steady_per_s(self) -> float:
        """What servers are to be ready for while others are on their way."""
        return self._steady.predict().upper

    @property
    def lasting_per_s(self) -> float:
        return self._lasting.predict().upper
