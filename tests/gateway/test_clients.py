from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from backends.trouble import Blame, Trouble
from gateway.clients import HIGH_WATER_BYTES, LOW_WATER_BYTES, StreamClient, UnaryClient, api_error
from gateway.errors import ApiError, Code, Dialect
from policies.events import Fail, Fault, Reason, Reject
from policies.types import Job
from tests.gateway.talk import offline, online

JOB = online("a")
FELL = Trouble(status=500, message="it fell over", retryable=True, blames=Blame.DECODE)
BAD = Trouble(status=422, message="no such thing", retryable=False, blames=Blame.REQUEST)
ABORTED = Trouble(status=499, message="Aborted", retryable=False, blames=Blame.ABORTED)


class Socket(asyncio.Transport):
    """A socket whose other end reads when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.unread_bytes = 0
        self.state = "open"

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        self.sent += data
        self.unread_bytes += len(data)

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def is_closing(self) -> bool:
        return self.state != "open"

    def abort(self) -> None:
        self.state = "aborted"


async def stream(
    *, chunked: bool = True, dialect: Dialect = Dialect.CHAT
) -> tuple[StreamClient, Socket]:
    socket, loop = Socket(), asyncio.get_running_loop()
    client = StreamClient(loop, socket, lambda: b"HEAD\r\n", dialect=dialect, chunked=chunked)
    return client, socket


async def test_a_stream_is_a_head_chunks_and_a_last_chunk() -> None:
    client, socket = await stream()
    client.begin()
    assert socket.sent == b""
    client.write(b"data: 1\n\n")
    client.write(b"data: 2\n\n")
    client.end()
    assert socket.sent == (b"HEAD\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n")
    assert client.over.done()


async def test_an_older_client_gets_the_bytes_as_they_are() -> None:
    client, socket = await stream(chunked=False)
    client.begin()
    client.write(b"data: 1\n\n")
    client.end()
    assert socket.sent == b"HEAD\r\ndata: 1\n\n"


async def test_a_client_that_does_not_read_is_waited_for() -> None:
    client, socket = await stream()
    client.begin()
    assert client.write(b"x") is False
    assert client.write(b"x" * HIGH_WATER_BYTES) is True
    assert not client.has_room()
    socket.unread_bytes = LOW_WATER_BYTES - 1
    assert client.has_room()


async def test_nothing_is_written_to_a_closed_socket() -> None:
    client, socket = await stream()
    client.begin()
    client.drop()
    assert client.write(b"data: 1\n\n") is False
    client.end()
    assert (socket.state, socket.sent) == ("aborted", b"")


async def test_a_refusal_before_the_first_byte_is_left_to_the_front() -> None:
    client, socket = await stream()
    client.refused(Reject(JOB, Reason.QUEUE_FULL), None)
    assert socket.sent == b""
    assert client.error is not None
    assert client.error.code is Code.QUEUE_FULL


@pytest.mark.parametrize("dialect", list(Dialect))
async def test_a_failure_after_the_first_byte_is_the_last_event(dialect: Dialect) -> None:
    client, socket = await stream(dialect=dialect)
    client.begin()
    client.write(b"data: 1\n\n")
    client.refused(Fail(JOB, Reason.ATTEMPTS, Fault.DIED), FELL)
    assert b"it fell over" in socket.sent
    assert socket.sent.endswith(b"\r\n0\r\n\r\n")


async def test_a_stream_ends_once() -> None:
    client, socket = await stream()
    client.begin()
    client.end()
    sent = socket.sent
    client.ended(ApiError(Code.GATEWAY_DRAINING, "too late"))
    assert (socket.sent, client.error) == (sent, None)


async def test_nothing_follows_the_end_of_a_stream_on_its_connection() -> None:
    client, socket = await stream()
    client.begin()
    client.ended(ApiError(Code.GATEWAY_DRAINING, "the gateway is shutting down"))
    sent = socket.sent
    assert client.write(b"data: late\n\n") is False
    client.end()
    assert socket.sent == sent


async def test_a_whole_answer_is_kept_for_the_front() -> None:
    client = UnaryClient(asyncio.get_running_loop())
    client.answer(200, "application/json", b"{}")
    await client.over
    assert (client.status, client.body, client.error) == (200, b"{}", None)


async def test_a_whole_answer_and_a_stream_are_not_mixed_up() -> None:
    unary, (streamed, _) = UnaryClient(asyncio.get_running_loop()), await stream()
    for wrong in (unary.begin, unary.end, lambda: unary.write(b"")):
        with pytest.raises(RuntimeError, match="a whole answer"):
            wrong()
    with pytest.raises(RuntimeError, match="a stream was asked for"):
        streamed.answer(200, "", b"")


REJECTIONS = [
    (Reason.QUEUE_FULL, Code.QUEUE_FULL),
    (Reason.HOPELESS, Code.DEADLINE_HOPELESS),
    (Reason.EXPIRED, Code.DEADLINE_PASSED),
    (Reason.NO_WORKER, Code.NO_WORKER),
    (Reason.NO_RELAXED, Code.NO_WORKER),
    (Reason.UNAVAILABLE, Code.WORKERS_UNAVAILABLE),
]


@pytest.mark.parametrize(("reason", "code"), REJECTIONS)
@pytest.mark.parametrize(("after_us", "after_s"), [(0, 1), (1_000_000, 1), (1_000_001, 2)])
def test_every_rejection_has_its_code_and_a_time_to_come_back(
    reason: Reason, code: Code, after_us: int, after_s: int
) -> None:
    error = api_error(Reject(JOB, reason, after_us), None, begun=False)
    assert (error.code, error.retry_after_s) == (code, after_s)


@pytest.mark.parametrize(
    ("job", "reason", "option"),
    [
        (offline("a"), Reason.EXPIRED, "classes.offline.window_s"),
        (offline("a"), Reason.NO_RELAXED, 'colocation.without_relaxed is "reject"'),
    ],
)
def test_a_refusal_that_an_option_is_behind_names_it(job: Job, reason: Reason, option: str) -> None:
    assert option in api_error(Reject(job, reason), None, begun=False).message


def test_an_online_request_that_waited_too_long_hears_nothing_of_the_offline_window() -> None:
    error = api_error(Reject(JOB, Reason.EXPIRED), None, begun=False)
    assert error.message == "no server was free in time"


def test_a_prompt_that_is_too_large_is_not_asked_to_come_back() -> None:
    error = api_error(Reject(JOB, Reason.TOO_LARGE, 1), None, begun=False)
    assert (error.code, error.retry_after_s) == (Code.CONTEXT_LENGTH_EXCEEDED, None)


@pytest.mark.parametrize(
    ("fault", "trouble", "begun", "code"),
    [
        (Fault.REQUEST, BAD, False, Code.UPSTREAM_REJECTED),
        (Fault.REQUEST, ABORTED, False, Code.REQUEST_CANCELLED),
        (Fault.TIMEOUT, FELL, False, Code.UPSTREAM_TIMEOUT),
        (Fault.BUSY, FELL, False, Code.UPSTREAM_OVERLOADED),
        (Fault.UNREACHABLE, None, False, Code.UPSTREAM_FAILED),
        (Fault.ENGINE, FELL, False, Code.UPSTREAM_FAILED),
        (Fault.DIED, FELL, True, Code.STREAM_INTERRUPTED),
    ],
)
def test_every_failure_has_its_code(
    fault: Fault,
    trouble: Trouble | None,
    begun: bool,  # noqa: FBT001  # parametrized
    code: Code,
) -> None:
    assert api_error(Fail(JOB, Reason.ATTEMPTS, fault), trouble, begun=begun).code is code


def test_a_server_that_finds_a_prompt_too_long_says_it_by_the_code_that_clients_know() -> None:
    words = "The input (9 tokens) is longer than the model's context length (8 tokens)."
    trouble = replace(BAD, status=400, message=words)
    error = api_error(Fail(JOB, Reason.BAD_REQUEST, Fault.REQUEST), trouble, begun=False)
    assert (error.status, error.code) == (400, Code.CONTEXT_LENGTH_EXCEEDED)
    assert str(error) == words


def test_a_servers_own_refusal_keeps_its_status_and_words() -> None:
    error = api_error(Fail(JOB, Reason.BAD_REQUEST, Fault.REQUEST), BAD, begun=False)
    assert (error.status, str(error)) == (422, "no such thing")
