"""One try at one job: a prefill leg and a decode leg that succeed or end together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import orjson

from backends.exchange import Exchange
from backends.http import Call, HttpError, Reason
from backends.logprobs import with_prompt_logprobs
from backends.sse import DONE, ends_stream, is_corrupt
from backends.transcript import Splicer
from backends.trouble import (
    Blame,
    Trouble,
    blamed_by,
    fault_of,
    judge,
    judge_answer,
    judge_event,
)
from backends.whole import Whole
from policies.events import Fault

if TYPE_CHECKING:
    from backends.sglang import Server, Sglang

_FAULT = {
    Reason.CONNECT: Fault.UNREACHABLE,
    Reason.CONNECT_TIMEOUT: Fault.UNREACHABLE,
    Reason.CLOSED: Fault.DIED,
    Reason.TIMEOUT: Fault.TIMEOUT,
}
_COMPLETION_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d+)')
_FINISHED = re.compile(rb'"finish_reason":\s*["{]')
_TAIL_BYTES = 4096
"""Where an event's counts stand: after all of its text."""
_WHOLE = (b"}\n\n", b"[DONE]\n\n")
"""How a piece ends that holds only whole events: nearly all do."""
_ABORTED = Trouble(status=499, message="aborted", retryable=False, blames=Blame.ABORTED)


_MARKS = {
    "messages": b"event: content_block_delta",
    "responses": b"event: response.output_text.delta",
}
"""What is counted as a token where events of other kinds are many."""
_OTHER_EVENTS = {"chat": 2}
"""The role before the first token, and the finish reason after the last one."""


class Attempt:
    """Hears the decode leg itself: that is the path that every streamed token takes."""

    __slots__ = (
        "_answer",
        "_backend",
        "_checked_s",
        "_decode_call",
        "_decode_ended",
        "_ended",
        "_last",
        "_mark",
        "_moved",
        "_paused_since_s",
        "_prefill_body",
        "_prefill_call",
        "_quiet_since_s",
        "_relays",
        "_rename",
        "_sent_s",
        "_splicer",
        "_status",
        "_stood_s",
        "_tokenizer",
        "_torn",
        "_write",
        "decode",
        "exchange",
        "flowing",
        "over",
        "prefill",
        "rid",
        "tokens",
    )

    def __init__(
        self,
        backend: Sglang,
        exchange: Exchange,
        prefill: Server | None,
        decode: Server,
        rid: str,
    ) -> None:
        self._backend = backend
        self.prefill, self.decode = prefill, decode
        self._prefill_call: Call | None = None
        self._decode_call: Call | None = None
        self._prefill_body: bytes | None = None
        self._answer: list[bytes] = []
        self._mark = _MARKS.get(exchange.dialect, b"\n\n")
        self._ended = False
        self._relays = False
        self._tokenizer: tuple[Server, Call] | None = None
        self._torn = b""
        self._write = exchange.client.write
        self._last = b""
        self._status = 0
        self._moved = False
        self._decode_ended = False
        self._paused_since_s = 0.0
        self._quiet_since_s = 0.0
        self._sent_s = self._checked_s = backend.now_s()
        self._stood_s = 0.0
        self._splicer: Splicer | None = None
        self._rename: tuple[bytes, bytes] | None = None
        self.exchange = exchange
        self.rid = rid
        self.flowing = False
        self.over = False
        self.tokens = 0

    def waits_for(self, tokenizer: Server, call: Call) -> None:
        """Nothing is sent before the prompt's ids are known."""
        self._tokenizer = tokenizer, call

    def send(self, body: bytes, splicer: Splicer | None) -> None:
        self._tokenizer = None
        self._sent_s = self._quiet_since_s = self._backend.now_s()
        self._stood_s = 0.0
        self._splicer = splicer
        if self.exchange.client_rid:
            shown = orjson.dumps(self.exchange.client_rid)[1:-1]
            self._rename = ((self.exchange.shown_rid or self.rid).encode(), shown)
        path = self.exchange.path
        if self.prefill is not None:
            leg = Whole(self._prefill_answered, self._prefill_lost)
            self._prefill_call = self.prefill.upstream.send(b"POST", path, body, leg)
        self._decode_call = call = self.decode.upstream.send(b"POST", path, body, self)
        if self.exchange.stream:
            call.trickles()

    # The decode leg.

    def on_head(self, status: int) -> None:
        self._status = status

    def on_body(self, piece: bytes) -> None:
        """The path of every token: what follows is what it costs."""
        if not self._relays or piece[-3:] != b"}\n\n" or self._torn:
            self._on_rare_body(piece)
            return
        # An escaped quote never looks like these, so text cannot raise a false alarm here. `in`
        # takes twice as long: before it searches, it tries whether the other bytes are a number.
        find = piece.find
        if (find(b'"error":') >= 0 or find(b'"abort"') >= 0) and self._judge(piece):
            return
        self._moved = True
        self._last = piece
        self.tokens += piece.count(self._mark)
        if self._write(piece):
            self._pause()

    def _on_rare_body(self, piece: bytes) -> None:
        """First pieces, torn ones, and all of those that are not relayed as they are."""
        if not self.exchange.stream or self._status != 200:
            self._answer.append(piece)
            return
        if self._torn or not piece.endswith(_WHOLE):
            piece = self._whole_events(piece)
        if not piece or self._judge(piece):
            return
        if not self.flowing:
            self._begin()
        self._moved = True
        self.tokens += piece.count(self._mark)
        if piece.endswith(DONE):
            self.tokens -= 1
            self._ended = True
        if self._splicer is not None:
            piece = self._splicer.feed(piece)
        if piece != DONE:
            self._last = piece
        self._hand_on(piece)
        if self._splicer is not None and self._splicer.finished:
            self._cut_short()

    def _hand_on(self, piece: bytes) -> None:
        exchange = self.exchange
        if exchange.transcript is not None:
            exchange.transcript.feed(piece)
        if self._rename is not None:
            piece = piece.replace(*self._rename)
        if piece and not exchange.assembles and self._write(piece):  # an empty chunk ends a stream
            self._pause()

    def _cut_short(self) -> None:
        """The answer is complete before the server thinks so."""
        call, self._decode_call = self._decode_call, None
        self._decode_ended = True
        if call is not None:
            call.cancel()
            self._backend.abort_later(self.decode, self)
        self._finish()

    def _pause(self) -> None:
        """The client does not read as fast as it is written to."""
        if self._decode_call is not None:
            self._decode_call.pause()
            self._paused_since_s = self._backend.now_s()

    def _whole_events(self, piece: bytes) -> bytes:
        """A client never gets half an event (what is torn waits for its rest), nor a broken one."""
        whole, _, self._torn = (self._torn + piece).rpartition(b"\n\n")
        if not whole:
            return b""
        if is_corrupt(whole + b"\n\n"):
            self.fail(Fault.ENGINE, (self.decode.name,), judge(502, "a chunk is not JSON"))
            return b""
        return whole + b"\n\n"

    def _judge(self, piece: bytes) -> bool:
        trouble = judge_event(piece)
        if trouble is None or (self.exchange.aborted and trouble.blames is Blame.ABORTED):
            return False
        self.fail(fault_of(trouble), self._blamed(trouble), trouble)
        return True

    def _begin(self) -> None:
        self.flowing = True
        exchange = self.exchange
        self._relays = (
            self._splicer is None
            and self._rename is None
            and exchange.transcript is None
            and not exchange.assembles
        )
        if not exchange.timeline.first_token_us:
            exchange.timeline.first_token_us = self._backend.now_us()
            exchange.shown_rid = self.rid
            if not exchange.assembles:
                exchange.client.begin()
        if not exchange.is_part:
            self._backend.first_token(exchange.job_id)

    def on_end(self) -> None:
        self._decode_ended, self._decode_call = True, None  # it holds this attempt
        if self.over:
            return
        if not self.exchange.stream or self._status != 200:
            self._whole_answer()
        else:
            self._stream_closed(Fault.DIED, "the stream was cut off")

    def _stream_closed(self, fault: Fault, detail: str) -> None:
        """However a connection ends, what was complete before stays so."""
        if self.over:
            return
        if not self.flowing or not (self._is_ended or _FINISHED.search(self._last)):
            self.fail(fault, (self.decode.name,), judge(502, detail))
            return
        if not self._is_ended and not self.exchange.assembles:
            # The last token has come; what is lost is the line that says so.
            self.exchange.client.write(DONE)
        self._finish()

    @property
    def _is_ended(self) -> bool:
        return self._ended or ends_stream(self._last)

    def _whole_answer(self) -> None:
        body = b"".join(self._answer)
        trouble = judge_answer(self.exchange.dialect, self._status, body)
        if trouble is not None and not (self.exchange.aborted and trouble.blames is Blame.ABORTED):
            self.fail(fault_of(trouble), self._blamed(trouble), trouble)
            return
        found = _COMPLETION_TOKENS.findall(body[-_TAIL_BYTES:])
        self.tokens = int(found[-1]) if found else 1
        self._answer = [body]
        if not self._waits_for_prompt_logprobs():
            self._finish()

    def _waits_for_prompt_logprobs(self) -> bool:
        """Only the prefill leg has computed them."""
        if self.prefill is None or not self.exchange.body.get("return_logprob"):
            return False
        if self._prefill_body is None:
            return self._prefill_call is not None
        self._answer = [with_prompt_logprobs(self._answer[0], self._prefill_body)]
        return False

    def on_error(self, error: HttpError) -> None:
        self._decode_ended, self._decode_call = True, None
        self._stream_closed(_FAULT.get(error.reason, Fault.ENGINE), str(error))

    # The prefill leg.

    def _prefill_answered(self, status: int, body: bytes) -> None:
        """It is judged, never relayed."""
        trouble = judge_answer(self.exchange.dialect, status, body, leg=Blame.PREFILL)
        self._prefill_ended(trouble, body)

    def _prefill_lost(self, error: HttpError) -> None:
        trouble = judge(502, str(error), leg=Blame.PREFILL)
        self._prefill_ended(trouble, b"", _FAULT.get(error.reason, Fault.ENGINE))

    def _prefill_ended(
        self, trouble: Trouble | None, body: bytes, fault: Fault | None = None
    ) -> None:
        self._prefill_call = None
        if self.over:
            return
        if trouble is None:
            if not self.exchange.timeline.first_token_us:
                self.exchange.timeline.prefilled_us = self._backend.now_us()
            self._prefill_body = body
            self._backend.prefill_done(self.exchange.job_id)
            if self._decode_ended and not self._waits_for_prompt_logprobs():
                self._finish()
        elif not self.flowing and self.prefill is not None:
            # Decode would wait for its KV for minutes: nobody else tells it.
            self.fail(fault or fault_of(trouble), self._blamed(trouble), trouble)

    # How it ends.

    def _finish(self) -> None:
        exchange = self.exchange
        if exchange.assembles and exchange.transcript is not None:
            try:
                self._answer = [exchange.transcript.final_answer()]
            except ValueError as error:
                self.fail(Fault.ENGINE, (self.decode.name,), judge(502, str(error)))
                return
        self.over = True
        if exchange.stream:
            self.tokens = self._counted()
        if exchange.stream and not exchange.assembles:
            exchange.client.end()
        else:
            self._answer_whole(self._answer[0])
        self._backend.finished(self)

    def made(self) -> int:
        """Tokens so far: the server's own count where each event has one, else the events."""
        if self.exchange.dialect == "generate" and self._splicer is None:
            return _told_in(self._last[-_TAIL_BYTES:]) or self.tokens
        return self.tokens

    def _counted(self) -> int:
        """The server's own count where its last event has one, else one for each event."""
        told = _told_in(self._last) if self._splicer is None else 0
        return told or max(1, self.tokens - _OTHER_EVENTS.get(self.exchange.dialect, 0))

    def _answer_whole(self, body: bytes) -> None:
        if self._rename is not None:
            body = body.replace(*self._rename)
        self.exchange.client.answer(self._status, "application/json", body)

    def fail(self, fault: Fault, blamed: tuple[str, ...], trouble: Trouble) -> None:
        """Servers call an abort by many names; a client that asked for it is not served again."""
        if self.over:
            return
        if self.exchange.aborted:
            fault, blamed, trouble = Fault.REQUEST, (), _ABORTED
        self.exchange.trouble = trouble
        self.close()
        self._backend.failed(self, fault, blamed)

    def close(self) -> None:
        """Both legs, decode first: it tells its prefill. Idempotent."""
        self.over = True
        for server, call in self.open_legs():
            call.cancel()
            self._backend.abort_later(server, self)
        self._decode_call = self._prefill_call = None
        if self._tokenizer is not None:
            self._tokenizer[1].cancel()

    def open_legs(self) -> list[tuple[Server, Call]]:
        legs: list[tuple[Server, Call]] = []
        if self._decode_call is not None and not self._decode_ended:
            legs.append((self.decode, self._decode_call))
        if self._prefill_call is not None and self.prefill is not None:
            legs.append((self.prefill, self._prefill_call))
        return legs

    @property
    def closes_at_once(self) -> bool:
        """SGLang watches the socket of a /generate stream; others it looks at now and then."""
        return self.exchange.stream and (self.exchange.path == b"/generate" or self.flowing)

    @property
    def sent_s(self) -> float:
        return self._sent_s

    # Time.

    def progress(self, now_s: float) -> bool:
        """Whether tokens came since the last look."""
        if not self._moved:
            return False
        self._moved, self._quiet_since_s = False, now_s
        return True

    def check(self, now_s: float) -> None:
        """Looks at the clock for all phases at once: a timer per request would cost more."""
        patience = self._backend.patience
        if self._backend.standstill.names:
            self._excuse(now_s)
        self._checked_s, waited_s = now_s, now_s - self._sent_s - self._stood_s
        if self._paused_since_s:
            self._check_client(now_s)
        elif now_s - self._sent_s > patience.total_s:
            self._time_out(f"no end after {patience.total_s:g} s")
        elif not self.exchange.stream and waited_s > self.exchange.whole_timeout_s:
            self._time_out(f"no answer after {self.exchange.whole_timeout_s:g} s")
        elif self.flowing and now_s - self._quiet_since_s > patience.between_tokens_s:
            self._time_out(f"no token for {patience.between_tokens_s:g} s")
        elif (
            not self.flowing
            and (self.exchange.stream or self._prefill_call is not None)
            and waited_s > self.exchange.first_token_timeout_s
        ):
            # A whole answer shows no first token, but its prefill leg ends just before it.
            self._time_out(f"no first token after {self.exchange.first_token_timeout_s:g} s")

    def _excuse(self, now_s: float) -> None:
        """While one of its servers stands still at our word, only its total time runs on."""
        names = self._backend.standstill.names
        if self.decode.name in names or (self.prefill is not None and self.prefill.name in names):
            self._stood_s += now_s - self._checked_s
            self._quiet_since_s = now_s

    def _check_client(self, now_s: float) -> None:
        if self.exchange.client.has_room():
            self._paused_since_s, self._quiet_since_s = 0.0, now_s
            if self._decode_call is not None:
                self._decode_call.resume()
        elif now_s - self._paused_since_s > self._backend.patience.client_stall_s:
            self._backend.client_stalled(self.exchange)

    def _time_out(self, what: str) -> None:
        """Before the KV has arrived nobody can tell which side hangs, so both are to blame."""
        blamed: tuple[str, ...] = (self.decode.name,)
        if self._tokenizer is not None:
            blamed = (self._tokenizer[0].name,)
        elif self._prefill_call is not None and self.prefill is not None and not self.flowing:
            blamed = (self.prefill.name, self.decode.name)
        self.fail(Fault.TIMEOUT, blamed, judge(504, what))

    def _blamed(self, trouble: Trouble) -> tuple[str, ...]:
        decode = self.decode.name
        return blamed_by(trouble, self.prefill.name if self.prefill else decode, decode)


def _told_in(event: bytes) -> int:
    found = _COMPLETION_TOKENS.findall(event)
    return int(found[-1]) if found else 0
