"""One HTTP exchange: engine callbacks go straight to the socket, no task wakes for a token."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web

from backends.emulator.calls import Call
from backends.emulator.dialects import Dialect, Piece
from backends.emulator.faults import Fault, FaultKind
from backends.emulator.tokenizer import decode, text_of
from backends.engine import Engine, Refused, Resident

HIGH_WATER_BYTES = 64 * 1024
"""Above this much unsent data tokens are coalesced, as SGLang does under back-pressure."""
DISCONNECT_TICK_S = 4.0
TOKEN_FAULTS = {
    FaultKind.HANG_AFTER,
    FaultKind.DIE_AFTER,
    FaultKind.IN_BAND,
    FaultKind.CORRUPT,
    FaultKind.TRUNCATE,
}
JSON = "application/json"
GARBAGE = b'data: {"text": "\xff\n\n'


class Answer:
    """One engine request of an exchange: keeps the text and knows what was told already."""

    def __init__(self, exchange: Exchange, index: int) -> None:
        self.exchange = exchange
        self.index = index
        self.resident: Resident | None = None
        self.reason: dict[str, Any] | None = None
        self._ids: list[int] = []
        self._text = ""
        self._text_end: int | None = None
        self._told = 0
        self._told_text = 0
        self._spoke = False

    def tokens(self, resident: Resident) -> None:
        self.exchange.progressed(self, resident)

    def finished(self, resident: Resident, reason: dict[str, Any]) -> None:
        self.resident, self.reason = resident, reason
        self.exchange.answered(self)

    def lost(self, resident: Resident) -> None:
        self.exchange.cut()

    def piece(self, resident: Resident, now_s: float) -> Piece:
        """What there is to tell now; afterwards it counts as told."""
        script, told = resident.script, self._told
        for position in range(len(self._ids), resident.generated):
            token = script.at(position)
            self._ids.append(token)
            self._text += text_of(token)
        text = self._text[: self._visible_end(resident)]
        piece = Piece(
            index=self.index,
            resident=resident,
            text=text,
            new_text=text[self._told_text :],
            ids=self._ids,
            new_ids=self._ids[told:],
            reason=self.reason,
            first=not self._spoke,
            now_s=now_s,
        )
        self._told, self._told_text, self._spoke = len(self._ids), len(text), True
        return piece

    def _visible_end(self, resident: Resident) -> int | None:
        """The stop string is not part of the answer, nor is a beginning of it."""
        matched = resident.natural_end.get("matched")
        if not isinstance(matched, str):
            return None
        if self._text_end is None:
            self._text_end = decode(resident.script.first(resident.limit)).find(matched)
        return self._text_end


class Exchange:
    """Submits a call, streams or collects the answers, and meets at most one fault."""

    def __init__(
        self,
        request: web.Request,
        engine: Engine,
        dialect: Dialect,
        call: Call,
        fault: Fault | None,
    ) -> None:
        self._request = request
        self._engine = engine
        self._dialect = dialect
        self._call = call
        self._fault = fault
        self._open = False
        self._silent = False
        self._residents: list[Resident] = []
        self._answers = [Answer(self, index) for index in range(len(call.requests))]
        self._left = len(call.requests)
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        self._begun: asyncio.Future[None] = loop.create_future()

    async def run(self) -> web.StreamResponse:
        """Answer; a client that goes away takes its requests with it."""
        started_s = self._engine.clock.time()
        try:
            return await (self._stream() if self._call.stream else self._unary())
        except asyncio.CancelledError:
            self._client_left(started_s)
            raise

    def progressed(self, answer: Answer, resident: Resident) -> None:
        if resident.generated >= resident.limit:
            return  # the end follows in the same breath, with the reason
        settle(self._begun)
        if self._meets_fault(resident):
            self._break(resident)
        elif self._open and not self._silent and not self._congested():
            self._write(self._event(answer, resident))

    def answered(self, answer: Answer) -> None:
        resident = answer.resident
        if resident is None:
            return
        settle(self._begun)
        if self._meets_fault(resident):
            self._break(resident)
        self._left -= 1
        if self._open and not self._silent:
            self._write(self._event(answer, resident))
        if self._left == 0 and not self._silent:
            settle(self._over)

    def cut(self) -> None:
        """The server died: so does the socket."""
        self._silent = True
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _stream(self) -> web.StreamResponse:
        if self._dialect.headers_at_once:
            response = await self._prepare()
            refused = self._submit()
            if refused is not None:
                self._write(self._dialect.in_band(refused.status, refused.message))
                self._write(b"data: [DONE]\n\n")
                return response
        else:
            refused = self._submit()
            if refused is not None:
                return self._refusal(refused.status, refused.message)
            await self._begun
            failed = self._failed_before_start()
            if failed is not None:
                return failed
            response = await self._prepare()
            self._catch_up()
            if self._silent and self._fault is not None and self._fault.kind == FaultKind.CORRUPT:
                self._write(GARBAGE)
        await self._over
        if self._left == 0 and not self._silent:
            self._write(self._dialect.closing(self._call, self._residents))
        return response

    async def _unary(self) -> web.StreamResponse:
        refused = self._submit()
        if refused is not None:
            return self._refusal(refused.status, refused.message)
        await self._over
        now_s = self._engine.clock.time()
        if self._fault is not None and self._silent:
            return self._broken_unary(self._fault)
        for answer in self._answers:
            if (failure := failure_of(answer.reason)) is not None:
                return self._refusal(*failure)
        pieces = [
            answer.piece(answer.resident, now_s) for answer in self._answers if answer.resident
        ]
        return json_response(self._dialect.whole(self._call, pieces))

    async def _prepare(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(self._request)
        self._open = True
        return response

    def _submit(self) -> Refused | None:
        for request, answer in zip(self._call.requests, self._answers, strict=True):
            try:
                self._residents.append(self._engine.submit(request, answer))
            except Refused as refused:
                for resident in self._residents:
                    self._engine.leave(resident)
                self._silent = True
                return refused
        return None

    def _catch_up(self) -> None:
        """Tell what happened while the status line was on its way."""
        for answer, resident in zip(self._answers, self._residents, strict=True):
            if not self._silent and (resident.generated or answer.reason is not None):
                self._write(self._event(answer, resident))

    def _event(self, answer: Answer, resident: Resident) -> bytes:
        piece = answer.piece(resident, self._engine.clock.time())
        failure = failure_of(piece.reason)
        if failure is not None and not self._dialect.headers_at_once:
            return self._dialect.in_band(*failure)
        return self._dialect.event(self._call, piece)

    def _failed_before_start(self) -> web.Response | None:
        if self._request.transport is None or self._request.transport.is_closing():
            return web.Response(status=500)
        if self._fault is not None and self._silent and self._fault.kind == FaultKind.IN_BAND:
            return self._refusal(self._fault.status, self._fault.message)
        if self._silent or self._left:
            return None
        failures = [failure_of(answer.reason) for answer in self._answers]
        first = next((it for it in failures if it is not None), None)
        return None if first is None else self._refusal(*first)

    def _refusal(self, status: int, message: str) -> web.Response:
        return json_response(self._dialect.refusal(status, message), status=status)

    def _client_left(self, started_s: float) -> None:
        """An open stream is aborted at once; everything else is noticed at a tick."""
        self._silent = True
        clock = self._engine.clock
        if self._open:
            self._leave()
        else:
            waited_s = clock.time() - started_s
            tick_s = DISCONNECT_TICK_S - waited_s % DISCONNECT_TICK_S
            clock.call_at(clock.time() + tick_s, self._leave)

    def _leave(self) -> None:
        for resident in self._residents:
            self._engine.leave(resident)

    def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if data and transport is not None and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _congested(self) -> bool:
        transport = self._request.transport
        return transport is None or transport.get_write_buffer_size() > HIGH_WATER_BYTES

    def _meets_fault(self, resident: Resident) -> bool:
        fault = self._fault
        return (
            fault is not None
            and not self._silent
            and fault.kind in TOKEN_FAULTS
            and resident.generated > fault.after_tokens
        )

    def _break(self, resident: Resident) -> None:
        """Do what the fault says; the engine's work goes on unless the answer is over."""
        fault = self._fault
        if fault is None:
            return
        self._silent = True
        if fault.kind == FaultKind.HANG_AFTER:
            return
        if fault.kind == FaultKind.DIE_AFTER:
            self.cut()
        elif fault.kind == FaultKind.CORRUPT and self._open:
            self._write(GARBAGE)
        elif fault.kind == FaultKind.IN_BAND and self._open:
            self._write(self._dialect.in_band(fault.status, fault.message) + b"data: [DONE]\n\n")
        self._leave()
        settle(self._over)

    def _broken_unary(self, fault: Fault) -> web.Response:
        if fault.kind == FaultKind.IN_BAND:
            return self._refusal(fault.status, fault.message)
        return web.Response(body=b'{"text": "\xff', content_type=JSON)


def settle(future: asyncio.Future[None]) -> None:
    """Let whoever waits go on; once is enough."""
    if not future.done():
        future.set_result(None)


def failure_of(reason: dict[str, Any] | None) -> tuple[int, str] | None:
    """Status and message of an abort that is the server's doing; a caller's own has none."""
    if reason is None or reason["type"] != "abort" or reason["status_code"] is None:
        return None
    return HTTPStatus(reason["status_code"]).value, reason["message"]


def json_response(value: object, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type=JSON)
