"""What a server says of itself: model, arguments, load, metrics."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

from backends.engine import MODES, Engine
from backends.engine.counters import Histogram
from policies.types import Role

VERSION = "0.5.23"
SECTIONS = {"memory": "memory", "spec": "speculative", "lora": "lora", "disagg": "disaggregation"}
SECTIONS |= {"queues": "queues"}
INCLUDES = ("core", *SECTIONS, "all")


def model_info(engine: Engine) -> dict[str, Any]:
    model = engine.config.model
    return {
        "model_path": model,
        "served_model_name": model,
        "tokenizer_path": model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "auto",
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": MODES[engine.role],
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }


def server_info(engine: Engine, *, port: int, incremental: bool) -> dict[str, Any]:
    config = engine.config
    return {
        "model_path": config.model,
        "served_model_name": config.model,
        "tokenizer_path": config.model,
        "host": "127.0.0.1",
        "port": port,
        "device": "emulated",
        "tp_size": 1,
        "dp_size": 1,
        "page_size": config.page_tokens,
        "chunked_prefill_size": config.chunk_tokens,
        "max_running_requests": config.max_running,
        "max_queued_requests": config.max_queued,
        "context_length": config.context_tokens,
        "enable_priority_scheduling": config.priority,
        "sampling_defaults": "openai",
        "reasoning_parser": None,
        "tool_call_parser": None,
        "chat_template": None,
        "skip_tokenizer_init": False,
        "enable_cache_report": False,
        "stream_response_default_include_usage": False,
        "enable_metrics": True,
        "enable_pd_role_switch": config.role_switch,
        "incremental_streaming_output": incremental,
        "stream_interval": 1,
        "disaggregation_mode": MODES[engine.role],
        "disaggregation_bootstrap_port": config.bootstrap_port,
        "disaggregation_transfer_backend": "mooncake",
        "disaggregation_decode_allocation_policy": "early",
        "max_total_num_tokens": engine.machine.kv.capacity,
        "max_req_input_len": config.max_request_tokens - 1,
        "kv_events": None,
        "internal_states": [
            {
                "effective_max_running_requests_per_dp": config.max_running,
                "disaggregation_mode": MODES[engine.role],
                "last_gen_throughput": 0.0,
            }
        ],
        "version": VERSION,
    }


def models(engine: Engine) -> dict[str, Any]:
    card = {
        "id": engine.config.model,
        "object": "model",
        "created": 0,
        "owned_by": "sglang",
        "root": engine.config.model,
        "parent": None,
        "max_model_len": engine.config.context_tokens,
    }
    return {"object": "list", "data": [card]}


def loads(engine: Engine, include: list[str], dp_rank: int | None) -> dict[str, Any]:
    """Unknown sections are a ValueError."""
    for name in include:
        if name not in INCLUDES:
            raise ValueError(f"Invalid include {name!r}, expected some of {list(INCLUDES)}")
    now = datetime.now(UTC)
    entry = {"timestamp": now.timestamp(), **engine.loads()}
    if include and "all" not in include:
        for name, key in SECTIONS.items():
            if name not in include:
                entry.pop(key, None)
    return {
        "timestamp": now.isoformat(),
        "version": VERSION,
        "accelerator": None,
        "num_accelerators": 1,
        "loads": [entry] if dp_rank in {None, 0} else [],
    }


def loads_as_text(engine: Engine) -> str:
    entry = engine.loads()
    flat = {f"sglang_{key}": value for key, value in entry.items()}
    flat |= {f"sglang_disagg_{key}": value for key, value in entry["disaggregation"].items()}
    return "".join(
        f'{name}{{dp_rank="0"}} {value}\n'
        for name, value in flat.items()
        if isinstance(value, int | float)
    )


def metrics(engine: Engine) -> str:
    """The names that gateways read, in Prometheus text."""
    load, counters = engine.loads(), engine.machine.counters
    queues, pair = load["queues"], load["disaggregation"]
    used, kv = load["num_used_tokens"], engine.machine.kv
    values: dict[str, tuple[str, float]] = {
        "num_running_reqs": ("gauge", load["num_running_reqs"]),
        "num_queue_reqs": ("gauge", queues["waiting"]),
        "num_retracted_reqs": ("gauge", queues["retracted"]),
        "num_grammar_queue_reqs": ("gauge", 0),
        "num_paused_reqs": ("gauge", 0),
        "num_prefill_bootstrap_queue_reqs": ("gauge", pair["prefill_bootstrap_queue_reqs"]),
        "num_prefill_inflight_queue_reqs": ("gauge", pair["prefill_inflight_queue_reqs"]),
        "num_decode_prealloc_queue_reqs": ("gauge", pair["decode_prealloc_queue_reqs"]),
        "num_decode_transfer_queue_reqs": ("gauge", pair["decode_transfer_queue_reqs"]),
        "token_usage": ("gauge", load["token_usage"]),
        "num_used_tokens": ("gauge", used),
        "kv_used_tokens": ("gauge", used),
        "kv_available_tokens": ("gauge", kv.capacity - used),
        "kv_evictable_tokens": ("gauge", kv.cache.evictable),
        "max_total_num_tokens": ("gauge", kv.capacity),
        "page_size": ("gauge", kv.page),
        "context_len": ("gauge", engine.config.context_tokens),
        "gen_throughput": ("gauge", load["gen_throughput"]),
        "cache_hit_rate": ("gauge", load["cache_hit_rate"]),
        "num_requests_total": ("counter", counters.requests),
        "num_aborted_requests_total": ("counter", counters.aborts),
        "num_retracted_requests_total": ("counter", counters.retractions),
        "prompt_tokens_total": ("counter", counters.prompt_tokens),
        "generation_tokens_total": ("counter", counters.generated_tokens),
        "cached_tokens_total": ("counter", counters.prefill_cached_tokens),
        "num_bootstrap_failed_reqs_total": ("counter", counters.bootstrap_failures),
        "num_transfer_failed_reqs_total": ("counter", counters.transfer_failures),
    }
    kind = {"null": "unified"}.get(pair["mode"], pair["mode"])
    labels = f'model_name="{engine.config.model}",engine_type="{kind}",tp_rank="0",pp_rank="0"'
    plain = "".join(
        f"# TYPE sglang:{name} {what}\nsglang:{name}{{{labels}}} {value}\n"
        for name, (what, value) in values.items()
    )
    histograms = {
        "time_to_first_token_seconds": counters.ttft,
        "inter_token_latency_seconds": counters.itl,
        "e2e_request_latency_seconds": counters.e2e,
    }
    if engine.role == Role.PREFILL:
        return plain
    return plain + "".join(_histogram(name, it, labels) for name, it in histograms.items())


def _histogram(name: str, histogram: Histogram, labels: str) -> str:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    counts = list(accumulate(histogram.counts))
    buckets = "".join(
        f'sglang:{name}_bucket{{{labels},le="{bound}"}} {count}\n'
        for bound, count in zip(bounds, counts, strict=True)
    )
    ends = f"sglang:{name}_sum{{{labels}}} {histogram.total}\n"
    ends += f"sglang:{name}_count{{{labels}}} {counts[-1]}\n"
    return f"# TYPE sglang:{name} histogram\n{buckets}{ends}"
