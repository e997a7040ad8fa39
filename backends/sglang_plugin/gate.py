"""Who takes each decode step of this engine: the packing's choice, kept while it is good."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from backends.sglang_plugin.belief import Belief
from backends.sglang_plugin.contract import Batch, Request
from backends.sglang_plugin.control import STEPS_ALL, Control
from backends.sglang_plugin.faults import Faults
from backends.sglang_plugin.riders import CLASS, TPOT, Rider, rider_of
from backends.sglang_plugin.view import View, settle
from policies.packing import Packing, Running, StepUs
from policies.stepping import STEPPING, elected, holding


@dataclass(frozen=True, slots=True)
class Drill:
    """Any subset is to be right: the equality suite draws them at random."""

    rng: random.Random
    share: float
    by_longest: bool = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        return [i for i in range(len(running)) if self.rng.random() < self.share]


@dataclass(frozen=True, slots=True)
class Faulty:
    """Selection that fails, for the valve that shuts it off."""

    by_longest: bool = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        raise RuntimeError("a drill: this selection fails")


class Choice(NamedTuple):
    """Who steps, and when the first of the others has waited long enough."""

    keep: list[int]
    until_us: float


SEED: Final = 1
NONSENSE: Final = f"a request's {CLASS} or {TPOT} makes no sense, and counts as untold"


class Gate:
    """Between SGLang's choice of a running batch and its preparation for a step."""

    def __init__(
        self,
        faults: Faults,
        now_us: Callable[[], float],
        learn: Callable[[], None] = lambda: None,
    ) -> None:
        self.control = Control()
        self.rests = True
        """Everyone steps, and nothing is left to be put right."""
        self.parked = 0
        self.belief = Belief()
        self.sizes: tuple[int, ...] = ()
        """Batch sizes that CUDA graphs were captured for."""
        self.faults = faults
        self.views = self.view_steps = 0
        """Choices of fewer than all, and the steps that ran over them."""
        self.steps, self.spent_us = 0, 0.0
        """Steps that a choice was due for, and what all the choosing took."""
        self._now_us = now_us
        self._learn = learn
        """Before a choice: of the steps since the last one."""
        self._rng = random.Random(SEED)
        self._packing: Packing = STEPPING[STEPS_ALL]
        self._view: View | None = None
        self._members: list[Any] | None = None
        self._riders: list[Rider] = []
        """Of those members."""
        self._everyone: list[Any] | None = None
        self._everyone_left = 0
        self._due: Batch | None = None
        self._stepping: View | None = None

    # What the hooks call.

    def begins(self, batch: Batch) -> None:
        """The next preparation of this batch is that of a step."""
        self._due, self._stepping = batch, None

    def ends(self, batch: Batch | None) -> Batch | None:
        """What runs: the view of the batch where one was prepared."""
        self._due, view = None, self._stepping
        self._stepping = None
        return batch if view is None or batch is not view.whole else view.batch

    def prepare(self, original: Callable[[Batch], None], batch: Batch) -> None:
        due, self._due = self._due, None
        if batch is not due:
            self._catch_up(batch)  # a mixed step, of everyone
            original(batch)
            return
        began_us = self._now_us()
        view = self._view_of(batch, began_us)
        self.spent_us += self._now_us() - began_us
        self.steps += 1
        if view is None:
            original(batch)
            return
        original(view.batch)
        view.stepped()
        self.view_steps += 1
        self._stepping = view

    def whole_of(self, batch: Batch) -> Batch | None:
        """The batch that this one is a view of."""
        view = self._view
        return view.whole if view is not None and view.batch is batch else None

    def adopt(self, control: Control) -> None:
        self.control = control
        self.belief.adopt(control.line)
        self._packing = self._packing_of(control)
        self._everyone = None
        if self._view is not None:
            self._view.until_us = 0.0  # a new choice, by the new rule
        self._go_on(self._view)

    # How.

    def _view_of(self, batch: Batch, now_us: float) -> View | None:
        """None: all step; then the batch has caught up."""
        view = self._view
        if now_us > self.control.until_us:
            self.faults.say("the lease of what a gateway had set is over: everyone steps")
            self.adopt(Control())
        if view is not None and self._is_good(view, batch, now_us):
            return view
        self._note_skipped()
        try:
            self._go_on(self._next(batch, now_us))
        except Exception as error:  # noqa: BLE001  # the engine goes on without: everyone steps
            self.faults.count(error)
            self._catch_up(batch)
        return self._view

    def _is_good(self, view: View, batch: Batch, now_us: float) -> bool:
        return (
            view.fits(batch)
            and view.steps - view.chosen_at < self.control.valves.hold_steps
            and now_us < view.until_us
            and not self.faults.over
            and not view.someone_ends()
        )

    def _next(self, batch: Batch, now_us: float) -> View | None:
        """The same choice again goes on with the view that there is."""
        chosen = self._chosen(batch, now_us) if self._is_to_choose(batch) else None
        view = self._view
        if view is not None and chosen is not None and view.is_still(batch, chosen.keep):
            view.chosen_at, view.until_us = view.steps, chosen.until_us
            return view
        self._catch_up(batch)
        if chosen is None:
            return None
        self.views += 1
        return View(batch, chosen.keep, chosen.until_us)

    def _is_to_choose(self, batch: Batch) -> bool:
        if self.control.mode == STEPS_ALL or self.faults.over or len(batch.reqs) < 2:
            return False
        if self._everyone is not batch.reqs or self._everyone_left <= 0:
            return True
        self._everyone_left -= 1
        return False

    def _note_skipped(self) -> None:
        view = self._view
        if view is not None and view.steps > view.chosen_at:
            for request in view.parked:
                rider_of(request, 0.0).skipped += view.steps - view.chosen_at
            view.chosen_at = view.steps

    def _catch_up(self, batch: Batch) -> None:
        view = self._view
        if view is None:
            return
        if view.whole is batch:
            self._note_skipped()
            settle(view)
        self._go_on(None)

    def _go_on(self, view: View | None) -> None:
        self._view = view
        self.parked = 0 if view is None else len(view.parked)
        self.rests = view is None and self.control.mode == STEPS_ALL

    def _chosen(self, batch: Batch, now_us: float) -> Choice | None:
        """None: everyone."""
        if why := why_everyone(batch):
            self.faults.say(f"everyone steps in batches with {why}")
            return None
        control = self.control
        packing = self._packing
        if not isinstance(packing, Drill | Faulty):
            self._learn()
            if not self.belief.is_ready():
                return None
        riders = self._riders_of(batch.reqs, now_us)
        running = self._rows(batch.reqs, riders, now_us)
        keep = elected(packing, running, self.belief.step_us, self.sizes)
        if len(keep) == len(running):
            for rider in riders:
                rider.ride()
            self._everyone, self._everyone_left = batch.reqs, control.valves.hold_steps - 1
            return None
        self._everyone = None
        until_us = _note_parked(riders, keep, now_us, control.valves.most_parked_us)
        return Choice(keep, until_us)

    def _packing_of(self, control: Control) -> Packing:
        if control.mode == "random":
            return Drill(self._rng, control.share)
        if control.mode == "faulty":
            return Faulty()
        return holding(STEPPING[control.mode], control.valves.hold_steps)

    def _riders_of(self, members: list[Any], now_us: float) -> list[Rider]:
        if members is not self._members:
            self._members = members
            self._riders = [rider_of(request, now_us) for request in members]
            if any(rider.is_nonsense for rider in self._riders):
                self.faults.say(NONSENSE)
        return self._riders

    def _rows(
        self, members: Sequence[Request], riders: Sequence[Rider], now_us: float
    ) -> list[Running]:
        online_us, most_us = self.control.tpot_us, self.control.valves.most_parked_us
        return [
            Running(
                request.seqlen,
                max(0, len(request.output_ids) - rider.base),
                now_us - rider.first_us,
                rider.tpot_us or (online_us if rider.is_online else 0.0),
                rider.skipped,
                rider.is_online,
                rider.always
                or request.to_finish is not None
                or (rider.parked_us > 0 and now_us - rider.parked_us >= most_us),
            )
            for request, rider in zip(members, riders, strict=True)
        ]


def _note_parked(
    riders: Sequence[Rider], keep: Sequence[int], now_us: float, most_us: float
) -> float:
    """When the first of those that wait has waited long enough."""
    kept = set(keep)
    until_us = now_us + most_us
    for index, rider in enumerate(riders):
        if index in kept:
            rider.ride()
        else:
            rider.park(now_us)
            until_us = min(until_us, rider.parked_us + most_us)
    return until_us


def why_everyone(batch: Any) -> str:
    """What makes a step over some of its requests one that was not tested; empty: nothing."""
    found = _why_all(batch)
    for request in batch.reqs if not found else ():
        if request.beam_group is not None:
            return "beam search"
        if request.kv.holds_mamba:
            return "Mamba states"
    return found


def _why_all(batch: Any) -> str:
    sampling = batch.sampling_info
    reasons = (
        ("speculative decoding", not batch.spec_algorithm.is_none()),
        ("beam search", batch.beam_tail is not None),
        ("diffusion decoding", batch.dllm_config is not None),
        ("HiSparse", batch.hisparse_coordinator is not None),
        ("an encoder", batch.model_config.is_encoder_decoder),
        ("its own input", batch.input_ids is not None),
        ("lengths that the host does not know", batch.seq_lens_cpu is None),
        ("a custom logit processor", sampling.has_custom_logit_processor),
        ("sampling masks", sampling.return_sampling_masks and any(sampling.return_sampling_masks)),
        ("a watermark", sampling.has_watermark_candidates),
    )
    return next((name for name, holds in reasons if holds), "")
