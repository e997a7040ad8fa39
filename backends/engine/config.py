"""What one server is: its role, its memory, its limits and its timeouts."""

from __future__ import annotations

from dataclasses import dataclass

from policies.types import Role

CLIP_NEW_TOKENS = 4096
"""Admission counts no more than this of a long answer, as SGLang does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Defaults resemble Llama-3.1-8B in bf16 on an 80 GB GPU, and SGLang's own."""

    name: str = "server"
    role: Role = Role.UNIFIED
    model: str = "emulated"
    host: str = ""
    """Servers that name the same host share one GPU."""
    bootstrap_host: str = "127.0.0.1"
    bootstrap_port: int = 8998
    kv_tokens: int = 400_000
    max_running: int = 256
    chunk_tokens: int = 8192
    page_tokens: int = 1
    context_tokens: int = 131_072
    max_queued: int | None = None
    """Requests that may wait on a unified server; the PD roles take any number."""
    priority: bool = False
    """Whether larger `priority` goes first; without it, the field is ignored."""
    preemption_threshold: int = 10
    """On a unified server, one that is more urgent by more than this displaces running ones."""
    reserved_decode_tokens: int = 512
    extra_slots: int | None = None
    """Requests a decode server takes in beyond those it runs; None: SGLang's own rule."""
    retraction_backup: bool = True
    bootstrap_timeout_s: float = 300.0
    waiting_timeout_s: float = 300.0
    heartbeat_s: float = 10.0
    """From a prefill server's death until decode servers notice."""
    handshake_s: float = 14.0
    handshake_retry_s: float = 1.0
    kv_bytes_per_token: int = 131_072
    link_bytes_per_s: float = 25e9
    link_latency_s: float = 0.002
    ingest_s: float = 0.0
    """From registration at the front until the scheduler knows of the request."""
    role_switch: bool = True
    role_switch_s: float = 0.4
    schedule_policy: str = "fcfs"
    """In which order the waiting queue is taken in: SGLang's setting of that name."""
    straggler: bool = False
    """A decode step takes as long as if only the longest context were attended to."""
    packing: str = "all"
    """This and the next two: for engines that can do more than SGLang."""
    hold_steps: int = 1
    """A choice of who steps is good for so many steps while nobody comes or goes."""
    prefill_order: str = "fcfs"
    interrupt_layers: int = 0
    """An offline prefill stops for an online prompt at the end of a layer; 0: never."""
    eos_every: int = 160
    """An answer ends by itself after so many tokens on average."""

    @property
    def max_request_tokens(self) -> int:
        """Prompt and answer together; a request of this size runs on an empty server."""
        pages = self.kv_tokens // self.page_tokens - 1
        return min(self.context_tokens - 1, pages * self.page_tokens)

    @property
    def slots(self) -> int:
        """Requests that may hold KV on a decode server, those still in transfer included."""
        if self.extra_slots is not None:
            return self.max_running + self.extra_slots
        return self.max_running * (3 if self.max_running <= 32 else 1)
