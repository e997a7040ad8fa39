"""What the configuration means to the core: its options as rules and policies."""

from __future__ import annotations

from dataclasses import asdict, replace

from gateway.actuation import (
    ELASTIC,
    LAUNCH_S,
    TYPICAL_S,
)
from gateway.config import Config, RatioSettings, costs_named
from gateway.planning import Control
from gateway.rules import Rules
from gateway.switching import SwitchRule
from policies.admit import Admit, Headroom
from policies.breaker import BreakerRule
from policies.colocation import Colocated
from policies.demand import Targets
from policies.dopd_plus import DopdPlus
from policies.hold import ForSlack as HoldForSlack
from policies.hold import Hold
from policies.planners import DynLoad, DynSla
from policies.pools import ByLatency, Pools
from policies.preempt import AbortRule, ForSlack, GiveWay, Stay
from policies.registry import DISPLACE, GATHER, HOLD, ORDER, PLACE, POOLS, PREEMPT, RATIO
from policies.retry import RetryRule
from policies.standstill import Standstill


def control_of(ratio: RatioSettings, targets: Targets) -> Control | None:
    """None where nobody is to look: the fleet stays as it is."""
    if ratio.policy == "static":
        return None
    policy = RATIO[ratio.policy]()
    if isinstance(policy, DopdPlus):
        policy = DopdPlus(band=ratio.band, dwell_s=ratio.dwell_s)
    elif isinstance(policy, DynLoad | DynSla):
        policy = replace(policy, headroom=ratio.headroom)
    return Control(
        policy=policy,
        mode=ratio.mode,
        interval_s=ratio.interval_s,
        quantile=ratio.quantile,
        targets=replace(targets, attained=ratio.attained),
        lease_s=ratio.lease_s,
        budget_gpus=ratio.budget_gpus if ratio.actuator in ELASTIC else 0,
        switch_s=TYPICAL_S.get(ratio.actuator, LAUNCH_S),
        launch_s=LAUNCH_S,
    )


def rules_of(config: Config) -> Rules:
    retry, breaker, colocation = config.retry, config.breaker, config.colocation
    return Rules(
        order=ORDER[config.policies.order](),
        displace=DISPLACE[config.policies.displace](),
        gather=GATHER[config.policies.gather](),
        hold=_hold(config),
        place=PLACE[config.policies.place](),
        pools=_pools(config),
        admit=_admit(config),
        give_way=_give_way(config),
        aborts=AbortRule(
            per_request=colocation.victims_per_request,
            per_s=colocation.aborts_per_s,
            burst=colocation.abort_burst,
        ),
        breaker=BreakerRule(
            failures=breaker.failures,
            cooldown_us=_us(breaker.cooldown_ms),
            cooldown_max_us=_us(breaker.cooldown_max_ms),
        ),
        retry=RetryRule(
            online_attempts=retry.online_attempts,
            offline_attempts=retry.offline_attempts,
            backoff_us=_us(retry.backoff_ms),
            burst_tokens=retry.burst_tokens,
            share=retry.share,
        ),
        costs=costs_named(config),
        standstill=_standstill(config),
        switch=SwitchRule(
            hand_over_us=_us(config.ratio.hand_over_s * 1e3),
            hand_over_offline_us=_us(config.ratio.hand_over_offline_s * 1e3),
            drain_us=_us(config.ratio.drain_s * 1e3),
            switch_us=_us(config.ratio.switch_s * 1e3),
        ),
        max_queued=config.limits.max_queued,
        load_stale_us=_us(config.telemetry.stale_ms),
    )


def _is_colocated(config: Config) -> bool:
    return POOLS[config.policies.pools] is ByLatency


def _pools(config: Config) -> Pools:
    if not _is_colocated(config):
        return POOLS[config.policies.pools]()
    colocation = config.colocation
    return ByLatency(lends=colocation.lend, without_relaxed=colocation.without_relaxed)


def _admit(config: Config) -> Admit:
    admission, online = config.admission, config.classes.online
    plain = Headroom(
        prefill_cap_tokens=admission.prefill_cap_tokens,
        prefill_chunks=admission.prefill_chunks,
        kv_watermark=admission.kv_watermark,
        output_reserve_tokens=admission.output_reserve_tokens,
    )
    if not _is_colocated(config):
        return plain
    colocation = config.colocation
    return Colocated(
        **asdict(plain),
        ttft_us=_us(online.ttft_ms),
        tpot_us=_us(online.tpot_ms),
        gate=colocation.gate,
        gate_share=colocation.gate_share,
        headroom=colocation.headroom,
        step_share=colocation.lend_share,
    )


def _hold(config: Config) -> Hold:
    if HOLD[config.policies.hold] is not HoldForSlack:
        return HOLD[config.policies.hold]()
    return HoldForSlack(answer_tokens=config.admission.output_reserve_tokens)


def _give_way(config: Config) -> GiveWay:
    if not _is_colocated(config) or PREEMPT[config.policies.preempt] is not ForSlack:
        return Stay()
    colocation = config.colocation
    return ForSlack(
        tpot_us=_us(config.classes.online.tpot_ms),
        ttft_share=colocation.ttft_share,
        step_share=colocation.shed_share,
        protect_after=colocation.protect_after,
        by_bottleneck=colocation.victims == "bottleneck",
        pulls=colocation.pull,
    )


def _standstill(config: Config) -> Standstill | None:
    colocation = config.colocation
    if not colocation.pause or not isinstance(_give_way(config), ForSlack):
        return None
    return Standstill(
        tpot_us=_us(config.classes.online.tpot_ms),
        step_share=colocation.shed_share,
        calm_share=min(colocation.lend_share, colocation.shed_share),
        ttft_share=colocation.ttft_share,
        longest_us=_us(colocation.longest_pause_s * 1e3),
    )


def _us(ms: float) -> int:
    return round(ms * 1000)
