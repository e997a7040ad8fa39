from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.fetch import fetch
from backends.http import Reason, Upstream, _checked
from tests.backends.http_peers import (
    CHUNKED,
    CHUNKED_HEAD,
    SHORT,
    Heard,
    Peer,
    Server,
    ask,
    asyncio_run,
    get,
    pool,
    saying,
    saying_and_closing,
    serving,
    silent,
    turns,
)


async def test_a_request_carries_method_path_host_headers_and_body() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def handler(peer: Peer) -> None:
        seen.append(await peer.answer(SHORT))

    async with serving(handler) as server:
        async with pool(server.url + "/base/", headers={"authorization": "Bearer k"}) as upstream:
            heard = Heard()
            upstream.send(b"POST", b"/v1/x?y=1", b"{}", heard, b"x-rid: 7\r\n")
            await heard.over.wait()
    authority = server.url.removeprefix("http://").encode()
    assert seen == [
        (
            b"POST /base/v1/x?y=1 HTTP/1.1\r\nhost: " + authority + b"\r\n"
            b"authorization: Bearer k\r\nx-rid: 7\r\n"
            b"content-type: application/json\r\ncontent-length: 2\r\n\r\n",
            b"{}",
        )
    ]


async def test_a_callers_content_type_replaces_the_usual_one() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def handler(peer: Peer) -> None:
        seen.append(await peer.answer(SHORT))

    async with serving(handler) as server, pool(server) as upstream:
        await fetch(
            upstream, b"POST", b"/", b"x", timeout_s=1, headers=b"Content-Type: text/plain\r\n"
        )
    assert seen[0][0].lower().count(b"content-type") == 1
    assert b"Content-Type: text/plain" in seen[0][0]


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        (b"GET /\r\n", b"/", b""),
        (b"", b"/", b""),
        (b"GET", b"/ HTTP/1.1\r\nx: y", b""),
        (b"GET", b"/\n", b""),
        (b"GET", b"no-slash", b""),
        (b"GET", "/ü".encode(), b""),
        (b"GET", b"/", b"x: y"),
        (b"GET", b"/", b"x: y\r\n\r\nGET /"),
        (b"GET", b"/", b"x: y\n"),
        (b"GET", b"/", b"x: a\rb\r\n"),
        (b"GET", b"/", b"x y: z\r\n"),
        (b"GET", b"/", b" x: folded\r\n"),
        (b"GET", b"/", b"Content-Length: 5\r\n"),
        (b"GET", b"/", b"x: y\r\ntransfer-encoding: chunked\r\n"),
        (b"GET", b"/", b"HOST: other\r\n"),
    ],
)
async def test_nothing_can_be_smuggled_into_a_request(
    method: bytes, path: bytes, headers: bytes
) -> None:
    upstream = Upstream("http://127.0.0.1:1")
    with pytest.raises(ValueError, match="not "):
        upstream.send(method, path, b"", Heard(), headers)


@given(name=st.binary(max_size=8), value=st.binary(max_size=12))
def test_a_header_line_is_one_line_or_refused(name: bytes, value: bytes) -> None:
    given_line = b"%b:%b\r\n" % (name, value)
    try:
        line = _checked(given_line)
    except ValueError:
        return
    assert line.split(b"\r\n") == [name + b":" + value, b""]


@pytest.mark.parametrize(
    "url", ["ftp://x", "127.0.0.1:80", "http://", "http://u:p@x", "http://x/?q", "http://x y/"]
)
async def test_a_url_that_names_no_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        Upstream(url)


async def test_an_ipv6_literal_is_reached_and_named_in_brackets() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def handler(peer: Peer) -> None:
        seen.append(await peer.answer(SHORT))

    server = Server(handler)
    async with await asyncio.start_server(server.serve, "::1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with pool(f"http://[::1]:{port}") as upstream:
            assert (await ask(upstream)).body == b"hello"
    assert b"host: [::1]:%d\r\n" % port in seen[0][0]


async def test_https_goes_through_the_given_context() -> None:
    # Anonymous ciphers need no certificate.
    def context(side: int) -> ssl.SSLContext:
        made = ssl.SSLContext(side)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        made.set_ciphers("aNULL:@SECLEVEL=0")
        return made

    async with serving(saying(CHUNKED), ssl=context(ssl.PROTOCOL_TLS_SERVER)) as server:
        url = server.url.replace("http", "https")
        async with pool(url, ssl_context=context(ssl.PROTOCOL_TLS_CLIENT)) as upstream:
            assert (await ask(upstream)).body == b"hello, world"
            assert (await ask(upstream)).body == b"hello, world"
            assert (server.connections, upstream.idle) == (1, 1)


async def test_a_status_and_headers_are_there_from_the_head_on() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        heard = Heard()
        call = get(upstream, heard)
        assert (call.status, call.header(b"content-type")) == (0, None)
        await heard.over.wait()
        assert (call.status, call.header(b"content-type")) == (200, b"text/plain")
        assert call.header(b"x-none") is None


async def test_the_chunks_of_one_read_come_as_one_piece() -> None:
    async with serving(saying(CHUNKED)) as server, pool(server) as upstream:
        heard = await ask(upstream)
        assert heard.events == ["head", "body", "end"]
        assert heard.pieces == [b"hello, world"]


RECORDED = {
    "length": (SHORT, b"hello"),
    "chunked": (CHUNKED, b"hello, world"),
    "trailers": (CHUNKED[:-2] + b"x-a: 1\r\ncontent-type: evil\r\n\r\n", b"hello, world"),
    "one trailer": (CHUNKED[:-2] + b"content-type: evil\r\n\r\n", b"hello, world"),
    "interim": (b"HTTP/1.1 103 Hi\r\nlink: a\r\n\r\nHTTP/1.1 100 Go\r\n\r\n" + SHORT, b"hello"),
    "empty": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
    "204": (b"HTTP/1.1 204 No\r\n\r\n", b""),
    "304": (b"HTTP/1.1 304 No\r\ncontent-length: 9\r\n\r\n", b""),
}


@given(data=st.data(), name=st.sampled_from(sorted(RECORDED)))
def test_an_answer_reads_the_same_however_it_is_split(data: st.DataObject, name: str) -> None:
    recorded, body = RECORDED[name]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(recorded) - 1), max_size=8)))
    parts = [recorded[a:b] for a, b in zip([0, *cuts], [*cuts, len(recorded)], strict=True)]
    asyncio_run(reads_twice(parts, body))


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_an_answer_may_come_byte_by_byte(name: str) -> None:
    recorded, body = RECORDED[name]
    asyncio_run(reads_twice([bytes([byte]) for byte in recorded], body))


async def reads_twice(parts: list[bytes], body: bytes) -> None:
    async with serving(saying(*parts)) as server, pool(server) as upstream:
        for _ in range(2):
            heard = Heard()
            call = get(upstream, heard)
            await heard.over.wait()
            assert (heard.events[0], heard.events[-1], heard.body) == ("head", "end", body)
            assert heard.events.count("head") + heard.events.count("end") == 2
            assert call.header(b"content-type") in {None, b"text/plain"}
            assert call.header(b"link") is None
        assert (server.connections, upstream.idle) == (1, 1)


@pytest.mark.parametrize("coding", [b"", b"transfer-encoding: gzip\r\n"])
async def test_without_a_length_an_answer_ends_with_the_connection(coding: bytes) -> None:
    handler = saying_and_closing(b"HTTP/1.1 200 OK\r\n" + coding + b"\r\n", b"all ", b"of it")
    async with serving(handler) as server, pool(server) as upstream:
        heard = await ask(upstream)
        assert (heard.body, heard.events[-1]) == (b"all of it", "end")
        assert upstream.idle == 0


async def test_an_answer_without_a_length_does_not_end_well_with_a_reset() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        await peer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        peer.reset()

    async with serving(handler) as server, pool(server) as upstream:
        assert (await ask(upstream)).failure() == (Reason.CLOSED, False)


async def test_the_answer_to_head_has_no_body_and_ends_its_connection() -> None:
    async with serving(saying(SHORT[:-5])) as server, pool(server) as upstream:
        heard = await ask(upstream, b"HEAD")
        assert heard.events == ["head", "end"]
        assert (upstream.idle, (await ask(upstream, b"HEAD")).status) == (0, 200)


@pytest.mark.parametrize(
    "answer",
    [
        SHORT.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        SHORT.replace(b"1.1", b"1.0"),
    ],
)
async def test_a_server_that_wants_to_close_is_not_asked_again(answer: bytes) -> None:
    async with serving(saying(answer)) as server, pool(server) as upstream:
        assert (await ask(upstream)).body == b"hello"
        assert upstream.idle == 0
        assert (await ask(upstream)).body == b"hello"
        assert server.connections == 2


@pytest.mark.parametrize("surplus", [b"H", b"x", SHORT, b"HTTP/1.1 500 Oh\r\n\r\n"])
async def test_bytes_after_an_answer_reach_nobody(surplus: bytes) -> None:
    async with serving(saying(SHORT + surplus)) as server, pool(server) as upstream:
        for _ in range(2):
            heard = await ask(upstream)
            assert (heard.status, heard.events, heard.body) == (
                200,
                ["head", "body", "end"],
                b"hello",
            )
            assert upstream.idle == 0
        assert server.connections == 2


async def test_an_early_answer_is_told_and_its_connection_not_reused() -> None:
    async def handler(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await peer.gone()

    async with serving(handler, limit=1024) as server, pool(server) as upstream:
        heard = await ask(upstream, b"POST", b"x" * (32 << 20))
        assert (heard.status, heard.body, heard.events[-1]) == (413, b"no", "end")
        assert upstream.idle == 0


async def test_a_server_that_closes_without_reading_the_request_is_noticed() -> None:
    async def handler(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.write_eof()
        await asyncio.sleep(60)

    async with serving(handler, limit=1024) as server, pool(server) as upstream:
        heard = await ask(upstream, b"POST", b"x" * (32 << 20))
        assert heard.failure() == (Reason.CLOSED, True)
        assert asyncio.get_running_loop().time() < 1


async def test_a_large_request_and_a_large_answer_pass_whole() -> None:
    async def handler(peer: Peer) -> None:
        _, body = await peer.request()
        await peer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body), body)

    body = bytes(range(256)) * 32768
    async with serving(handler) as server, pool(server) as upstream:
        assert (await ask(upstream, b"POST", body)).body == body


@pytest.mark.parametrize(
    ("answer", "before_head"),
    [
        (b"", True),
        (b"HTTP/1.1 2", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n", True),
        (SHORT[:-1], False),
        (CHUNKED_HEAD, False),
        (CHUNKED_HEAD + b"5\r\nhel", False),
        (CHUNKED[:-2], False),
    ],
)
async def test_an_answer_cut_short_is_an_error(answer: bytes, before_head: bool) -> None:  # noqa: FBT001
    handler = saying_and_closing(answer)
    async with serving(handler) as server, pool(server) as upstream:
        heard = await ask(upstream)
        assert heard.failure() == (Reason.CLOSED, before_head)
        assert "end" not in heard.events
        assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "events"),
    [
        (b"SSH-2.0-OpenSSH\r\n", ["error"]),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", ["error"]),
        (b"HTTP/1.1 101 Hi\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", ["error"]),
        (CHUNKED_HEAD + b"2\r\nokgarbage", ["head", "body", "error"]),
        (CHUNKED_HEAD + b"zz\r\n", ["head", "error"]),
    ],
)
async def test_garbage_is_an_error_after_what_came_before_it(
    answer: bytes, events: list[str]
) -> None:
    async with serving(saying(answer)) as server, pool(server) as upstream:
        heard = await ask(upstream)
        assert heard.events == events
        assert heard.failure() == (Reason.PROTOCOL, events == ["error"])
        await turns()
        assert upstream.open == 0


async def test_a_refused_connection_is_an_error() -> None:
    async with serving(silent) as server:
        pass
    async with pool(server) as upstream:
        assert (await ask(upstream)).failure() == (Reason.CONNECT, True)


async def test_a_host_name_that_cannot_be_looked_up_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise UnicodeError("label too long")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", fail)
    async with pool("http://a.example") as upstream:
        assert (await ask(upstream)).failure() == (Reason.CONNECT, True)


async def test_a_listener_that_raises_ends_its_own_call_only() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    class Raising(Heard):
        def __init__(self, where: str) -> None:
            super().__init__()
            setattr(self, where, self.fail)

        def fail(self, *_: object) -> None:
            raise LookupError("a bug")

    async def one_then_the_other(peer: Peer) -> None:
        await peer.answer(CHUNKED_HEAD, b"1\r\na\r\n", b"1\r\nb\r\n0\r\n\r\n")
        await peer.gone()

    for where in ("on_head", "on_body", "on_end"):
        async with serving(one_then_the_other) as server, pool(server) as upstream:
            get(upstream, Raising(where))
            assert (await ask(upstream)).body == b"ab"
            await turns(50)
    async with serving(saying_and_closing(b"")) as server, pool(server) as upstream:
        get(upstream, Raising("on_error"))
        await turns(50)
    assert [type(context["exception"]) for context in reported] == [LookupError] * 4
