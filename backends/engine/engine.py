"""One SGLang server in steps: its front registers requests, its scheduler turns once per pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from backends.engine.batch import DecodeBatch
from backends.engine.config import EngineConfig
from backends.engine.decoding import Decoding
from backends.engine.fabric import Fabric
from backends.engine.leap import MOST_STEPS, Leap
from backends.engine.loads import load_report
from backends.engine.machine import Machine
from backends.engine.prefilling import FIRST_RATIO, Chunk, Prefilling, urgency
from backends.engine.receiving import TRANSFER_FAILED as RECEIVE_FAILED
from backends.engine.receiving import Receiving
from backends.engine.request import (
    Listener,
    Peer,
    Refused,
    Request,
    Resident,
    Stage,
    aborted,
)
from backends.engine.sending import BOOTSTRAP_FAILED, TRANSFER_FAILED, Sending
from backends.engine.tokens import Script
from backends.steptimes import StepTimes
from policies.clock import Clock, Timer
from policies.types import Role

LATENESS_S = 0.005
"""Timers that fire this late shorten the next pass, so that live timers do not slow a server."""
ABORTED_BY_REQUEST = "Aborted by AbortReq."
NO_ROOM = "Invalid request: Disaggregated request received without bootstrap room id."
QUEUE_FULL = "The request queue is full."
EVICTED = "The request is aborted by a higher priority request."
SWITCH_RUNNING = "another role switch is already in progress"
NOT_PD = "instance is not running in PD disaggregation mode"
NOT_IDLE = "instance is not idle; drain all requests before switching"
SWITCH_DISABLED = "--enable-pd-role-switch is not set on this server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an engine decides with; the ones here are SGLang's."""

    batch: type[DecodeBatch] = DecodeBatch
    prefilling: Callable[[Machine], Prefilling] = Prefilling
    decoding: Callable[[Machine, Prefilling, Callable[[Resident], None]], Decoding] = Decoding


class Engine:
    """Everything that happens, happens on `clock`; nothing here waits or draws at random."""

    def __init__(
        self,
        config: EngineConfig,
        clock: Clock,
        times: StepTimes,
        fabric: Fabric | None = None,
        parts: Parts | None = None,
    ) -> None:
        parts = parts or Parts()
        self.config = config
        self.name = config.name
        self.life = 0
        self.switches = 0
        self.alive = True
        self.paused: str | None = None
        self.switching = False
        self.slow_factor = 1.0
        self.forward_sleep_s = 0.0
        self.times = times
        self.clock = clock
        self.leaps = False
        """Whether undisturbed decode steps are counted together; then `catch_up` before reading
        how far a request is. For clocks that are never late."""
        self.on_step: Callable[[Engine], object] | None = None
        """Called after each decode step, for whoever wants progress per server."""
        self.fabric = fabric if fabric is not None else Fabric(clock)
        self.machine = Machine(config, clock, parts.batch)
        self.prefilling = parts.prefilling(self.machine)
        self.decoding = parts.decoding(self.machine, self.prefilling, self._step_back)
        self.sending = Sending(self.machine, self.prefilling, self.fabric, self._wake)
        self.receiving = Receiving(self.machine, self.fabric, myself=self._as_peer, wake=self._wake)
        self.fabric.join(self, config.bootstrap_host, config.bootstrap_port)
        self._gpu = self.fabric.gpu(config.host)
        self._serials = count(1)
        self._held: deque[Resident] = deque()
        self._ingests: dict[int, Timer] = {}
        self._aborts: list[Resident] = []
        self._timer: Timer | None = None
        self._leap: Leap | None = None
        self._computing: tuple[float, Sequence[Chunk]] | None = None
        """Since when which prompts are in a pass."""
        self._switch_timer: Timer | None = None
        self._turning = False
        self._again = False
        self._due_s = 0.0

    @property
    def role(self) -> Role:
        return self.machine.role

    @property
    def residents(self) -> list[Resident]:
        """Every request inside, in order of arrival."""
        return sorted(self.machine.live.values(), key=lambda it: it.serial)

    @property
    def idle(self) -> bool:
        return not self.machine.live and not self._in_step()

    def submit(self, request: Request, listener: Listener) -> Resident:
        """Register a request; raises Refused where SGLang's front would."""
        if not self.alive:
            raise Refused(503, "the server is dead")
        if request.rid in self.machine.live:
            raise Refused(400, f"Duplicate request ID detected: {request.rid}")
        resident = self._resident(request, listener)
        self.machine.live[request.rid] = resident
        self.machine.counters.requests += 1
        self.machine.counters.prompt_tokens += request.prompt.tokens
        if self.paused or self.switching:
            self._held.append(resident)
        elif self.config.ingest_s:
            when = self.clock.time() + self.config.ingest_s
            self._ingests[resident.serial] = self.clock.call_at(when, self._ingest, resident)
        else:
            self._dispatch(resident)
        return resident

    def abort(self, rid: str) -> None:
        """Needs an exact live rid; one that the scheduler does not know yet latches for good."""
        resident = self.machine.live.get(rid)
        if resident is None or resident.abort_sent:
            return
        resident.abort_sent = True
        if resident.stage != Stage.HELD:
            self._aborts += [
                it
                for it in self.residents
                if it.stage != Stage.HELD and it.request.rid.startswith(rid)
            ]
            self._wake()

    def abort_all(self) -> None:
        self._aborts += [it for it in self.residents if it.stage != Stage.HELD]
        self._wake()

    def leave(self, resident: Resident) -> None:
        """The client went away: what is not dispatched is dropped, the rest is aborted."""
        if resident.stage == Stage.DONE:
            return
        if resident.stage != Stage.HELD:
            self.abort(resident.request.rid)
            return
        timer = self._ingests.pop(resident.serial, None)
        if timer is not None:
            timer.cancel()
        self._held = deque(it for it in self._held if it is not resident)
        self.machine.end(resident, aborted("Abort before dispatch"))

    def pause(self, mode: str) -> None:
        """in_place keeps memory, retract gives it back, abort ends all; new requests are held."""
        self.paused = mode
        self._land()
        if mode == "abort":
            self.abort_all()
        elif mode == "retract" and not self._in_step():
            self._retract_all()

    def resume(self) -> None:
        self.paused = None
        self._release_held()
        self._wake()

    def slow_down(self, forward_sleep_s: float | None) -> None:
        self._land()
        self.forward_sleep_s = forward_sleep_s or 0.0

    def flush_cache(self) -> bool:
        """Only an idle server forgets its prefixes."""
        if not self.idle:
            return False
        self.machine.kv.clear()
        return True

    def refuses_role(self, new_role: str) -> str | None:
        """Why this server cannot switch now, in SGLang's words; the role it has is never refused
        for being busy."""
        checks = (
            (not self.config.role_switch, SWITCH_DISABLED),
            (self.switching, SWITCH_RUNNING),
            (new_role not in {Role.PREFILL, Role.DECODE}, f"invalid new_role={new_role!r}"),
            (self.role == Role.UNIFIED, NOT_PD),
            (new_role != self.role and not self.idle, NOT_IDLE),
        )
        return next((message for refused, message in checks if refused), None)

    def switch_role(self, role: Role, done: Callable[[], object]) -> None:
        """Requests that come meanwhile are held until the new role is there."""
        self.switching = True
        when = self.clock.time() + self.config.role_switch_s
        self._switch_timer = self.clock.call_at(when, self._switched, role, done)

    def kill(self) -> None:
        """The process is gone, and everything in it."""
        self.catch_up()
        lost = self.residents
        self.alive = False
        self._reset()
        for resident in lost:
            self.machine.release(resident, keep=False)
            self.machine.forget(resident)
        self.machine.take_role(self.machine.role)
        address = f"{self.config.bootstrap_host}:{self.config.bootstrap_port}"
        self.fabric.died(self, address, self.config.heartbeat_s)
        self.life += 1
        self.switches = 0
        self.receiving.forget_peers()
        for resident in lost:
            resident.listener.lost(resident)

    def revive(self) -> None:
        """Start again in the configured role, with nothing in memory."""
        self.machine.take_role(self.config.role)
        self.alive = True

    def loads(self) -> dict[str, Any]:
        """One entry of /v1/loads, without its time of day."""
        self.catch_up()
        return load_report(self.machine, self.prefilling, self.sending, self.receiving)

    def serves_rooms(self) -> bool:
        return self.alive and self.role == Role.PREFILL

    def room_offered(self, room: int, peer: Peer) -> None:
        self.sending.offered(room, peer)

    def room_withdrawn(self, room: int, why: str) -> None:
        self.sending.withdrawn(room, why)

    def kv_arrived(self, resident: Resident, *, cached_tokens: int) -> bool:
        return self.alive and self.receiving.arrived(resident, cached_tokens)

    def peer_lost(self, server: str, life: int, address: str) -> None:
        self.receiving.lost(server, life, address)

    def _as_peer(self, resident: Resident) -> Peer:
        return Peer(self.name, self.life, resident)

    def _resident(self, request: Request, listener: Listener) -> Resident:
        tokens, context = request.prompt.tokens, self.config.context_tokens
        if tokens >= context:
            raise Refused(
                400,
                f"The input ({tokens} tokens) is longer than the model's context length "
                f"({context} tokens).",
            )
        asked = request.max_new_tokens
        if asked is not None and tokens + asked > context:
            raise Refused(400, too_many_tokens(context, tokens, asked))
        room = max(1, self.config.max_request_tokens - tokens)
        limit = room if asked is None else max(1, min(asked, room))
        return Resident(
            request=request,
            listener=listener,
            serial=next(self._serials),
            limit=limit,
            budget=limit,
            script=Script(request.prompt.seed(), self.config.eos_every),
            arrived_s=self.clock.time(),
        )

    def _ingest(self, resident: Resident) -> None:
        self._ingests.pop(resident.serial, None)
        if self.paused or self.switching:
            self._held.append(resident)
        else:
            self._dispatch(resident)

    def _dispatch(self, resident: Resident) -> None:
        request, tokens = resident.request, resident.request.prompt.tokens
        capacity = self.config.max_request_tokens
        if self.role != Role.UNIFIED and request.bootstrap_room is None:
            self.machine.end(resident, aborted(NO_ROOM, 400))
        elif tokens >= capacity:
            message = (
                f"Request {request.rid} exceeds the maximum number of tokens: {tokens} > {capacity}"
            )
            self.machine.end(resident, aborted(message, 400))
        elif self.role == Role.DECODE:
            self._dispatch_decode(resident)
        elif self.role == Role.PREFILL:
            resident.limit = resident.budget = 1
            self.sending.arrive(resident)
        elif self._room_in_queue(resident):
            self.prefilling.enqueue(resident)
        self._wake()

    def _dispatch_decode(self, resident: Resident) -> None:
        if resident.request.bootstrap_room == 0 and not self.machine.is_fake(resident):
            self.machine.fail(resident, RECEIVE_FAILED, "metadata missing (bootstrap_room=0)")
        else:
            self.receiving.arrive(resident)

    def _room_in_queue(self, resident: Resident) -> bool:
        """A full queue turns the newcomer away, or the least urgent one that waits."""
        limit, waiting = self.config.max_queued, self.prefilling.waiting
        if limit is None or len(waiting) < limit:
            return True
        if self.config.priority:
            worst = max(waiting.values(), key=urgency)
            if urgency(worst)[0] > urgency(resident)[0]:
                self.prefilling.remove(worst)
                self.machine.end(worst, aborted(EVICTED, 503))
                return True
        self.machine.end(resident, aborted(QUEUE_FULL, 503))
        return False

    def _step_back(self, resident: Resident) -> None:
        if self.role == Role.DECODE:
            self.receiving.retract(resident)
        else:
            self.prefilling.enqueue(resident)

    def _in_step(self) -> bool:
        return self._timer is not None

    def _wake(self) -> None:
        if self._turning:
            self._again = True
        elif self._timer is None and self.alive:
            self._due_s = self.clock.time()
            self._timer = self.clock.call_at(self._due_s, self._turn)
        elif self._leap is not None:
            self._land()
        elif self._computing is not None:
            self._break_off(*self._computing)

    def _break_off(self, since_s: float, chunks: Sequence[Chunk]) -> None:
        """An offline prefill ends with the layer in course where an online prompt has come."""
        layers = self.config.interrupt_layers
        if not layers or not self.prefilling.gives_way(chunks) or self._timer is None:
            return
        layer_s, now_s = (self._due_s - since_s) / layers, self.clock.time()
        ends_s = since_s + layer_s * (int((now_s - since_s) / layer_s) + 1)
        if ends_s < self._due_s:
            self._timer.cancel()
            self._computing, self._due_s = None, ends_s
            self._timer = self.clock.call_at(ends_s, self._broken_off, ends_s - since_s, chunks)

    def _broken_off(self, took_s: float, chunks: Sequence[Chunk]) -> None:
        self._timer = None
        self._gpu.end(self.name)
        self.machine.counters.prefill_busy_us += round(took_s * 1e6)
        self.prefilling.undo(chunks)
        self._turn()

    def _turn(self) -> None:
        """Between two passes: take aborts in, then start the next pass if there is work."""
        self._timer = None
        self._turning, self._again = True, False
        if self.paused != "in_place":
            self._apply_aborts()
        if self.paused == "retract":
            self._retract_all()
        ended = self.machine.ended
        if self.paused in {None, "abort"} and not self.switching:
            self._start_pass()
        self._again |= self.machine.ended != ended
        self._turning = False
        if self._again and self._timer is None:
            self._wake()

    def _start_pass(self) -> None:
        if self.role == Role.DECODE:
            self.receiving.advance()
        else:
            chunks = self.prefilling.plan(len(self.sending.sending))
            if chunks:
                self.decoding.interrupt()
                self.sending.computing(chunks)
                seconds = self.times.prefill_s([(it.new_tokens, it.cached_tokens) for it in chunks])
                self._computing = (self.clock.time(), chunks)
                self._run(seconds, self._prefilled, chunks)
                return
        batch = self.decoding.plan()
        if (
            batch
            and self.leaps
            and not self._gpu.is_shared
            and (steps := self.decoding.foreseen(MOST_STEPS)) > 1
        ):
            self._take_off(batch, steps)
        elif batch:
            self._run(self.decoding.seconds(self.times), self._decoded)
        else:
            self.decoding.interrupt()
            self.prefilling.ratio = FIRST_RATIO

    def _run(self, seconds: float, done: Callable[..., object], *args: object) -> None:
        seconds *= self._gpu.begin(self.name)
        took = seconds * self.slow_factor + self.forward_sleep_s
        self._due_s = max(self._due_s, self.clock.time() - LATENESS_S) + took
        self._timer = self.clock.call_at(self._due_s, done, took * 1e6, *args)

    def _take_off(self, batch: int, steps: int) -> None:
        """The batch grows by a token for each of its members with every step."""
        context, decode_s = self.machine.batch.context_tokens, self.times.decode_s
        factor, sleep_s = self.slow_factor, self.forward_sleep_s
        last = context + steps * batch
        start_s = max(self._due_s, self.clock.time() - LATENESS_S)
        self._leap = Leap(
            start_s, (decode_s(batch, at) * factor + sleep_s for at in range(context, last, batch))
        )
        self._timer = self.clock.call_at(self._leap.ends_s[-1], self._leapt)

    def catch_up(self) -> None:
        """Steps of a leap that have ended by now are counted."""
        if self._leap is not None and (passed := self._leap.pass_until(self.clock.time())):
            self.decoding.passed(passed)

    def _land(self) -> None:
        """Something has come: the scheduler turns to it after the step in course."""
        leap = self._leap
        if leap is None:
            return
        self.catch_up()
        if leap.cut() and self._timer is not None:
            self._timer.cancel()
            self._timer = self.clock.call_at(leap.ends_s[-1], self._leapt)

    def _leapt(self) -> None:
        leap = self._leap
        if leap is not None:
            self.catch_up()
            self._leap, self._due_s = None, leap.ends_s[-1]
            self._decoded(leap.took_us[-1])

    def _prefilled(self, took_us: float, chunks: Sequence[Chunk]) -> None:
        self._timer, self._turning, self._computing = None, True, None
        self._gpu.end(self.name)
        self.machine.counters.prefill_busy_us += round(took_us)
        complete = self.prefilling.settle(chunks)
        if self.role == Role.PREFILL:
            self.sending.computed(chunks)
        for resident in complete:
            self._first_token(resident)
        self._turn()

    def _first_token(self, resident: Resident) -> None:
        if self.role == Role.PREFILL:
            self.sending.complete(resident)
            return
        resident.generated_before += 1
        resident.settle_end()
        self.machine.heard_first(resident)
        if resident.generated_before >= resident.limit:
            self.machine.end(resident, resident.natural_end)
        else:
            self.machine.batch.join(resident)

    def _decoded(self, took_us: float) -> None:
        self._timer, self._turning = None, True
        self._gpu.end(self.name)
        self.decoding.settle(took_us)
        if self.on_step is not None:
            self.on_step(self)
        self._turn()

    def _apply_aborts(self) -> None:
        aborts, self._aborts = self._aborts, []
        for resident in aborts:
            if resident.stage != Stage.DONE:
                self._abort_now(resident)

    def _abort_now(self, resident: Resident) -> None:
        match resident.stage:
            case Stage.RUNNING:
                resident.end_reason = aborted("Aborted")
                self.machine.batch.end_next_step(resident)
            case Stage.BOOTSTRAP:
                self.sending.fail(resident, BOOTSTRAP_FAILED, ABORTED_BY_REQUEST)
            case Stage.SENDING:
                self.sending.fail(resident, TRANSFER_FAILED, ABORTED_BY_REQUEST)
            case Stage.HANDSHAKE | Stage.PREALLOC | Stage.RECEIVING:
                self.receiving.give_up(resident, ABORTED_BY_REQUEST)
            case Stage.READY | Stage.RETRACTED:
                self.receiving.drop(resident)
                self.machine.end(resident, aborted("Aborted"))
            case _:
                self.prefilling.remove(resident)
                self.sending.drop(resident)
                self.machine.end(resident, aborted("Abort in waiting queue"), keep=False)

    def _retract_all(self) -> None:
        for resident in list(self.machine.batch.members.values()):
            self.machine.retract(resident)
            self._step_back(resident)

    def _release_held(self) -> None:
        held, self._held = self._held, deque()
        for resident in held:
            self._dispatch(resident)

    def _switched(self, role: Role, done: Callable[[], object]) -> None:
        self._switch_timer = None
        self.switching = False
        self.switches += 1
        self.receiving.forget_peers()
        self.machine.take_role(role)
        done()
        if not self.paused:
            self._release_held()

    def _reset(self) -> None:
        timers = [*self._ingests.values(), self._timer, self._switch_timer]
        for timer in timers:
            if timer is not None:
                timer.cancel()
        self._timer = self._switch_timer = self._leap = self._computing = None
        self._gpu.end(self.name)
        self._ingests.clear()
        self._held.clear()
        self._aborts.clear()
        self.paused, self.switching = None, False
        self.prefilling.clear()
        self.sending.clear()
        self.receiving.clear()


def too_many_tokens(context: int, prompt: int, answer: int) -> str:
    return (
        f"Requested token count exceeds the model's maximum context length of {context} tokens. "
        f"You requested a total of {prompt + answer} tokens: {prompt} tokens from the input "
        f"messages and {answer} tokens for the completion. Please reduce the number of tokens in "
        "the input messages or the completion to fit within the limit."
    )
