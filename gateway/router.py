"""Which handler a request goes to. One dict look-up: aiohttp's own resolver costs more than it
gives to a table this small, and refusals are to be in the protocol's words."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import structlog
from aiohttp import hdrs, web

from gateway.errors import ApiError, Code, Dialect, error_body

REQUEST_ID = "x-request-id"

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Route = tuple[str, str, Handler]

log = structlog.get_logger("slackwater")


class Router:
    """A path that ends in * stands for all that begin like it; the longest goes first."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._exact: dict[str, dict[str, Handler]] = {}
        self._prefixes: dict[str, dict[str, Handler]] = {}
        for method, path, handler in routes:
            table = self._prefixes if path.endswith("*") else self._exact
            table.setdefault(path.rstrip("*"), {})[method] = handler

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        methods = self._exact.get(request.path)
        handler = None if methods is None else methods.get(request.method)
        if handler is None:
            handler = self._search(request, methods or self._by_prefix(request.path))
        try:
            return await handler(request)
        except ApiError as error:
            return refusal(Dialect.CHAT, error, request.headers.get(REQUEST_ID, ""))
        except ConnectionError:
            raise
        except Exception:  # the edge of a request: a bug must not reach the client as a page
            log.exception("a handler failed", path=request.path)
            failed = ApiError(Code.INTERNAL, "the gateway failed to handle this request")
            return refusal(Dialect.CHAT, failed, request.headers.get(REQUEST_ID, ""))

    def _by_prefix(self, path: str) -> dict[str, Handler] | None:
        found = [prefix for prefix in self._prefixes if path.startswith(prefix)]
        return self._prefixes[max(found, key=len)] if found else None

    @staticmethod
    def _search(request: web.BaseRequest, methods: dict[str, Handler] | None) -> Handler:
        if methods is None:
            return _not_found
        if request.method == hdrs.METH_HEAD and hdrs.METH_GET in methods:
            return methods[hdrs.METH_GET]
        return methods.get(request.method, _wrong_method)


async def _not_found(request: web.BaseRequest) -> web.StreamResponse:
    raise ApiError(Code.NOT_FOUND, f"there is no page {request.path}")


async def _wrong_method(request: web.BaseRequest) -> web.StreamResponse:
    raise ApiError(Code.METHOD_NOT_ALLOWED, f"{request.path} does not take {request.method}")


def refusal(dialect: Dialect, error: ApiError, request_id: str) -> web.Response:
    headers: dict[str, str] = {hdrs.CONTENT_TYPE: "application/json"}
    if request_id and request_id.isprintable():
        headers[REQUEST_ID] = request_id
    if error.retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(error.retry_after_s)
    body = error_body(dialect, error, request_id=request_id)
    return web.Response(body=body, status=error.status, headers=headers)
