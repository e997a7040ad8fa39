"""SGLang servers over HTTP: pairs, cancels and retries as their wire contract asks for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from backends.addresses import SPELLINGS, respelled
from backends.attempt import Attempt
from backends.base import Post
from backends.chat import ChatRoute
from backends.consult import Consultation, Then
from backends.engine_words import told
from backends.exchange import Exchange
from backends.http import HttpError, Upstream
from backends.parts import known_ids, part_of, question
from backends.progress import Kind
from backends.resume import resume
from backends.splice import Splicer
from backends.standstill import Standstill
from backends.whole import Ids, Whole, ids_told
from policies.clock import Clock
from policies.events import (
    Continue,
    Dispatch,
    Event,
    Fail,
    Failed,
    Fault,
    Finished,
    FirstToken,
    Freed,
    Left,
    PartDone,
    Pause,
    PauseRefused,
    Preempt,
    Preempted,
    PrefillDone,
    Progress,
    Reject,
)
from policies.types import Job, Worker

log = structlog.get_logger("slackwater.preemption")

_RID_PREFIX = {"chat": "chatcmpl-", "completions": "cmpl-"}
"""What clients of the OpenAI routes expect their ids to begin with."""

BOOTSTRAP_PORT = 8998
"""Of a prefill server that says nothing about it."""
_ROOM_BITS = 62
_LOST_PAIR = frozenset({Fault.TIMEOUT, Fault.PAIRING})
"""How a pair ends whose legs have not found each other."""
_NATIVE_KIND = {True: Kind.INCREMENTAL, False: Kind.CUMULATIVE, None: None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long each phase may take before its servers are given up."""

    connect_s: float = 5.0
    first_token_online_s: float = 60.0
    first_token_offline_s: float = 600.0
    between_tokens_s: float = 60.0
    total_s: float = 3600.0
    client_stall_s: float = 60.0
    """A client that does not read for this long is taken for gone."""
    linger_s: float = 2.0
    """A prefill leg may answer this long after its decode leg has ended."""


@dataclass(slots=True)
class Server:
    """A worker and the connections to it."""

    worker: Worker
    upstream: Upstream
    spelling: int = 0
    """Of its bootstrap address: another one where decode servers may hold a dead connection."""
    is_met: bool = False
    is_known: bool = False
    """It has said what it is; else the next probe asks it."""
    is_doubted: bool = False
    """Only its plug-in may be another one: it serves whether or not it can be asked of it."""
    is_turning: bool = False
    """We change its role just now: what it says of it meanwhile is our own doing."""
    described: tuple[Worker, str] | None = None
    """What an operator said of it, its key included, before it was asked itself."""
    chat: ChatRoute | None = None
    """What its chats depend on; None: it did not say, or nobody here knows the like."""

    @property
    def name(self) -> str:
        return self.worker.name


class _Deaf:
    """Listens to an answer that nobody needs."""

    def on_head(self, status: int) -> None: ...
    def on_body(self, piece: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_error(self, error: HttpError) -> None: ...


_DEAF = _Deaf()


class Sglang:
    """The live backend: one attempt per dispatched job, one sweep over all of them per tick."""

    TICK_S = 0.1
    ABORT_AFTER_S = 0.1
    """An abort that overtakes its own request is lost and blocks the next one."""

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        patience: Patience,
        connect: Callable[[Worker, str], Upstream],
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._connect = connect
        self._post: Post = _nobody
        self._servers: dict[str, Server] = {}
        self._exchanges: dict[str, Exchange] = {}
        self._live: dict[str, Attempt] = {}
        self._lingering: list[tuple[float, Attempt]] = []
        self._ticking = False
        self.models: frozenset[str] = frozenset()
        """What all servers together serve; an empty name stands for one that did not say."""
        self.context_tokens: dict[str, int] = {}
        """The longest request that any server of a model takes; no entry where one did not say."""
        self.patience = patience
        self.standstill = Standstill(clock, lambda name: self._post(PauseRefused(name)))

    def connect(self, post: Post) -> None:
        self._post = post

    # Servers.

    def add(self, worker: Worker, api_key: str = "") -> Server:
        """Attempts at an earlier server of this name keep their own reference and sockets."""
        described = (worker, api_key)
        known = self._servers.get(worker.name)
        if known is not None:
            known.upstream.retire()
            if known.worker.url == worker.url:
                worker = known.worker  # until it has been asked again
        server = Server(worker, self._connect(worker, api_key), described=described)
        self._servers[worker.name] = server
        if known is not None:
            server.spelling, server.is_met = known.spelling, known.is_met
            server.chat = known.chat
        self._note_models()
        return server

    def update(self, worker: Worker) -> None:
        """The same server, better known; met again, it has been away or has changed its role."""
        server = self._servers[worker.name]
        server.worker = worker
        if server.is_met:
            self._name_anew(server)
        server.is_met = True
        self._note_models()

    def _name_anew(self, server: Server) -> None:
        """By chance: a gateway before this one may have used any spelling."""
        server.spelling = self._rng.randrange(1, SPELLINGS)

    def remove(self, name: str) -> None:
        """Attempts under way keep their own reference and their own sockets."""
        self.standstill.forget(name)
        if (server := self._servers.pop(name, None)) is not None:
            server.upstream.retire()
        self._note_models()

    def _note_models(self) -> None:
        workers = [server.worker for server in self._servers.values()]
        self.models = frozenset(worker.model for worker in workers)
        self.context_tokens = {}
        for model in {"", *self.models}:
            told = [it.context_tokens for it in workers if not model or it.model in ("", model)]
            if told and all(told):
                self.context_tokens[model] = max(told)

    def servers(self) -> Iterable[Server]:
        return self._servers.values()

    def chat_route(self, model: str) -> ChatRoute | None:
        """What all servers of a model have in common; None where they differ or are silent. Where
        nobody names it, those that name none may have it."""
        servers = [it for it in self._servers.values() if it.worker.model == model or not model]
        servers = servers or [it for it in self._servers.values() if not it.worker.model]
        routes = [it.chat for it in servers]
        return routes[0] if routes and all(route == routes[0] for route in routes) else None

    def consult(self, exchange: Exchange, path: bytes, body: bytes, then: Then) -> None:
        """Those that the answer came from are asked first."""
        near = (exchange.decode, exchange.prefill)
        found = [self._servers[name] for name in near if name in self._servers]
        models = {server.worker.model for server in found}
        found += [
            server
            for server in self._servers.values()
            if server.name not in near and (server.worker.model in models or not models)
        ]
        Consultation([server.upstream for server in found], path, body, self._clock, then)

    # Jobs, as the driver sees them.

    def open(self, exchange: Exchange) -> None:
        """Must come before the job does."""
        exchange.timeline.arrived_us = self.now_us()
        self._exchanges[exchange.job_id] = exchange

    def forget(self, job_id: str) -> None:
        """Nobody waits for this job any more; what runs for it is stopped by the driver."""
        exchange = self._exchanges.pop(job_id, None)
        if exchange is not None:
            exchange.timeline.ended_us = self.now_us()
        if exchange is not None and (attempt := self._live.get(job_id)) is not None:
            exchange.tokens += 0 if attempt.exchange.is_part else attempt.tokens
            attempt.tokens = 0

    def start(self, dispatch: Dispatch) -> None:
        exchange = self._exchanges.get(dispatch.job.id)
        if exchange is None:
            # Nobody waits any more: the job's end is on its way to the core.
            return
        prefill = None if dispatch.prefill is None else self._servers.get(dispatch.prefill)
        decode = self._servers.get(dispatch.decode)
        if decode is None or (prefill is None and dispatch.prefill is not None):
            # Taken off the list between the decision and here.
            self._post(Failed(exchange.job_id, Fault.UNREACHABLE))
            return
        exchange.timeline.dispatched_us = exchange.timeline.dispatched_us or self.now_us()
        exchange.prefill = dispatch.prefill or ""
        exchange.decode = dispatch.decode
        exchange.attempts = dispatch.attempt
        exchange.job = dispatch.job
        rid = f"{_RID_PREFIX.get(exchange.dialect, '')}{self._rng.getrandbits(128):032x}"
        if dispatch.upto:
            self._start_part(dispatch.upto, exchange, (prefill, decode), rid)
            return
        attempt = Attempt(self, exchange, prefill, decode, rid)
        transcript, has_begun = exchange.transcript, exchange.has_begun
        if transcript is not None and not has_begun and transcript.kind is not Kind.COMPLETIONS:
            # Of each attempt anew: one server streams increments, another one does not.
            transcript.kind = _NATIVE_KIND[decode.worker.streams_increments]
        self._live[exchange.job_id] = attempt
        if has_begun or exchange.asks is not None:
            resume(attempt, exchange, prefill or decode, self._send)
        else:
            self._send(attempt, exchange.body, None)
        self._tick_on()

    def _start_part(
        self, upto: int, exchange: Exchange, pair: tuple[Server | None, Server], rid: str
    ) -> None:
        """Its ids are asked for once, with its first part. What has begun to answer goes on."""
        ids, asked = known_ids(exchange), question(exchange)
        if exchange.timeline.first_token_us or (ids is None and asked is None):
            self._post(PartDone(exchange.job_id, is_cut=False))
            return
        attempt = Attempt(self, part_of(exchange, ids or [], upto), *pair, rid)
        attempt.exchange.job = exchange.job
        self._live[exchange.job_id] = attempt
        self._tick_on()
        if ids is not None:
            self._send(attempt, attempt.exchange.body, None)
            return

        def go_on(found: Ids | None) -> None:
            """Nothing that can be used is no failure of the job."""
            if attempt.over:
                return
            if found is None or len(found) < 2:
                attempt.over = True
                del self._live[exchange.job_id]
                self._post(PartDone(exchange.job_id, is_cut=False))
                return
            exchange.prompt_ids = found
            attempt.exchange.body = part_of(exchange, found, upto).body
            self._send(attempt, attempt.exchange.body, None)

        tokenizer = pair[0] or pair[1]
        listener = Whole(lambda _, body: go_on(ids_told(body)), lambda _: go_on(None))
        call = tokenizer.upstream.send(b"POST", b"/v1/tokenize", asked or b"", listener)
        attempt.waits_for(tokenizer, call)

    def _send(self, attempt: Attempt, body: dict[str, Any], splicer: Splicer | None) -> None:
        attempt.send(orjson.dumps(self._body(attempt, body)), splicer)

    def preempt(self, decision: Preempt) -> None:
        """Without an attempt, or with a client who has asked for the end, the end is on its way."""
        job = decision.job
        attempt = self._live.get(job.id)
        if attempt is None or attempt.exchange.aborted or not attempt.exchange.is_restartable:
            return
        del self._live[job.id]
        attempt.close()
        exchange = self._exchanges.get(job.id, attempt.exchange)
        kept = exchange.kept_tokens
        generated = max(0, kept - exchange.tokens)
        exchange.tokens = kept
        exchange.preemptions += 1
        lost = 0 if attempt.exchange.is_part else max(0, attempt.tokens - generated)
        _note(decision, exchange, lost)
        self._post(Preempted(job.id, generated, lost))

    def pause(self, decision: Pause) -> None:
        """One that was taken off the list meanwhile goes on by that."""
        if (server := self._servers.get(decision.worker)) is not None:
            self.standstill.pause(server.name, server.upstream, decision.beside)

    def go_on(self, decision: Continue) -> None:
        if (server := self._servers.get(decision.worker)) is not None:
            self.standstill.go_on(server.name, server.upstream)

    def stop(self, job: Job) -> None:
        attempt = self._live.pop(job.id, None)
        if attempt is not None:
            attempt.close()
        self._exchanges.pop(job.id, None)
        self._post(Freed(job.id))

    def refuse(self, decision: Reject | Fail) -> None:
        exchange = self._exchanges.pop(decision.job.id, None)
        if exchange is not None:
            exchange.timeline.ended_us = self.now_us()
            exchange.client.refused(decision, exchange.trouble)

    def abort(self, job_id: str) -> bool:
        """Passes a client's own abort on: the server's last words become the answer."""
        attempt = self._live.get(job_id)
        if attempt is None or attempt.exchange.is_part:
            return False
        attempt.exchange.aborted = True
        for server, _ in attempt.open_legs():
            self._abort_at(server, attempt.rid, attempt.sent_s + self.ABORT_AFTER_S)
        return True

    def runs(self, job_id: str) -> bool:
        """Whether it is at a server now."""
        return job_id in self._live

    def __len__(self) -> int:
        """Attempts with an open leg."""
        return len(self._live) + len(self._lingering)

    def _body(self, attempt: Attempt, asked: dict[str, Any]) -> dict[str, Any]:
        exchange, prefill = attempt.exchange, attempt.prefill
        body = {**asked, "rid": attempt.rid}
        if exchange.assembles:
            body["stream"] = True
        if exchange.priority is not None and attempt.decode.worker.orders_by_priority:
            body["priority"] = exchange.priority
        if prefill is not None:
            body["bootstrap_host"] = respelled(prefill.worker.bootstrap_host, prefill.spelling)
            body["bootstrap_port"] = prefill.worker.bootstrap_port
            body["bootstrap_room"] = self._rng.getrandbits(_ROOM_BITS) + 1
        engine = attempt.decode.worker.engine or (prefill is not None and prefill.worker.engine)
        return body | told(exchange.job, body) if engine and exchange.job is not None else body

    # What attempts say.

    def now_s(self) -> float:
        return self._clock.time()

    def now_us(self) -> int:
        return int(self._clock.time() * 1e6)

    def prefill_done(self, job_id: str) -> None:
        self._post(PrefillDone(job_id))

    def first_token(self, job_id: str) -> None:
        self._post(FirstToken(job_id))

    def finished(self, attempt: Attempt) -> None:
        exchange = attempt.exchange
        exchange.timeline.ended_us = self.now_us()
        exchange.tokens += attempt.tokens
        if attempt.open_legs():
            self._lingering.append((self.now_s() + self.patience.linger_s, attempt))
        self._live.pop(exchange.job_id, None)
        if exchange.is_part:
            whole = self._exchanges.get(exchange.job_id)
            ids = None if whole is None else known_ids(whole)
            self._post(PartDone(exchange.job_id, prompt_tokens=len(ids or ())))
            return
        self._exchanges.pop(exchange.job_id, None)
        self._post(Finished(exchange.job_id, attempt.tokens))

    def failed(self, attempt: Attempt, fault: Fault, blamed: tuple[str, ...]) -> None:
        exchange = attempt.exchange
        self._live.pop(exchange.job_id, None)
        generated = 0 if exchange.is_part else attempt.tokens
        if exchange.is_part and (whole := self._exchanges.get(exchange.job_id)) is not None:
            whole.trouble, exchange = exchange.trouble, whole
        elif exchange.transcript is not None:
            # A new attempt goes on from what is kept: events may hold more tokens than one.
            generated = max(0, exchange.kept_tokens - exchange.tokens)
        exchange.tokens += generated
        prefill = attempt.prefill
        if fault in _LOST_PAIR and prefill is not None and prefill.name in blamed:
            self._name_anew(prefill)
        self._post(Failed(exchange.job_id, fault, blamed, generated, exchange.is_restartable))

    def client_stalled(self, exchange: Exchange) -> None:
        exchange.client.drop()
        self._post(Left(exchange.job_id))

    def abort_later(self, server: Server, attempt: Attempt) -> None:
        """A closed socket is enough for a /generate stream; other routes need to be told."""
        if not attempt.closes_at_once:
            self._abort_at(server, attempt.rid, attempt.sent_s + self.ABORT_AFTER_S)

    def _abort_at(self, server: Server, rid: str, at_s: float) -> None:
        when = max(at_s, self.now_s())
        self._clock.call_at(when, self._send_abort, server, orjson.dumps({"rid": rid}))

    @staticmethod
    def _send_abort(server: Server, body: bytes) -> None:
        server.upstream.send(b"POST", b"/abort_request", body, _DEAF)

    # Time.

    def _tick_on(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._clock.call_at(self.now_s() + self.TICK_S, self._tick)

    def _tick(self) -> None:
        now_s = self.now_s()
        self._ticking = False
        moved = tuple(
            (job_id, attempt.made())
            for job_id, attempt in self._live.items()
            if attempt.progress(now_s) and not attempt.exchange.is_part
        )
        if moved:
            self._post(Progress(moved))
        for attempt in list(self._live.values()):
            attempt.check(now_s)
        self._release_lingering(now_s)
        if self._live or self._lingering:
            self._tick_on()

    def _release_lingering(self, now_s: float) -> None:
        kept = []
        for deadline_s, attempt in self._lingering:
            if now_s >= deadline_s:
                attempt.close()
            elif attempt.open_legs():
                kept.append((deadline_s, attempt))
        self._lingering = kept

    def close(self) -> None:
        self.standstill.close()
        for attempt in [*self._live.values(), *(attempt for _, attempt in self._lingering)]:
            attempt.close()
        for server in self._servers.values():
            server.upstream.close()


def _note(decision: Preempt, exchange: Exchange, lost: int) -> None:
    job, rid = decision.job, exchange.client_rid
    log.info(
        "preempted",
        request_id=exchange.request_id,
        **({"rid": rid} if rid else {}),
        **{"class": job.kind.value},
        job=job.id,
        reason=decision.reason.value,
        worker=decision.worker,
        prefill=exchange.prefill,
        decode=exchange.decode,
        times=exchange.preemptions,
        prompt_tokens=job.prompt_tokens,
        kept_tokens=exchange.tokens,
        lost_tokens=lost,
    )


def _nobody(event: Event) -> None:
    raise RuntimeError(f"{event} before anyone listens")
