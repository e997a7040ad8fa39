"""The hooks of one engine process: thin, in SGLang's own signatures, harmless when they fail."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final

from backends.sglang_plugin.clock import pause_us
from backends.sglang_plugin.contract import Batch, Plan, Scheduler
from backends.sglang_plugin.control import Control, Refused, adjusted, is_ours, setting_of
from backends.sglang_plugin.displace import Displacement
from backends.sglang_plugin.faults import Faults
from backends.sglang_plugin.gate import Gate
from backends.sglang_plugin.hold import Hold
from backends.sglang_plugin.reports import Reporter, Socket, Step
from backends.sglang_plugin.targets import Feature, unfit
from policies.step_line import SeenStep

log = logging.getLogger("sglang.slackwater")

STATE: Final = "slackwater"
"""Under this name the state stands in /server_info, in each of its internal states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the environment asked for."""

    features: frozenset[Feature] = frozenset(Feature)
    unknown: tuple[str, ...] = ()
    """Names that were given as features and are none."""
    untested: bool = False
    drill: bool = False
    """Modes for tests, and a line of steps that is taken as it was told."""
    reports: str = ""
    """Where to publish; empty: a free port at the server's own address."""


class Plugin:
    """Of one scheduler, which it meets at its first hook."""

    def __init__(
        self, options: Options, refused: Mapping[Feature, str], now_us: Callable[[], float]
    ) -> None:
        self._options = options
        self._now_us = now_us
        self.faults = {feature: Faults(feature.value) for feature in Feature}
        for feature, why in refused.items():
            self.faults[feature].turn_off(why)
        self.control = Control()
        self.gate = Gate(self.faults[Feature.DECODE], now_us, lambda: self.reporter.catch_up())
        self.displacement = Displacement(self.faults[Feature.PREFILL], now_us)
        self.reporter = Reporter(
            self.faults[Feature.REPORTS],
            now_us,
            self._saw,
            lambda: not self.gate.rests,
            lambda: self.gate.parked,
            self._open_socket,
        )
        self.hold = Hold(now_us, pause_us)
        self._met: Scheduler | None = None
        self._settings: Mapping[str, Any] = {}

    # Meeting the scheduler.

    def meet(self, engine: Scheduler) -> None:
        """Once: what its settings forbid is off from here on."""
        self._met = engine
        try:
            context: Any = importlib.import_module("sglang.srt.runtime_context")
            self._settings = context.get_context().resolved_server_args_dict()
            self.gate.sizes = tuple(sorted(engine.tp_worker.get_decode_cuda_graph_bs()))
            rank = context.get_parallel().attn_tp_rank
        except Exception as error:  # noqa: BLE001  # another SGLang: nothing is guessed
            rank, self._settings = 1, {}
            log.error("slackwater: this server tells too little of itself: %s", error)
        for feature in self._options.features:
            why = unfit(feature, self._settings)
            if why and not self.faults[feature].over:
                self.faults[feature].turn_off(why)
        reports = self.faults[Feature.REPORTS]
        if rank != 0 and not reports.over:
            reports.turn_off("the first rank tells")
        if not reports.over:
            self.reporter.open()

    def _open_socket(self) -> Socket:
        host = str(self._settings.get("host") or "127.0.0.1")
        host = f"[{host}]" if ":" in host else host
        return Socket(self._options.reports or f"tcp://{host}:*")

    def _saw(self, steps: Sequence[Step]) -> None:
        decodes = [SeenStep(step[1], step[2], float(step[5])) for step in steps if step[0]]
        as_told = self._options.drill and self.control.line is not None
        corrects = not self.gate.rests and not as_told
        self.gate.belief.saw(decodes, corrects=corrects)

    # Decode selection.

    def update_running_batch(
        self, original: Callable[..., Batch | None], engine: Scheduler, batch: Batch
    ) -> Batch | None:
        gate = self.gate
        if gate.rests or self._met is None:
            return original(engine, batch)
        gate.begins(batch)
        out: Batch | None = None
        try:
            out = original(engine, batch)
        finally:
            out = gate.ends(out)
        return out

    def prepare_for_decode(self, original: Callable[[Batch], None], batch: Batch) -> None:
        if self.gate.rests:
            original(batch)
        else:
            self.gate.prepare(original, batch)

    def get_next_disagg_decode_batch_to_run(
        self, original: Callable[..., Plan], engine: Scheduler, running_batch: Batch
    ) -> Plan:
        """SGLang takes what steps for what runs: it gets the whole back."""
        if self.gate.rests:
            return original(engine, running_batch)
        plan = original(engine, running_batch)
        whole = self.gate.whole_of(plan.running_batch)
        if whole is not None:
            plan.running_batch = whole
        return plan

    # Drill.

    def run_batch(
        self, original: Callable[..., Any], engine: Scheduler, batch: Batch, *given: Any
    ) -> Any:
        return self.hold.run(original, engine, batch, given)

    # Prefill displacement.

    def get_new_batch_prefill(
        self, original: Callable[..., Plan], engine: Scheduler, running_batch: Batch
    ) -> Plan:
        if engine.chunked_req is None and self.displacement.aside is None:
            return original(engine, running_batch)
        return self.displacement.plan(original, engine, running_batch)

    def abort_request(
        self, original: Callable[..., None], engine: Scheduler, recv_req: Any
    ) -> None:
        self.displacement.abort(engine, recv_req)
        original(engine, recv_req)

    def pause_generation(
        self, original: Callable[..., Any], engine: Scheduler, recv_req: Any
    ) -> Any:
        self.displacement.pause(engine, recv_req)
        return original(engine, recv_req)

    def is_fully_idle(
        self, original: Callable[..., bool], engine: Scheduler, *given: Any, **named: Any
    ) -> bool:
        return self.displacement.aside is None and original(engine, *given, **named)

    # Reports.

    def process_batch_result(
        self, original: Callable[..., Any], engine: Scheduler, batch: Batch, result: Any
    ) -> Any:
        out = original(engine, batch, result)
        reporter = self.reporter
        if self._met is None:
            self.meet(engine)
        if not reporter.faults.why_off:
            try:
                reporter.ended(batch)
            except Exception as error:  # noqa: BLE001  # nobody waits for a report
                reporter.faults.count(error)
        return out

    # Control.

    def get_internal_state(
        self, original: Callable[..., Any], engine: Scheduler, recv_req: Any
    ) -> Any:
        if self._met is None:
            self.meet(engine)
        self._lapse()
        answer = original(engine, recv_req)
        answer.internal_state[STATE] = self.state()
        return answer

    def set_internal_state(
        self, original: Callable[..., Any], engine: Scheduler, recv_req: Any
    ) -> Any:
        ours = {key: value for key, value in recv_req.server_args.items() if is_ours(key)}
        if not ours:
            return original(engine, recv_req)
        if self._met is None:
            self.meet(engine)
        rest = {key: value for key, value in recv_req.server_args.items() if key not in ours}
        try:
            setting = setting_of(ours, drill=self._options.drill)
        except Refused as refused:
            log.warning("slackwater: refused: %s", refused)
            return self._answer(updated=False)
        if rest:
            recv_req.server_args = rest
            answer = original(engine, recv_req)
            if not answer.updated:
                return answer
        self._lapse()  # what is set now is set over nothing that is gone
        if setting.reset:
            for faults in self.faults.values():
                faults.turn_on()
        self._adopt(adjusted(self.control, setting, self._now_us()))
        return self._answer(updated=True)

    def _lapse(self) -> None:
        """An engine that rests does not look at its lease."""
        if self._now_us() > self.control.until_us:
            self._adopt(Control())

    def _adopt(self, control: Control) -> None:
        self.control = control
        self.gate.adopt(control)
        self.hold.line = control.held
        self.reporter.look()
        self.displacement.until_us = control.until_us if control.displace else -inf

    def _answer(self, *, updated: bool) -> Any:
        messages: Any = importlib.import_module("sglang.srt.managers.io_struct")
        return messages.SetInternalStateReqOutput(updated=updated)

    def state(self) -> dict[str, Any]:
        """What /server_info tells; plain values."""
        gate, line = self.gate, self.gate.belief.line
        reporter, socket = self.reporter, self.reporter.socket
        return {
            "features": {
                feature.value: {
                    "on": not faults.over,
                    "why_off": faults.why_off,
                    "faults": faults.number,
                }
                for feature, faults in self.faults.items()
            },
            "unknown": list(self._options.unknown),
            "mode": gate.control.mode,
            "tpot_us": gate.control.tpot_us,
            "hold_steps": gate.control.valves.hold_steps,
            "most_parked_us": gate.control.valves.most_parked_us,
            "views": gate.views,
            "view_steps": gate.view_steps,
            "parked": gate.parked,
            "graph_sizes": len(gate.sizes),
            "line": None if line is None else list(line),
            "line_from": gate.belief.line_from,
            "displace": self.displacement.allowed,
            "displaced": self.displacement.displaced,
            "resumed": self.displacement.resumed,
            "aside": int(self.displacement.aside is not None),
            "chosen_steps": gate.steps,
            "choosing_us": round(gate.spent_us),
            "held": self.hold.steps,
            "held_late": self.hold.late,
            "steps": reporter.steps,
            "reporting_us": round(reporter.spent_us),
            "reporting_cpu_us": round(reporter.computed_us),
            "reports": "" if socket is None or reporter.faults.over else socket.endpoint,
        }
