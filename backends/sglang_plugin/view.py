"""How a step runs over some of the running requests while the running batch stays whole.

A view is a shallow copy of the batch, filtered to the chosen rows, with sampling state of its own.
It may run for several steps; the whole batch then lags behind for the chosen rows, and catches up
before anybody reads its lengths. New tensors throughout: an earlier forward may still read the old.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Final

from backends.sglang_plugin.contract import Batch, Tensor

MOST_LAG: Final = 64
"""A view that is chosen again and again lasts for no more steps: then the whole catches up."""


class View:
    """The chosen rows of `whole`, and who waits."""

    __slots__ = (
        *("batch", "chosen_at", "keep", "members", "parked"),
        *("stepping", "steps", "until_us", "whole"),
    )

    def __init__(self, whole: Batch, keep: Sequence[int], until_us: float) -> None:
        kept = set(keep)
        self.whole, self.keep = whole, keep
        self.members = whole.reqs
        self.stepping = [whole.reqs[i] for i in keep]
        self.parked = [req for i, req in enumerate(whole.reqs) if i not in kept]
        self.batch = _cut(whole, list(keep))
        self.steps = self.chosen_at = 0
        """Taken so far, and when it was last chosen."""
        self.until_us = until_us
        """When the first of the parked has waited long enough."""

    def fits(self, batch: Batch) -> bool:
        """SGLang makes a new list of requests whenever one comes or goes."""
        return self.whole is batch and self.members is batch.reqs

    def is_still(self, batch: Batch, keep: Sequence[int]) -> bool:
        """Whether a new choice is the old one, and the whole may lag on."""
        return self.steps < MOST_LAG and self.keep == keep and self.fits(batch)

    def someone_ends(self) -> bool:
        return any(req.to_finish is not None for req in self.parked)

    def stepped(self) -> None:
        """After the first step the whole is a decoding batch too, as if it had been prepared."""
        self.steps += 1
        if self.steps == 1:
            whole = self.whole
            whole.forward_mode = self.batch.forward_mode
            whole.input_embeds = whole.replace_embeds = whole.replace_positions = None
            whole.out_cache_loc = whole.seq_lens_sum = None


def settle(view: View) -> None:
    """The whole catches up by the steps of those that took them; all is made, then all is set."""
    whole, steps = view.whole, view.steps
    if not steps or not whole.reqs:
        return
    stepped = {id(req) for req in view.stepping}
    lag = [steps if id(req) in stepped else 0 for req in whole.reqs]
    on_host = whole.seq_lens_cpu.new_tensor(lag)
    on_device = _sent(on_host, whole.seq_lens)
    seq_lens = whole.seq_lens + on_device
    seq_lens_cpu = whole.seq_lens_cpu + on_host
    orig_seq_lens = whole.orig_seq_lens + on_device.to(whole.orig_seq_lens.dtype)
    counted = _counted(view)
    whole.seq_lens, whole.seq_lens_cpu, whole.orig_seq_lens = seq_lens, seq_lens_cpu, orig_seq_lens
    whole.seq_lens_sum = whole.out_cache_loc = None
    for penalizer, name, value in counted:
        setattr(penalizer, name, value)
    view.steps = view.chosen_at = 0


def _sent(on_host: Tensor, like: Tensor) -> Tensor:
    if like.device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(like.device, non_blocking=True)


def _cut(whole: Batch, keep: list[int]) -> Batch:
    batch: Batch = _copied(whole)
    sampling = batch.sampling_info = _copied(whole.sampling_info)
    orchestrator = sampling.penalizer_orchestrator
    if orchestrator is not None and orchestrator.is_required:
        sampling.penalizer_orchestrator = _own_penalties(orchestrator)
        sampling.penalizer_orchestrator.batch = batch
    batch.filter_batch(keep_indices=keep)
    return batch


def _copied(thing: Any) -> Any:
    """As copy.copy does it, without asking how."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


def _own_penalties(orchestrator: Any) -> Any:
    """Filtering then makes new tensors for the copies; those of the whole stay as they are."""
    own = copy.copy(orchestrator)
    own.penalizers = {}
    for kind, penalizer in orchestrator.penalizers.items():
        twin = copy.copy(penalizer)
        twin._orchestrator_ref = weakref.ref(own)
        own.penalizers[kind] = twin
    return own


def _counted(view: View) -> list[tuple[Any, str, Tensor]]:
    """What the penalties of those that stepped have come to, for the whole's rows."""
    whole = view.whole
    theirs = whole.sampling_info.penalizer_orchestrator
    ours = view.batch.sampling_info.penalizer_orchestrator
    if theirs is None or ours is theirs or not theirs.is_required:
        return []
    row_of = {id(req): row for row, req in enumerate(view.stepping)}
    pairs = [(i, row_of[id(req)]) for i, req in enumerate(whole.reqs) if id(req) in row_of]
    if not pairs:
        return []
    to_rows = whole.seq_lens_cpu.new_tensor([i for i, _ in pairs])
    from_rows = whole.seq_lens_cpu.new_tensor([row for _, row in pairs])
    to_rows, from_rows = _sent(to_rows, whole.seq_lens), _sent(from_rows, whole.seq_lens)
    found: list[tuple[Any, str, Tensor]] = []
    for kind, penalizer in theirs.penalizers.items():
        twin = ours.penalizers.get(kind)
        if twin is None or not penalizer._is_prepared or not twin._is_prepared:
            continue
        for name, value in vars(penalizer).items():
            if getattr(value, "ndim", 0) and value.shape[0] == len(whole.reqs):
                news = getattr(twin, name).index_select(0, from_rows)
                found.append((penalizer, name, value.index_copy(0, to_rows, news)))
    return found
