"""What one server says of its load: an entry of SGLang's /v1/loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from backends.engine.machine import Machine
from backends.engine.prefilling import Prefilling
from backends.engine.receiving import Receiving
from backends.engine.request import Resident
from backends.engine.sending import Sending
from policies.types import Role

MODES = {Role.UNIFIED: "null", Role.PREFILL: "prefill", Role.DECODE: "decode"}
"""SGLang's own names of the roles."""


def load_report(
    machine: Machine, prefilling: Prefilling, sending: Sending, receiving: Receiving
) -> dict[str, Any]:
    prealloc = len(receiving.prealloc) + len(receiving.handshaking)
    waiting = len(prefilling.waiting) + len(receiving.ready)
    used, counters = machine.kv.used, machine.counters
    queued = used + _fill(prefilling.waiting.values()) + _fill(receiving.prealloc.values())
    total = queued + _fill(receiving.retracted.values())
    in_transfer = _fill(receiving.receiving.values())
    return {
        "dp_rank": 0,
        "num_running_reqs": len(machine.batch),
        "num_waiting_reqs": waiting
        + sending.bootstrapping
        + prealloc
        + len(receiving.receiving)
        + len(receiving.retracted),
        "num_waiting_uncached_tokens": prefilling.uncached_tokens(),
        "num_used_tokens": used,
        "num_total_tokens": total,
        "num_active_tokens": max(0, total - in_transfer),
        "num_prealloc_ready_tokens": _fill(receiving.prealloc.values()),
        "max_total_num_tokens": machine.kv.capacity,
        "max_running_requests": machine.config.max_running,
        "token_usage": round(used / machine.kv.capacity, 4),
        "gen_throughput": round(counters.tokens_per_s, 2) if len(machine.batch) else 0.0,
        "cache_hit_rate": _hit_rate(machine),
        "utilization": 0.0,
        "total_prefill_uncached_tokens": counters.prefill_uncached_tokens,
        "total_prefill_busy_us": counters.prefill_busy_us,
        "decode_moments": list(counters.decode_moments) if counters.decode_moments[0] else None,
        "memory": {
            "weight_gb": 15.0,
            "kv_cache_gb": round(
                machine.kv.capacity * machine.config.kv_bytes_per_token / 2**30, 3
            ),
            "graph_gb": 0.0,
            "token_capacity": machine.kv.capacity,
        },
        "disaggregation": {
            "mode": MODES[machine.role],
            "prefill_bootstrap_queue_reqs": sending.bootstrapping,
            "prefill_inflight_queue_reqs": len(sending.sending),
            "decode_prealloc_queue_reqs": prealloc,
            "decode_transfer_queue_reqs": len(receiving.receiving),
            "decode_retracted_queue_reqs": len(receiving.retracted),
            "kv_transfer_speed_gb_s": machine.config.link_bytes_per_s / 1e9,
            "kv_transfer_latency_ms": machine.config.link_latency_s * 1e3,
        },
        "queues": {
            "waiting": waiting,
            "grammar": 0,
            "paused": 0,
            "retracted": len(receiving.retracted),
            "prealloc_ready": len(receiving.prealloc),
        },
    }


def _fill(residents: Iterable[Resident]) -> int:
    return sum(resident.fill_tokens for resident in residents)


def _hit_rate(machine: Machine) -> float:
    cached = machine.counters.prefill_cached_tokens
    total = cached + machine.counters.prefill_uncached_tokens
    return round(cached / total, 4) if total else 0.0
