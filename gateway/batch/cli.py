"""`slackwater batch`: files of requests to a running gateway and back, with a progress bar."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop
from rich.console import Console
from rich.markup import escape

from backends.pause import pause
from gateway.batch import board
from gateway.batch.client import BatchClient, BatchError
from gateway.clock import LiveClock
from gateway.settings import ConfigError
from policies.clock import Clock

_URL: Final = "http://127.0.0.1:30000"
_POLL_S: Final = 1.0
_PATIENCE_POLLS: Final = 30
"""A gateway that restarts is waited for."""
_OVER: Final = frozenset({"completed", "failed", "expired", "cancelled"})
_HEAD_BYTES: Final = 1 << 20
_PAGE: Final = 100

_EPILOG: Final = """\
A file has one request a line, as OpenAI's Batch API takes them:

  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
   "body": {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}}

  slackwater batch submit requests.jsonl --watch     submit it and see it run
  slackwater batch download batch_0123               its answers, and its errors
  slackwater batch list                              what there is

Exit codes: 0 all is well; 1 the batch has ended otherwise than completed, or rows have failed;
2 the gateway refuses or is not there; 130 interrupted (the batch runs on).
SLACKWATER_URL and SLACKWATER_API_KEY stand for --url and --api-key.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", default=os.environ.get("SLACKWATER_URL", _URL), help=f"of the gateway ({_URL})"
    )
    common.add_argument("--api-key", default=os.environ.get("SLACKWATER_API_KEY", ""))
    common.add_argument("--json", action="store_true", help="print JSON, one object a line")
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    submit = add("submit", "upload a file and start a batch of its lines")
    submit.add_argument("file", type=Path, metavar="FILE")
    submit.add_argument("--endpoint", help="such as /v1/completions (that of the first line)")
    submit.add_argument("--window", default="24h", help="it is to end within this time (24h)")
    submit.add_argument(
        "--metadata", action="append", default=[], metavar="KEY=VALUE", help="may be repeated"
    )
    submit.add_argument("--watch", action="store_true", help="stay until it has ended")
    for name, text in (
        ("status", "how far a batch has come"),
        ("watch", "a progress bar until the batch has ended"),
        ("cancel", "stop a batch; what is done is kept"),
    ):
        add(name, text).add_argument("batch", metavar="ID")
    download = add("download", "the answers of a batch, and its errors")
    download.add_argument("batch", metavar="ID")
    download.add_argument("-o", "--output", metavar="FILE", help="- is standard output (ID.jsonl)")
    download.add_argument("--errors", metavar="FILE", help="(ID.errors.jsonl)")
    download.add_argument("--force", action="store_true", help="write over files that are there")
    add("list", "all batches, newest first").add_argument("--limit", type=int, default=20)


def run_batch(given: argparse.Namespace) -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            clock = LiveClock(runner.get_loop())
            return runner.run(_run(given, clock))
    except BatchError as error:
        raise ConfigError(str(error)) from error


async def _run(given: argparse.Namespace, clock: Clock) -> int:
    async with BatchClient.connected(given.url, given.api_key) as client:
        return await _ACTIONS[given.action](given, client, clock)


# What can be done.


async def _submit(given: argparse.Namespace, client: BatchClient, clock: Clock) -> int:
    metadata = _metadata(given.metadata)
    endpoint = given.endpoint or _endpoint_in(given.file)
    with board.transfer(given.file.name, given.file.stat().st_size, _told()) as advance:
        file = await client.upload(given.file, advance)
    try:
        batch = await client.create(file["id"], endpoint, given.window, metadata)
    except BatchError:
        with suppress(BatchError):  # in use, if the batch was made all the same
            await client.delete(file["id"])
        raise
    _say(given, batch, f"{batch['id']} is submitted: {given.file.name}, {file['bytes']:,} bytes")
    return await _follow(given, client, batch, clock) if given.watch else 0


async def _status(given: argparse.Namespace, client: BatchClient, clock: Clock) -> int:
    batch = await client.batch(given.batch)
    if given.json:
        _print_json(batch)
    else:
        board.show(batch)
    return 0


async def _watch(given: argparse.Namespace, client: BatchClient, clock: Clock) -> int:
    return await _follow(given, client, await client.batch(given.batch), clock)


async def _cancel(given: argparse.Namespace, client: BatchClient, clock: Clock) -> int:
    batch = await client.cancel(given.batch)
    _say(given, batch, f"{batch['id']} is {batch['status']}")
    return 0


async def _download(given: argparse.Namespace, client: BatchClient, clock: Clock) -> int:
    batch = await client.batch(given.batch)
    wanted = [
        (batch.get("output_file_id"), given.output or f"{given.batch}.jsonl"),
        (batch.get("error_file_id"), given.errors or f"{given.batch}.errors.jsonl"),
    ]
    files = [(file_id, name) for file_id, name in wanted if file_id]
    if not files:
        raise BatchError(f"{given.batch} is {batch['status']}: it has no files")
    for file_id, name in files:
        with _written(name, force=given.force) as write, board.transfer(name, None, _told()) as on:
            await client.download(file_id, write, on)
        if not given.json and name != "-":
            _console().print(escape(name))
    if given.json and (names := [name for _, name in files if name != "-"]):
        _print_json({"batch": given.batch, "files": names})
    return 0


async def _list(given: argparse.Namespace, client: BatchClient, clock: Clock) -> int:
    found, after = list[dict[str, Any]](), None
    while len(found) < given.limit:
        page = await client.page(min(_PAGE, given.limit - len(found)), after)
        found += page["data"]
        after = page.get("last_id")
        if not page["has_more"] or not after:
            break
    if given.json:
        for batch in found:
            _print_json(batch)
    else:
        board.show_all(found)
    return 0


Action = Callable[[argparse.Namespace, BatchClient, Clock], Coroutine[Any, Any, int]]
_ACTIONS: Final[dict[str, Action]] = {
    "submit": _submit,
    "status": _status,
    "watch": _watch,
    "cancel": _cancel,
    "download": _download,
    "list": _list,
}


async def _follow(
    given: argparse.Namespace, client: BatchClient, batch: dict[str, Any], clock: Clock
) -> int:
    """A gateway that is away for a while is waited for: the batch is not lost with it."""
    failures = 0
    with board.watching(_told(), quiet=given.json) as show:
        show(batch)
        while batch["status"] not in _OVER:
            await pause(clock, _POLL_S)
            try:
                batch, failures = await client.batch(batch["id"]), 0
            except BatchError:
                failures += 1
                if failures > _PATIENCE_POLLS:
                    raise
            show(batch)
    if given.json:
        _print_json(batch)
    else:
        board.show(batch)
    failed = batch["request_counts"]["failed"]
    return 0 if batch["status"] == "completed" and not failed else 1


# Small things.


def _metadata(given: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    if wrong := [key for key, equals, _ in pairs if not equals or not key]:
        raise ConfigError(f"--metadata takes KEY=VALUE, got {wrong[0]!r}")
    return {key: value for key, _, value in pairs}


def _endpoint_in(path: Path) -> str:
    """All lines of a batch name the same one."""
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"")[:_HEAD_BYTES]
    try:
        return str(orjson.loads(line)["url"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        # The gateway says what is wrong with the line; it only has to be asked.
        found = re.search(rb'"url"\s*:\s*"([^"]+)"', line)
        return found[1].decode(errors="replace") if found else "/v1/chat/completions"


@contextmanager
def _written(name: str, *, force: bool) -> Iterator[Callable[[bytes], object]]:
    """All of a file or nothing of it."""
    if name == "-":
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    path, part = Path(name), Path(f"{name}.part")
    if path.exists() and not force:
        raise ConfigError(f"{name} is there already: --force writes over it")
    try:
        with part.open("wb") as file:
            yield file.write
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _console() -> Console:
    return Console(emoji=False, highlight=False, soft_wrap=True)


def _told() -> Console:
    """Bars are not part of the output."""
    return Console(stderr=True, emoji=False)


def _say(given: argparse.Namespace, batch: dict[str, Any], words: str) -> None:
    if given.json:
        _print_json(batch)
    else:
        _console().print(escape(words))


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(orjson.dumps(value).decode() + "\n")
    sys.stdout.flush()
