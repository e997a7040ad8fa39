"""What the plug-in touches of SGLang's objects: SGLang itself is not needed to read or test it."""

from __future__ import annotations

from typing import Any, Protocol

Tensor = Any
"""A torch tensor; this package imports no torch, it asks the engine's own tensors for new ones."""


class Request(Protocol):
    """sglang.srt.managers.schedule_batch.Req"""

    rid: str
    sampling_params: Any
    output_ids: Any
    to_finish: object | None
    pending_bootstrap: bool

    @property
    def seqlen(self) -> int: ...


class Mode(Protocol):
    """sglang.srt.model_executor.forward_batch_info.ForwardMode"""

    def is_decode(self) -> bool: ...
    def is_extend(self) -> bool: ...


class Batch(Protocol):
    """sglang.srt.managers.schedule_batch.ScheduleBatch"""

    reqs: list[Any]
    seq_lens: Tensor
    seq_lens_cpu: Tensor
    orig_seq_lens: Tensor
    seq_lens_sum: Any
    out_cache_loc: Tensor
    input_ids: Tensor
    input_embeds: Tensor
    replace_embeds: Tensor
    replace_positions: Tensor
    sampling_info: Any
    forward_mode: Any
    enable_overlap: bool
    extend_num_tokens: int | None
    after_idle_gap: bool
    launch_ts: float | None
    device: Any

    def filter_batch(
        self, reqs_to_exclude: Any = None, keep_indices: list[int] | None = None
    ) -> None: ...


class Plan(Protocol):
    """sglang.srt.managers.schedule_batch.NextBatchPlan"""

    batch_to_run: Any
    running_batch: Any


class Scheduler(Protocol):
    """sglang.srt.managers.scheduler.Scheduler"""

    running_batch: Any
    waiting_queue: list[Any]
    chunked_req: Any
    disaggregation_mode: Any
    enable_overlap: bool
    tp_worker: Any
    _pending_chunked_abort_req: Any

    def process_pending_chunked_abort(self) -> None: ...
