from __future__ import annotations

import asyncio
from typing import Any

import pytest

from backends.fetch import Answer, fetch
from backends.http import Call, HttpError, Reason
from tests.backends.http_peers import (
    CHUNKED,
    CHUNKED_HEAD,
    SHORT,
    Handler,
    Heard,
    Peer,
    ask,
    get,
    pool,
    saying,
    saying_and_closing,
    serving,
    silent,
    turns,
    until,
)
from tests.virtual_loop import VirtualTimeLoop


@pytest.fixture
def never_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(VirtualTimeLoop, "create_connection", hang)


@pytest.mark.usefixtures("never_connects")
async def test_a_connection_that_does_not_come_about_is_an_error_in_time() -> None:
    async with pool("http://127.0.0.1:1", connect_timeout_s=3.0) as upstream:
        assert (await ask(upstream)).failure() == (Reason.CONNECT_TIMEOUT, True)
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)


async def test_the_connection_used_last_is_used_next() -> None:
    def numbered(number: bytes) -> Handler:
        return saying(SHORT.replace(b"hello", b"from" + number))

    async with serving(numbered(b"1"), numbered(b"2")) as server, pool(server) as upstream:
        first, second = Heard(), Heard()
        get(upstream, first)
        get(upstream, second)
        await first.over.wait()
        await second.over.wait()
        assert (upstream.open, upstream.idle) == (2, 2)
        latest = {(await ask(upstream)).body for _ in range(3)}
        assert latest <= {first.body, second.body}
        assert (len(latest), server.connections) == (1, 2)


async def test_a_listener_may_ask_again_on_the_same_connection() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        second = Heard()

        class Asking(Heard):
            def on_end(self) -> None:
                get(upstream, second)

        get(upstream, Asking())
        await second.over.wait()
        assert (second.body, server.connections) == (b"hello", 1)


async def test_idle_connections_close_when_their_time_is_up() -> None:
    async with serving(saying(SHORT)) as server, pool(server, idle_s=4.0) as upstream:
        first, second = Heard(), Heard()
        get(upstream, first)
        get(upstream, second)
        await asyncio.gather(first.over.wait(), second.over.wait())
        await asyncio.sleep(3.0)
        await ask(upstream)
        await asyncio.sleep(1.5)
        assert (upstream.open, upstream.idle) == (1, 1)
        await asyncio.sleep(3.0)
        assert (upstream.open, upstream.idle) == (0, 0)


async def test_an_old_connection_is_not_used_though_the_sweep_is_late() -> None:
    async with serving(saying(SHORT)) as server, pool(server, idle_s=4.0) as upstream:
        await ask(upstream)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.advance(4.5)
        assert (await ask(upstream)).body == b"hello"
        assert server.connections == 2


async def test_no_more_than_max_idle_connections_wait() -> None:
    async with serving(saying(SHORT)) as server, pool(server, max_idle=2) as upstream:
        listeners = [Heard() for _ in range(5)]
        for heard in listeners:
            get(upstream, heard)
        for heard in listeners:
            await heard.over.wait()
        await turns()
        assert (upstream.open, upstream.idle) == (2, 2)


@pytest.mark.parametrize("how", ["eof", "reset", "bytes"])
async def test_an_idle_connection_that_stirs_is_closed(how: str) -> None:
    async def handler(peer: Peer) -> None:
        await peer.answer(SHORT)
        await asyncio.sleep(1)
        if how == "bytes":
            await peer.write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            await peer.gone()
        elif how == "reset":
            peer.reset()

    async with serving(handler) as server, pool(server) as upstream:
        await ask(upstream)
        assert upstream.idle == 1
        await asyncio.sleep(1.5)
        assert (upstream.open, upstream.idle) == (0, 0)


async def closes_on_the_second(peer: Peer) -> None:
    await peer.answer(SHORT)
    await peer.request()


async def test_a_request_on_a_stale_connection_is_sent_again_once() -> None:
    async with serving(closes_on_the_second, saying(CHUNKED)) as server, pool(server) as upstream:
        await ask(upstream)
        heard = await ask(upstream, b"POST", b"{}")
        assert (heard.events, heard.body) == (["head", "body", "end"], b"hello, world")
        assert server.connections == 2


async def test_a_request_is_not_sent_a_third_time() -> None:
    async with serving(closes_on_the_second, saying_and_closing(b"")) as server:
        async with pool(server) as upstream:
            await ask(upstream)
            assert (await ask(upstream)).failure() == (Reason.CLOSED, True)
            assert server.connections == 2


async def test_a_request_is_not_sent_again_once_an_answer_has_begun() -> None:
    async def handler(peer: Peer) -> None:
        await peer.answer(SHORT)
        await peer.answer(b"H")

    async with serving(handler) as server, pool(server) as upstream:
        await ask(upstream)
        assert (await ask(upstream)).failure() == (Reason.CLOSED, True)
        assert server.connections == 1


async def test_a_request_that_the_server_may_have_worked_on_is_not_sent_again() -> None:
    async def handler(peer: Peer) -> None:
        await peer.answer(SHORT)
        await peer.request()
        await asyncio.sleep(30)

    async with serving(handler) as server, pool(server) as upstream:
        await ask(upstream)
        assert (await ask(upstream)).failure() == (Reason.CLOSED, True)
        assert server.connections == 1


@pytest.mark.usefixtures("never_connects")
async def test_cancelling_abandons_a_connect() -> None:
    async with pool("http://127.0.0.1:1") as upstream:
        heard = Heard()
        call = get(upstream, heard)
        await turns()
        call.cancel()
        call.cancel()
        await asyncio.sleep(10)
        assert heard.events == []


async def test_cancelling_before_the_first_turn_is_heard_by_nobody() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        heard = Heard()
        get(upstream, heard).cancel()
        await turns(50)
        assert (heard.events, upstream.open) == ([], 0)


@pytest.mark.parametrize("turn", range(20))
async def test_cancelling_at_any_turn_is_final_and_leaves_no_busy_socket(turn: int) -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        heard = Heard()
        call = get(upstream, heard)
        await turns(turn)
        call.cancel()
        before = list(heard.events)
        await turns(50)
        assert heard.events == before
        assert upstream.open == upstream.idle


@pytest.mark.parametrize("said", [b"", CHUNKED_HEAD, CHUNKED_HEAD + b"1\r\na\r\n"])
async def test_cancelling_closes_the_socket_at_once(said: bytes) -> None:
    noticed = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.answer(said)
        if await peer.gone():
            noticed.set()

    async with serving(handler) as server, pool(server) as upstream:
        heard = Heard()
        call = get(upstream, heard)
        await turns(50)
        before = list(heard.events)
        call.cancel()
        await noticed.wait()
        call.cancel()
        assert (heard.events, upstream.open) == (before, 0)


@pytest.mark.parametrize("where", ["on_head", "on_body"])
async def test_cancelling_inside_a_callback_is_the_last_that_is_heard(where: str) -> None:
    async with serving(saying(CHUNKED)) as server, pool(server) as upstream:
        heard = Heard()
        plain = getattr(heard, where)
        calls: list[Call] = []

        def cancelling(argument: Any) -> None:
            plain(argument)
            calls[0].cancel()

        setattr(heard, where, cancelling)
        calls.append(get(upstream, heard))
        await turns(50)
        assert heard.events[-1] == where.removeprefix("on_")
        assert (upstream.open, upstream.idle) == (0, 0)


async def test_cancelling_after_the_end_leaves_the_connection_to_the_next() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        heard = Heard()
        call = get(upstream, heard)
        await heard.over.wait()
        second = Heard()
        get(upstream, second)
        call.cancel()
        await second.over.wait()
        assert (second.events[-1], server.connections) == ("end", 1)


async def test_a_paused_call_reads_nothing_and_the_server_feels_it() -> None:
    total = 64 << 20
    sent = 0

    async def handler(peer: Peer) -> None:
        nonlocal sent
        await peer.answer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        while sent < total:
            peer.writer.write(b"x" * 65536)
            await peer.writer.drain()
            sent += 65536
        await peer.gone()

    async with serving(handler) as server, pool(server) as upstream:
        heard = Heard()
        call = get(upstream, heard)
        await until(lambda: bool(heard.pieces))
        call.pause()
        call.pause()
        await asyncio.sleep(1)
        held = len(heard.body)
        await asyncio.sleep(1)
        assert len(heard.body) == held
        assert sent < total
        call.resume()
        await heard.over.wait()
        assert len(heard.body) == total


async def test_a_pause_before_the_connection_stands_is_kept() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        heard = Heard()
        call = get(upstream, heard)
        call.pause()
        await asyncio.sleep(1)
        assert heard.events == []
        call.resume()
        await heard.over.wait()
        assert heard.body == b"hello"


async def test_a_call_paused_to_its_end_leaves_a_connection_that_reads() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        calls: list[Call] = []

        class Pausing(Heard):
            def on_head(self, status: int) -> None:
                calls[0].pause()

        heard = Pausing()
        calls.append(get(upstream, heard))
        await heard.over.wait()
        assert ((await ask(upstream)).body, server.connections) == (b"hello", 1)


async def test_closing_fails_every_call_and_leaves_no_socket() -> None:
    async def handler(peer: Peer) -> None:
        await peer.answer(SHORT)
        await peer.gone()

    async with serving(handler, silent) as server, pool(server) as upstream:
        reused, fresh, connecting, late = Heard(), Heard(), Heard(), Heard()
        await ask(upstream)
        get(upstream, reused)
        get(upstream, fresh)
        await turns(50)
        get(upstream, connecting)
        upstream.close()
        get(upstream, late)
        for heard in (reused, fresh, connecting, late):
            await heard.over.wait()
            assert heard.failure() == (Reason.CLOSED, True)
        assert server.connections == 2


async def test_fetch_gives_the_whole_answer() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        answer = await fetch(upstream, b"GET", b"/", timeout_s=1)
        assert answer == Answer(200, b"hello", "text/plain")


async def test_fetch_raises_what_went_wrong() -> None:
    async with serving(saying_and_closing(b"")) as server, pool(server) as upstream:
        with pytest.raises(HttpError) as caught:
            await fetch(upstream, b"GET", b"/", timeout_s=1)
        assert caught.value.reason is Reason.CLOSED


async def test_fetch_gives_up_in_time_and_closes_the_socket() -> None:
    async with serving(silent) as server, pool(server) as upstream:
        with pytest.raises(HttpError) as caught:
            await fetch(upstream, b"GET", b"/", timeout_s=2.0)
        await turns()
        assert (caught.value.reason, upstream.open) == (Reason.TIMEOUT, 0)
        assert asyncio.get_running_loop().time() == pytest.approx(2.0)


async def test_fetch_refuses_an_answer_that_is_too_long() -> None:
    async with serving(saying(CHUNKED_HEAD, CHUNKED.removeprefix(CHUNKED_HEAD))) as server:
        async with pool(server) as upstream:
            with pytest.raises(HttpError) as caught:
                await fetch(upstream, b"GET", b"/", timeout_s=1, max_bytes=11)
            assert caught.value.reason is Reason.TOO_LARGE
            assert (await fetch(upstream, b"GET", b"/", timeout_s=1, max_bytes=12)).status == 200


@pytest.mark.real_time
async def test_the_live_loop_asks_reuses_pauses_and_cancels() -> None:
    async def handler(peer: Peer) -> None:
        await peer.answer(SHORT)
        await peer.answer(CHUNKED_HEAD, b"1\r\na\r\n")
        await peer.gone()

    async with serving(handler) as server, pool(server) as upstream:
        assert (await ask(upstream)).body == b"hello"
        second = Heard()
        call = get(upstream, second)
        await until(lambda: bool(second.pieces))
        for change in (call.pause, call.pause, call.resume, call.resume, call.cancel, call.cancel):
            change()
        await until(lambda: upstream.open == 0)
        assert (second.events, server.connections) == (["head", "body"], 1)


async def test_a_retired_pool_keeps_no_connection_beyond_its_call() -> None:
    async with serving(saying(SHORT)) as server, pool(server) as upstream:
        await ask(upstream)
        idle_before = upstream.idle
        running = Heard()
        get(upstream, Heard())
        get(upstream, running)
        upstream.retire()
        await running.over.wait()
        await until(lambda: not upstream.open)
        assert (idle_before, running.body) == (1, b"hello")
