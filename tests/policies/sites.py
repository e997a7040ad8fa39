"""An 8B model on one H100, and demands on it, for tests of ratio policies."""

from __future__ import annotations

from policies.constants import lookup
from policies.demand import Demand, Fleet, Flow, Lengths, Site, Targets
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import Parallel, build
from policies.shipped import SHIPPED
from policies.sizing import capacity_tokens

_MODEL, _DEVICE = model_named("Llama-3.1-8B"), device_named("h100")
COST = build(_MODEL, _DEVICE, lookup(SHIPPED, _DEVICE.name, _MODEL.family, 1), Parallel())
SITE = Site(cost=COST, kv_tokens=capacity_tokens(COST))
TARGETS = Targets(ttft_s=1.5, tpot_s=0.02)

CHAT = Flow(prompt=Lengths(1155.0, 1100.0**2), answer=Lengths(211.0, 200.0**2))
CODE = Flow(prompt=Lengths(2048.0, 1500.0**2), answer=Lengths(28.0, 60.0**2))
REASONING = Flow(prompt=Lengths(1309.0, 3000.0**2), answer=Lengths(2318.0, 3000.0**2))


def flow(like: Flow, rate: float, burstiness: float = 1.0) -> Flow:
    return Flow(rate_per_s=rate, burstiness=burstiness, prompt=like.prompt, answer=like.answer)


def demand(like: Flow, rate: float, **others: float) -> Demand:
    asked = flow(like, rate)
    return Demand(online=asked, expected=asked, targets=TARGETS, **others)  # type: ignore[arg-type]


def fleet(prefills: int, decodes: int, budget: int = 0, moving: int = 0) -> Fleet:
    return Fleet(
        prefills=prefills,
        decodes=decodes,
        prefill=SITE,
        decode=SITE,
        budget_gpus=budget,
        moving=moving,
    )
