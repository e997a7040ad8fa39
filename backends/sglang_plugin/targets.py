"""What each feature needs of SGLang: which versions it was tested on, what it hooks and touches."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler."
BATCH: Final = "sglang.srt.managers.schedule_batch.ScheduleBatch"
TESTED: Final = ("0.5.23",)


class Feature(StrEnum):
    DECODE = "decode"
    """Some of the running requests take a step."""
    PREFILL = "prefill"
    """An online prompt goes before an offline one in its chunks."""
    REPORTS = "reports"
    """Each step is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Target -> the parameters it must have; class -> the fields its instances must have."""

    parameters: Mapping[str, tuple[str, ...]]
    fields: Mapping[str, frozenset[str]]
    any_version: bool = False
    """It only looks: what fits its targets may be tried."""


CONTROL: Final = Need(
    parameters={
        SCHEDULER + "get_internal_state": ("self", "recv_req"),
        SCHEDULER + "set_internal_state": ("self", "recv_req"),
    },
    fields={},
    any_version=True,
)
HOLD: Final = Need(
    parameters={SCHEDULER + "run_batch": ("self", "batch", "pp_proxy_tensors")},
    fields={},
    any_version=True,
)
"""In a drill alone."""
NEEDS: Final[Mapping[Feature, Need]] = {
    Feature.DECODE: Need(
        parameters={
            SCHEDULER + "update_running_batch": ("self", "batch"),
            SCHEDULER + "get_next_disagg_decode_batch_to_run": ("self", "running_batch"),
            BATCH + ".prepare_for_decode": ("self",),
            BATCH + ".filter_batch": ("self", "reqs_to_exclude", "keep_indices"),
        },
        fields={
            BATCH: frozenset(
                {
                    *("reqs", "seq_lens", "seq_lens_cpu", "orig_seq_lens", "seq_lens_sum"),
                    *("input_ids", "input_embeds", "replace_embeds", "replace_positions"),
                    *("sampling_info", "out_cache_loc", "forward_mode", "spec_algorithm"),
                    *("beam_tail", "dllm_config", "hisparse_coordinator", "model_config"),
                    *("enable_overlap", "device"),
                }
            )
        },
    ),
    Feature.PREFILL: Need(
        parameters={
            SCHEDULER + "get_new_batch_prefill": ("self", "running_batch"),
            SCHEDULER + "abort_request": ("self", "recv_req"),
            SCHEDULER + "pause_generation": ("self", "recv_req"),
            SCHEDULER + "is_fully_idle": ("self", "for_health_check", "ignore_waiting"),
            SCHEDULER + "process_pending_chunked_abort": ("self",),
        },
        fields={},
    ),
    Feature.REPORTS: Need(
        parameters={SCHEDULER + "process_batch_result": ("self", "batch", "result")},
        fields={BATCH: frozenset(("reqs", "forward_mode", "launch_ts", "after_idle_gap"))},
        any_version=True,
    ),
}

Resolve = Callable[[str], Any]


def why_not(need: Need, version: str, *, untested: bool, resolve: Resolve | None = None) -> str:
    """What speaks against it on this SGLang; empty: nothing."""
    resolve = resolve or pkgutil.resolve_name
    if version not in TESTED and not need.any_version and not untested:
        return f"SGLang {version} is not among the tested versions ({', '.join(TESTED)})"
    for target, wanted in need.parameters.items():
        if why := _other_parameters(target, wanted, resolve):
            return why
    for target, names in need.fields.items():
        try:
            known = set(resolve(target).__dataclass_fields__)
        except (ImportError, AttributeError) as error:
            return f"{target} is not what it was: {error}"
        if gone := sorted(names - known):
            return f"{target} has no {', '.join(gone)}"
    return ""


def _other_parameters(target: str, wanted: tuple[str, ...], resolve: Resolve) -> str:
    try:
        found = tuple(inspect.signature(inspect.unwrap(resolve(target))).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return f"{target} is not there: {error}"
    return "" if found == wanted else f"{target} takes {', '.join(found)}"


# What only the running server knows.

ALONE: Final[Mapping[str, str]] = {
    "tp_size": "tensor parallel",
    "pp_size": "pipeline parallel",
    "attn_cp_size": "context parallel",
}
"""Ranks that choose by their own clocks would run different steps and hang."""
UNTESTED: Final[Mapping[str, str]] = {
    "enable_dp_attention": "data-parallel attention",
    "speculative_algorithm": "speculative decoding",
    "enable_pdmux": "PD multiplexing",
    "enable_two_batch_overlap": "two-batch overlap",
    "enable_lora": "LoRA",
    "enable_hisparse": "HiSparse",
    "enable_hierarchical_cache": "HiCache",
    "enable_lmcache": "LMCache",
    "dllm_algorithm": "diffusion decoding",
}
UNTESTED_DECODE: Final = {"disaggregation_decode_enable_radix_cache": "the decode radix cache"}


def unfit(feature: Feature, settings: Mapping[str, Any]) -> str:
    """Why this server's settings forbid the feature; empty: they do not."""
    if feature is Feature.REPORTS:
        return ""
    for key, words in ALONE.items():
        size = settings.get(key)
        if not isinstance(size, int):
            return f"the server does not tell its {key}"
        if size > 1:
            return f"{words} ({key} {size}) is not supported"
    untested = {**UNTESTED, **(UNTESTED_DECODE if feature is Feature.DECODE else {})}
    for key, words in untested.items():
        if key not in settings:
            return f"the server does not tell its {key}"
        if settings[key] not in (None, False, ""):
            return f"{words} was not tested"
    overlaps = not settings.get("disable_overlap_schedule", False)
    if feature is Feature.PREFILL and settings.get("disaggregation_mode") == "prefill" and overlaps:
        return "a prefill server with overlap scheduling was not tested"
    return ""
