"""One emulated server on a port: SGLang's routes in front of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import orjson
from aiohttp import web

from backends.emulator import admin, messages, responses
from backends.emulator.calls import (
    BadBody,
    Body,
    Call,
    chat_text,
    read_chat,
    read_completion,
    read_generate,
)
from backends.emulator.dialects import Chat, Completions, Dialect, Native, error_object
from backends.emulator.exchange import Exchange, json_response
from backends.emulator.faults import Fault, FaultKind, Faults, read_fault
from backends.emulator.parsers import calls, separate
from backends.emulator.tokenizer import decode, encode
from backends.engine import Engine
from policies.types import Role

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Reader = Callable[..., Call]

FAULT = web.RequestKey("fault", Fault)
MAX_BODY_BYTES = 256 * 1024 * 1024
EMBEDDING_SIZE = 64


class Face:
    """The HTTP face of one engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        incremental: bool = False,
        api_key: str | None = None,
        base_slowness: float = 1.0,
    ) -> None:
        self.engine = engine
        self.faults = Faults()
        self._api_key = api_key
        self._base_slowness = base_slowness
        self._numbers = count(1)
        self._native: Dialect = Native(incremental=incremental)
        self._chat, self._completions = Chat(), Completions()
        self._messages = messages.Messages()
        self._admin = admin.Admin(engine, incremental=incremental)
        self.apply_slowness()

    def application(self) -> web.Application:
        """All routes; inference first, then what describes and steers the server."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._gate])
        post = app.router.add_post
        inference: dict[str, Handler] = {
            "/generate": self._generate,
            "/v1/chat/completions": self._chat_completions,
            "/v1/completions": self._text_completions,
            "/v1/messages": self._anthropic,
            "/v1/responses": self._respond,
            "/v1/embeddings": self._embed,
        }
        self._inference = frozenset(inference)
        for path, handler in inference.items():
            post(path, handler)
        app.router.add_put("/generate", self._generate)
        for path in ("/v1/tokenize", "/tokenize"):
            post(path, self._tokenize)
        for path in ("/v1/detokenize", "/detokenize"):
            post(path, self._detokenize)
        post("/separate_reasoning", self._separate_reasoning)
        post("/parse_function_call", self._parse_calls)
        post("/v1/messages/count_tokens", self._count_tokens)
        post("/emulator/faults", self._set_faults)
        app.router.add_delete("/emulator/faults", self._clear_faults)
        self._admin.add_routes(app)
        return app

    def apply_slowness(self) -> None:
        self.engine.slow_factor = self._base_slowness * self.faults.slowness()

    @web.middleware
    async def _gate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._authorised(request):
            return json_response({"error": "Unauthorized"}, status=401)
        if request.path.startswith("/emulator/"):
            return await handler(request)
        inference = request.path in self._inference
        if inference:
            self.faults.count_slow_request()
            self.apply_slowness()
        fault = self.faults.take(request.path, inference=inference)
        if fault is not None:
            request[FAULT] = fault
            early = await self._early_fault(request, fault)
            if early is not None:
                return early
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return json_response({"detail": "Not Found"}, status=404)

    async def _early_fault(self, request: web.Request, fault: Fault) -> web.StreamResponse | None:
        if fault.kind == FaultKind.REFUSE and request.transport is not None:
            request.transport.abort()
            return web.Response(status=500)
        if fault.kind == FaultKind.HANG:
            await asyncio.get_running_loop().create_future()
        if fault.kind == FaultKind.ERROR_STATUS:
            if fault.body is not None:
                return web.Response(text=fault.body, status=fault.status)
            return json_response(
                error_object(fault.status, fault.message, str(fault.status)), status=fault.status
            )
        return None

    def _authorised(self, request: web.Request) -> bool:
        if self._api_key is None or request.path.startswith(("/health", "/ready", "/metrics")):
            return True
        return request.headers.get("authorization") == f"Bearer {self._api_key}"

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._native, read_generate)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._chat, read_chat)

    async def _text_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._completions, read_completion)

    async def _anthropic(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._messages, read_chat, messages.as_chat)

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, responses.Responses(), read_chat, responses.as_chat)

    async def _infer(
        self,
        request: web.Request,
        dialect: Dialect,
        read: Reader,
        turn: Callable[[Body], Body] = lambda body: body,
    ) -> web.StreamResponse:
        try:
            body = await self._body(request)
            call = read(turn(body), self.engine.config.model, fresh_rid=self._fresh_rid)
        except BadBody as bad:
            if dialect is self._native:
                return json_response({"error": str(bad)}, status=400)
            return json_response(dialect.refusal(400, str(bad)), status=400)
        exchange = Exchange(request, self.engine, dialect, call, request.get(FAULT))
        return await exchange.run()

    async def _body(self, request: web.Request) -> Body:
        if request.path.startswith("/v1/") and request.content_type != "application/json":
            raise BadBody("Unsupported Media Type: Only 'application/json' is allowed")
        try:
            body = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            raise BadBody(f"invalid JSON: {error}") from None
        if not isinstance(body, dict):
            raise BadBody("the body must be a JSON object")
        return body

    def _fresh_rid(self) -> str:
        return f"{next(self._numbers):032x}"

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self._body(request)
        except BadBody as bad:
            return json_response(error_object(400, str(bad), "BadRequestError"), status=400)
        given = body.get("input")
        texts = [given] if isinstance(given, str) else given
        if self.engine.role != Role.UNIFIED or not isinstance(texts, list) or not texts:
            why = "embeddings need a unified server and an input"
            return json_response(error_object(400, why, "BadRequestError"), status=400)
        prompts = [encode(text) if isinstance(text, str) else list(text) for text in texts]
        tokens = sum(map(len, prompts))
        data = [
            {"object": "embedding", "index": index, "embedding": embedding(ids)}
            for index, ids in enumerate(prompts)
        ]
        used = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        model = body.get("model") or self.engine.config.model
        return json_response({"object": "list", "model": model, "data": data, "usage": used})

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self._body(request)
            prompt = body.get("prompt")
            if prompt is None:
                prompt = chat_text(body.get("messages"), body)
        except BadBody as bad:
            return json_response(error_object(400, str(bad), "BadRequestError"), status=400)
        many = isinstance(prompt, list)
        tokens = [encode(str(text)) for text in prompt] if many else [encode(str(prompt))]
        counts = [len(ids) for ids in tokens]
        return json_response(
            {
                "tokens": tokens if many else tokens[0],
                "count": counts if many else counts[0],
                "max_model_len": self.engine.config.context_tokens,
            }
        )

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        try:
            tokens: Any = (await self._body(request)).get("tokens")
        except BadBody as bad:
            return json_response(error_object(400, str(bad), "BadRequestError"), status=400)
        many = isinstance(tokens, list) and bool(tokens) and isinstance(tokens[0], list)
        lists = tokens if many else [tokens]
        if not all(map(_are_ids, lists)):
            why = "tokens: a list of token ids, or a list of such lists, is required"
            return json_response(error_object(400, why, "BadRequestError"), status=400)
        texts = [decode(ids) for ids in lists]
        return json_response({"text": texts if many else texts[0]})

    async def _separate_reasoning(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self._body(request)
            found = separate(str(body.get("text")), str(body.get("reasoning_parser")))
        except (BadBody, ValueError) as error:
            return json_response({"detail": str(error)}, status=400)
        return json_response({"reasoning_text": found[0], "text": found[1]})

    async def _parse_calls(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self._body(request)
            parser = str(body.get("tool_call_parser"))
            found = calls(str(body.get("text")), body.get("tools") or [], parser)
        except (BadBody, ValueError, KeyError, TypeError) as error:
            return json_response({"detail": str(error)}, status=400)
        return json_response({"normal_text": found[0], "calls": found[1]})

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        try:
            turn = messages.as_chat(await self._body(request))
            tokens = encode(chat_text(turn.get("messages"), turn))
        except BadBody as bad:
            refusal = self._messages.refusal(400, str(bad))
            return json_response(refusal, status=400)
        return json_response({"input_tokens": len(tokens)})

    async def _set_faults(self, request: web.Request) -> web.StreamResponse:
        try:
            body: Any = orjson.loads(await request.read())
            for item in body if isinstance(body, list) else [body]:
                self.faults.add(read_fault(item))
        except (ValueError, TypeError) as error:
            return json_response({"error": str(error)}, status=400)
        self.apply_slowness()
        return json_response({"faults": len(self.faults)})

    async def _clear_faults(self, request: web.Request) -> web.StreamResponse:
        self.faults.clear()
        self.apply_slowness()
        return json_response({"faults": 0})


def _are_ids(tokens: object) -> bool:
    return isinstance(tokens, list) and all(type(it) is int and it >= 0 for it in tokens)


def embedding(ids: list[int]) -> list[float]:
    """Some direction that follows from the tokens."""
    total = sum((position + 1) * token for position, token in enumerate(ids))
    return [((total * (axis + 3)) % 2003) / 2003 - 0.5 for axis in range(EMBEDDING_SIZE)]
