"""An engine's batch and requests as far as the plug-in touches them, without torch."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class Row:
    """A tensor of one dimension."""

    def __init__(self, values: Iterable[int]) -> None:
        self.values = list(values)
        self.dtype, self.ndim = "int64", 1

    @property
    def device(self) -> Any:
        return type("Device", (), {"type": "cpu"})()

    @property
    def shape(self) -> tuple[int]:
        return (len(self.values),)

    def new_tensor(self, values: Iterable[int]) -> Row:
        return Row(values)

    def to(self, *_where: object, **_how: object) -> Row:
        return self

    def __add__(self, other: Row | int) -> Row:
        add = [other] * len(self.values) if isinstance(other, int) else other.values
        return Row(a + b for a, b in zip(self.values, add, strict=True))

    def picked(self, keep: Iterable[int]) -> Row:
        return Row(self.values[i] for i in keep)


@dataclass(eq=False)
class Params:
    custom_params: object = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0


class Kv:
    holds_mamba = False


@dataclass(eq=False)
class FakeRequest:
    rid: str
    prompt_tokens: int = 100
    sampling_params: Params = field(default_factory=Params)
    output_ids: list[int] = field(default_factory=lambda: [1])
    to_finish: object | None = None
    pending_bootstrap: bool = False
    beam_group: object = None
    kv: Kv = field(default_factory=Kv)

    @property
    def seqlen(self) -> int:
        return self.prompt_tokens + len(self.output_ids)


def request(rid: str, **more: Any) -> FakeRequest:
    """`told` is its custom_params."""
    params = Params(more.pop("told", None), **more.pop("params", {}))
    return FakeRequest(rid, sampling_params=params, **more)


class Algorithm:
    def is_none(self) -> bool:
        return True


@dataclass(eq=False)
class Sampling:
    penalizer_orchestrator: Any = None
    has_custom_logit_processor: bool = False
    return_sampling_masks: list[bool] | None = None
    has_watermark_candidates: bool = False


class ModelConfig:
    is_encoder_decoder = False


class DecodeMode:
    def is_decode(self) -> bool:
        return True

    def is_extend(self) -> bool:
        return False


class FakeBatch:
    """A running batch; `steps` counts how often each of its rows was prepared."""

    def __init__(self, reqs: list[FakeRequest]) -> None:
        self.reqs = reqs
        self.seq_lens = Row(it.seqlen for it in reqs)
        self.seq_lens_cpu = Row(it.seqlen for it in reqs)
        self.orig_seq_lens = Row(it.seqlen for it in reqs)
        self.seq_lens_sum = self.out_cache_loc = self.input_ids = None
        self.input_embeds = self.replace_embeds = self.replace_positions = None
        self.sampling_info = Sampling()
        self.forward_mode: Any = None
        self.enable_overlap = False
        self.extend_num_tokens: int | None = None
        self.after_idle_gap = False
        self.launch_ts: float | None = 0.0
        self.device = "cpu"
        self.spec_algorithm = Algorithm()
        self.beam_tail = self.dllm_config = self.hisparse_coordinator = None
        self.model_config = ModelConfig()

    def filter_batch(
        self, reqs_to_exclude: Any = None, keep_indices: list[int] | None = None
    ) -> None:
        keep = keep_indices
        if keep is None:
            keep = [i for i, it in enumerate(self.reqs) if it not in (reqs_to_exclude or ())]
        self.reqs = [self.reqs[i] for i in keep]
        for name in ("seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            setattr(self, name, getattr(self, name).picked(keep))

    def merge(self, other: FakeRequest) -> None:
        self.reqs = [*self.reqs, other]
        for name in ("seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            setattr(self, name, Row([*getattr(self, name).values, other.seqlen]))

    def copy(self) -> FakeBatch:
        return copy.copy(self)


def prepare(batch: FakeBatch) -> None:
    """SGLang's preparation of a step: every row gets a place for one more token."""
    batch.forward_mode = DecodeMode()
    for name in ("seq_lens", "seq_lens_cpu", "orig_seq_lens"):
        setattr(batch, name, getattr(batch, name) + 1)


class Clock:
    def __init__(self) -> None:
        self.us = 1e6

    def __call__(self) -> float:
        return self.us
