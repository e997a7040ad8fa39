"""What a client that does not speak HTTP is told: a refusal like all others, and the door."""

from __future__ import annotations

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway.errors import ApiError, Code, Dialect
from gateway.router import refusal


class Door(web.Server):
    """aiohttp's server, whose own refusals are in our words."""

    def __call__(self) -> RequestHandler:
        return _Conversation(self, loop=self._loop, **self._kwargs)


class _Conversation(RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Nobody knows which protocol was meant: it is OpenAI's shape."""
        if status >= 500 or request.writer.output_size:
            return super().handle_error(request, status, exc, message)
        told = ApiError(Code.MALFORMED_HTTP, f"this is not HTTP as it should be: {message}")
        response = refusal(Dialect.CHAT, told, "")
        response.force_close()
        return response
