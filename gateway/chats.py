"""How a chat that is generated as token ids is answered: as the servers' own chat route would."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Protocol

import orjson
import structlog

from backends.chat import OPENAI_DEFAULTS, Fields, Turn, turn_of
from backends.exchange import Client, Exchange
from backends.progress import Kind as Stream
from backends.progress import count_of, is_native, meta_of
from backends.sglang import Sglang
from backends.sse import DONE, as_event, payloads
from backends.transcript import Transcript
from backends.trouble import Blame, Trouble, judge
from backends.words import in_words
from gateway.dialects import Ask, Dialect
from gateway.settings import ConfigError
from policies.events import Fail, Fault, Reason, Reject
from policies.types import Job, Kind, Resume

log = structlog.get_logger("slackwater")

_PREFIX = "chatcmpl-"
_LOST = "no server parsed the answer's reasoning and tool calls"


class Consult(Protocol):
    """Puts a question to the servers that the answer came from, or to others like them."""

    def __call__(
        self, path: bytes, body: bytes, then: Callable[[dict[str, Any] | None], None]
    ) -> None: ...


def sampling_in(path: str) -> Fields | None:
    """What a model's generation_config.json says of sampling; None without a file."""
    if not path:
        return None
    try:
        found = orjson.loads(Path(path).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"chat.generation_config: {in_words(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"chat.generation_config: {path} holds no object")
    return {name: found[name] for name in OPENAI_DEFAULTS if found.get(name) is not None}


class Chats:
    """Offline chats: which go to the servers as token ids, and how those are answered."""

    def __init__(self, backend: Sglang, rng: Random) -> None:
        self._backend = backend
        self._rng = rng
        self._resumes = True
        self._sampling: Fields | None = None
        self._told: set[tuple[str, str]] = set()

    def adopt(self, *, resumes: bool, generation_config: str) -> None:
        self._resumes = resumes
        self._sampling = sampling_in(generation_config)
        self._told.clear()

    def turn(self, ask: Ask, kind: Kind, model: str) -> Turn | None:
        if ask.dialect is not Dialect.CHAT or kind is not Kind.OFFLINE or not self._resumes:
            return None
        if (route := self._backend.chat_route(model)) is None:
            self._tell_once(model, "its servers do not say what their chats depend on, or differ")
            return None
        # One file tells of one model.
        sampling = self._sampling if len(self._backend.models) == 1 else None
        turn = None if ask.samples > 1 else turn_of(ask.body, route, sampling)
        if turn is None and route.defaults is None and sampling is None:
            self._tell_once(model, "chat.generation_config does not say what its sampling is")
        return turn

    def _tell_once(self, model: str, why: str) -> None:
        if model not in self._backend.models:  # clients may make names up
            model = ""
        if (model, why) not in self._told:
            self._told.add((model, why))
            log.info(
                "offline chats are not asked for as token ids: after a preemption they begin anew",
                model=model,
                why=why,
            )

    def as_ids(self, exchange: Exchange, job: Job, turn: Turn) -> Job:
        """Turns the exchange of a chat into one of /generate, which can be resumed."""
        client, is_stream = exchange.client, exchange.stream
        exchange.path, exchange.dialect = b"/generate", Dialect.GENERATE.value
        exchange.body, exchange.asks = turn.body, turn.asks
        exchange.stream, exchange.assembles = True, not is_stream
        exchange.transcript = Transcript.of(turn.body)
        exchange.client = ChatAnswer(
            turn,
            client,
            increments=lambda: _streams_increments(exchange),
            named=bool(exchange.client_rid),
            created=int(datetime.now(UTC).timestamp()),
            consult=lambda path, body, then: self._backend.consult(exchange, path, body, then),
            call_id=lambda: f"call_{self._rng.getrandbits(96):024x}",
            give_up=lambda trouble: client.refused(
                Fail(job, Reason.NOT_RESUMABLE, Fault.ENGINE), trouble
            ),
        )
        return job._replace(resume=Resume.EXACT)


def _streams_increments(exchange: Exchange) -> bool:
    """What its client is told, whichever server tells it."""
    return exchange.transcript is not None and exchange.transcript.kind is Stream.INCREMENTAL


class ChatAnswer:
    """Stands between the data path, which sees /generate, and the client, who asked for a chat.

    Text goes on as it comes, unless parsers have to see the whole of it first.
    """

    def __init__(
        self,
        turn: Turn,
        client: Client,
        *,
        increments: Callable[[], bool],
        named: bool,
        created: int,
        consult: Consult,
        call_id: Callable[[], str],
        give_up: Callable[[Trouble], None],
    ) -> None:
        self._turn = turn
        self._increments = increments
        self._client = client
        self._named = named
        self._created = created
        self._consult = consult
        self._call_id = call_id
        self._give_up = give_up
        self._texts: list[str] = []
        self._chars = 0
        self._meta: dict[str, Any] = {}
        self._head: dict[str, Any] = {}
        self._streams = True
        self._calls: list[dict[str, Any]] = []
        self._reasoning = ""

    # As the data path sees it.

    def begin(self) -> None:
        self._client.begin()

    def write(self, piece: bytes) -> bool:
        out = b"".join(self._chunks(event) for event in payloads(piece) if is_native(event))
        return self._client.write(out) if out else not self._client.has_room()

    def has_room(self) -> bool:
        return self._client.has_room()

    def drop(self) -> None:
        self._client.drop()

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        self._client.refused(decision, trouble)

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        whole = orjson.loads(body)
        self._streams = False
        self._meta = meta_of(whole)
        self._texts = [whole.get("text", "")]
        self._parse()

    def end(self) -> None:
        self._parse()

    # A stream.

    def _chunks(self, event: dict[str, Any]) -> bytes:
        text = event.get("text", "")
        if not self._increments():
            text = text[self._chars :]
        self._chars += len(text)
        self._texts.append(text)
        self._meta = meta_of(event)
        out = b""
        if not self._head:
            self._head = self._envelope("chat.completion.chunk")
            out = self._chunk({"role": "assistant", "content": ""})
        if text and not self._turn.parsing.is_needed:
            out += self._chunk({"content": text})
        return out

    def _chunk(
        self, delta: dict[str, Any], finish: str | None = None, matched: Any = None
    ) -> bytes:
        nothing = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
        choice = {
            "index": 0,
            "delta": nothing | delta,
            "logprobs": None,
            "finish_reason": finish,
            "matched_stop": matched,
        }
        return as_event(self._head | {"choices": [choice], "usage": None})

    # The parsers: first the reasoning, then the tool calls in what is left.

    def _parse(self) -> None:
        parsing, text = self._turn.parsing, "".join(self._texts)
        if not parsing.reasoning:
            self._parse_calls(text)
            return
        asked = {"text": text, "reasoning_parser": parsing.reasoning}
        self._consult(b"/separate_reasoning", orjson.dumps(asked), self._reasoned)

    def _reasoned(self, found: dict[str, Any] | None) -> None:
        if found is None:
            self._give_up(judge(502, _LOST, leg=Blame.DECODE))
            return
        self._reasoning = found.get("reasoning_text") or ""
        self._parse_calls(found.get("text") or "")

    def _parse_calls(self, text: str) -> None:
        parsing = self._turn.parsing
        if not parsing.tools:
            self._finish(text)
            return
        asked = {
            "text": text,
            "tools": parsing.tools,
            "tool_call_parser": parsing.tool_parser,
        }
        self._consult(b"/parse_function_call", orjson.dumps(asked), self._called)

    def _called(self, found: dict[str, Any] | None) -> None:
        if found is None:
            self._give_up(judge(502, _LOST, leg=Blame.DECODE))
            return
        self._calls = [
            {
                "id": self._call_id(),
                "index": index,
                "type": "function",
                "function": {"name": call.get("name"), "arguments": call.get("parameters")},
            }
            for index, call in enumerate(found.get("calls") or [])
        ]
        self._finish(found.get("normal_text") or "")

    # The end.

    def _finish(self, text: str) -> None:
        if not self._streams:
            self._client.answer(200, "application/json", orjson.dumps(self._whole(text)))
            return
        out = []
        if self._turn.parsing.is_needed:
            parsed = {"reasoning_content": self._reasoning, "content": text}
            out += [self._chunk({name: told}) for name, told in parsed.items() if told]
            out += [self._chunk({"tool_calls": [call]}) for call in self._calls]
        out.append(self._chunk({}, *self._ending()))
        if self._turn.usage:
            out.append(as_event(self._head | {"choices": [], "usage": self._usage()}))
        self._client.write(b"".join(out) + DONE)
        self._client.end()

    def _whole(self, text: str) -> dict[str, Any]:
        finish, matched = self._ending()
        message = {
            "role": "assistant",
            "content": text,
            "reasoning_content": self._reasoning or None,
            "tool_calls": self._calls or None,
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish,
            "matched_stop": matched,
        }
        return self._envelope("chat.completion") | {
            "choices": [choice],
            "usage": self._usage(),
            "metadata": {"weight_version": self._meta.get("weight_version")},
        }

    def _envelope(self, kind: str) -> dict[str, Any]:
        rid = str(self._meta.get("id", ""))
        return {
            "id": rid if self._named else _PREFIX + rid,
            "object": kind,
            "created": self._created,
            "model": self._turn.model,
        }

    def _ending(self) -> tuple[str | None, Any]:
        reason = self._meta.get("finish_reason")
        if type(reason) is not dict:
            return None, None
        if self._calls and reason.get("type") == "stop":
            return "tool_calls", None
        return reason.get("type"), reason.get("matched")

    def _usage(self) -> dict[str, Any]:
        prompt, made = (count_of(self._meta, it) for it in ("prompt_tokens", "completion_tokens"))
        cached = count_of(self._meta, "cached_tokens")
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + made,
            "completion_tokens": made,
            "prompt_tokens_details": {"cached_tokens": cached} if self._turn.tells_cached else None,
            "reasoning_tokens": count_of(self._meta, "reasoning_tokens"),
        }
