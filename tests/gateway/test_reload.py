"""What happens to requests when the gateway drains, reloads or is told to abort."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from backends.emulator import EmulatedFleet, FaultKind
from gateway.config import Key, Limits, Online, Policies
from policies.types import Pool, Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    PAIR,
    QUICK,
    TWO_PAIRS,
    Site,
    Told,
    chat,
    entry_of,
    generate,
    spec,
    standing,
)

ONE_AT_A_TIME = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, max_running=1))
STREAM = {"/generate": generate(200, stream=True), "/v1/chat/completions": chat(200, stream=True)}


def is_complete(told: Told) -> bool:
    return told.status == 200 and told.events[-1] == "[DONE]" and b'"error":{' not in told.raw


# Drain.


@pytest.mark.parametrize("path", STREAM)
async def test_a_drain_lets_running_streams_end_and_refuses_new_requests(path: str) -> None:
    async with standing() as site:
        async with site.meanwhile(site.ask(path, STREAM[path])) as answer:
            await site.until("it streams", lambda: site.core.ledgers["d1"].decodes)
            async with site.meanwhile(site.gateway.drain()) as drained:
                await asyncio.sleep(0)
                told = await site.ask(path, STREAM[path])
                assert (told.status, told.code) == (503, "gateway_draining")
                assert (await site.get("/readiness")).status == 503
                assert is_complete(await answer)
                await drained


async def test_what_still_runs_when_the_time_to_drain_is_over_is_cut_off() -> None:
    async with standing() as site:
        stream = site.ask("/v1/chat/completions", chat(3_000, stream=True))
        whole = site.ask("/v1/chat/completions", chat(3_000))
        async with site.meanwhile(stream) as streamed, site.meanwhile(whole) as answered:
            await site.until("both run", lambda: site.core.ledgers["d1"].decodes == 2)
            began_s = site.now_s()
            await site.gateway.drain()
            took_s = site.now_s() - began_s
            assert took_s == pytest.approx(QUICK.server.drain_s, abs=0.3)
            assert (await answered).code == "gateway_draining"
            assert "gateway_draining" in str((await streamed).events[-2])


async def test_queued_work_may_be_served_while_the_gateway_drains() -> None:
    async with standing(ONE_AT_A_TIME) as site:
        first = site.ask("/generate", generate(200))
        second = site.ask("/generate", generate(5), OFFLINE)
        async with site.meanwhile(first) as running, site.meanwhile(second) as waiting:
            await site.until("one waits", lambda: len(site.gateway.front) == 2)
            await site.gateway.drain()
            assert [(await running).status, (await waiting).status] == [200, 200]


# Reload.


async def test_a_reload_under_load_drops_no_request() -> None:
    async with standing(TWO_PAIRS, workers=["p1", "d1"]) as site:
        both = tuple(entry_of(site.fleet[name]) for name in ("p1", "d1", "p2", "d2"))
        others = tuple(entry_of(site.fleet[name]) for name in ("p2", "d2"))
        relaxed = tuple(replace(one, pool=Pool.RELAXED) for one in both)
        asked = [site.ask("/generate", generate(150, stream=True)) for _ in range(10)]
        asked += [site.ask("/v1/chat/completions", chat(150)) for _ in range(10)]
        async with site.meanwhile(asyncio.wait_for(asyncio.gather(*asked), 60)) as answers:
            for policies in (
                Policies(order="fcfs", place="round-robin"),
                Policies(order="edf", pools="none"),
            ):
                for workers in (both, relaxed, others, both):
                    site.gateway.adopt(replace(site.config, policies=policies, worker=workers))
                    await asyncio.sleep(0.05)
                    told = await site.ask("/generate", generate(2))
                    assert told.status == 200, told.raw
            assert {told.status for told in await answers} == {200}


async def test_queued_work_is_kept_in_the_new_order() -> None:
    async with standing(ONE_AT_A_TIME) as site:
        first = site.ask("/generate", generate(100))
        async with site.meanwhile(first):
            await site.until("it runs", lambda: len(site.sent) == 2)
            late = site.ask("/generate", generate(1, text="late"), {"x-slo-ttft-ms": "1900"})
            soon = site.ask("/generate", generate(1, text="soon"), {"x-slo-ttft-ms": "900"})
            async with site.meanwhile(late) as one, site.meanwhile(soon) as other:
                await site.until("they wait", lambda: len(site.gateway.front) == 3)
                site.gateway.adopt(replace(site.config, policies=Policies(order="fcfs")))
                assert {(await one).status, (await other).status} == {200}
        order = [sent.body["text"] for sent in site.sent_to("p1")[1:]]
        assert order == ["late", "soon"]


async def test_what_needs_a_restart_is_named_until_the_file_says_again_what_runs() -> None:
    async with standing() as site:
        moved = replace(site.config, server=replace(site.config.server, port=1, drain_s=1.0))
        other = replace(site.config, policies=Policies(order="fcfs"))
        with capture_logs() as told:
            assert site.gateway.adopt(moved) == []
            assert site.gateway.adopt(other) == ["policies.order"]
            assert site.gateway.adopt(site.config) == ["policies.order"]
        assert [(line["event"], line["keys"]) for line in told] == [
            ("[server] has changed: that needs a restart", ["server.port", "server.drain_s"])
        ]


async def test_a_setting_of_a_server_is_changed_without_a_moment_of_its_absence() -> None:
    async with standing() as site:
        changed = tuple(replace(one, pool=Pool.RELAXED) for one in site.config.worker)
        site.gateway.adopt(replace(site.config, worker=changed))
        assert (await site.ask("/generate", generate())).status == 200
        await site.until(
            "it is known", lambda: site.core.ledgers["d1"].worker.pool is Pool.RELAXED, 1.0
        )


async def test_new_limits_keys_and_targets_hold_for_the_next_request() -> None:
    async with standing() as site:
        classes = replace(site.config.classes, online=Online(ttft_ms=50.0, patience=1.0))
        site.gateway.adopt(
            replace(
                site.config,
                limits=Limits(max_tokens=10),
                key=(Key(key="secret", tenant="a"),),
                classes=classes,
            )
        )
        assert (await site.ask("/generate", generate(5))).code == "unauthorized"
        allowed = {"authorization": "Bearer secret"}
        assert (await site.ask("/generate", generate(11), allowed)).code == "invalid_request"
        assert (await site.ask("/generate", generate(5), allowed)).status == 200


CONFIG = """
[server]
port = 0
[policies]
place = "{place}"
{workers}
"""


@pytest.mark.real_time
async def test_a_process_reloads_and_drains_while_a_stream_runs(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    async with EmulatedFleet(PAIR) as fleet, aiohttp.ClientSession() as http:

        def write(place: str) -> None:
            path.write_text(CONFIG.format(place=place, workers=fleet.toml()))

        write("least-work")
        command = (sys.executable, "-m", "gateway", "serve", "--config", str(path))
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        try:
            listening = await said(process, "listening")
            url = f"http://127.0.0.1:{listening['port']}/v1/chat/completions"
            async with http.post(url, json=chat(450, stream=True)) as response:
                write("no-such-policy")
                process.send_signal(signal.SIGHUP)
                refused = await said(process, "the new configuration is refused")
                assert "policies.place must be one of" in refused["error"]
                write("round-robin")
                await said(process, "configuration reloaded")
                process.send_signal(signal.SIGTERM)
                await said(process, "draining")
                async with http.post(url, json=chat(5)) as late:
                    assert late.status == 503
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            assert await asyncio.wait_for(process.wait(), 5) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def said(process: asyncio.subprocess.Process, start: str) -> dict[str, Any]:
    """The next line of its log that begins like this."""
    assert process.stderr is not None
    async with asyncio.timeout(10):
        while line := await process.stderr.readline():
            told: dict[str, Any] = json.loads(line)
            if str(told["event"]).startswith(start):
                return told
    raise AssertionError(f"it ended without {start!r}")


# Abort by a client's own id.


async def abort(site: Site, rid: str, headers: dict[str, str] | None = None) -> Told:
    return await site.ask("/abort_request", {"rid": rid}, headers)


@pytest.mark.parametrize("path", STREAM)
async def test_a_running_stream_that_is_aborted_ends_in_its_servers_words(path: str) -> None:
    async with standing() as site:
        async with site.meanwhile(site.ask(path, {**STREAM[path], "rid": "mine"})) as answer:
            await site.until("it streams", lambda: site.core.ledgers["d1"].context_tokens > 30)
            assert (await abort(site, "mine")).status == 200
            told = await answer
        assert told.events[-1] == "[DONE]"
        assert "abort" in str(told.events[-2])
        assert told.took_s < 1.0
        (line,) = site.lines
        assert (line["rid"], line["outcome"]) == ("mine", "request_cancelled")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_request_aborted_in_its_prefill_is_over_and_not_tried_again(
    *, stream: bool
) -> None:
    async with standing(TWO_PAIRS) as site:
        site.hurt("p1", FaultKind.SLOW, factor=200.0)
        asking = site.ask("/v1/chat/completions", chat(20, stream=stream, rid="mine"))
        async with site.meanwhile(asking) as answer:
            await site.until("its prompt is computed", lambda: len(site.sent) == 2)
            await abort(site, "mine")
            told = await answer
        assert told.status == 499 or "abort" in str(told.raw)
        assert told.took_s < 1.0
        assert len(site.sent) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_request_aborted_in_the_queue_is_told_so_and_never_sent(*, stream: bool) -> None:
    async with standing(ONE_AT_A_TIME) as site:
        async with site.meanwhile(site.ask("/generate", generate(100))) as running:
            await site.until("one runs", lambda: len(site.sent) == 2)
            asking = site.ask("/generate", generate(5, stream=stream, rid="mine"))
            async with site.meanwhile(asking) as waiting:
                await site.until("another waits", lambda: len(site.gateway.front) == 2)
                await abort(site, "mine")
                told = await waiting
            assert (told.status, told.code) == (499, "request_cancelled")
            assert (await running).status == 200
        assert len(site.sent) == 2


async def test_an_abort_ends_the_samples_that_wait_as_well_as_those_that_run() -> None:
    async with standing(ONE_AT_A_TIME) as site:
        asking = site.ask("/v1/chat/completions", chat(300, n=3, rid="mine"))
        async with site.meanwhile(asking) as answer:
            await site.until("one runs", lambda: len(site.sent) == 2)
            await abort(site, "mine")
            assert (await answer).code == "request_cancelled"
        assert len(site.sent) == 2


async def test_nobody_aborts_the_requests_of_others() -> None:
    keys = (Key(key="a", tenant="one"), Key(key="b", tenant="two"))
    async with standing(key=keys) as site:
        mine, other = ({"authorization": f"Bearer {key}"} for key in ("a", "b"))
        asking = site.ask("/generate", generate(100, rid="mine"), mine)
        async with site.meanwhile(asking) as answer:
            await site.until("it runs", lambda: len(site.sent) == 2)
            assert (await abort(site, "mine", other)).status == 200
            assert (await site.ask("/abort_request", {"abort_all": True}, other)).status == 400
            told = await answer
        assert told.body["meta_info"]["finish_reason"]["type"] == "length"


async def test_a_rid_names_one_request_at_a_time() -> None:
    async with standing() as site:
        asking = site.ask("/generate", generate(50, rid="mine"))
        async with site.meanwhile(asking) as answer:
            await site.until("it runs", lambda: len(site.sent) == 2)
            second = await site.ask("/generate", generate(5, rid="mine"))
            assert (second.status, second.code) == (400, "duplicate_rid")
            assert (await answer).status == 200
        assert (await site.ask("/generate", generate(5, rid="mine"))).status == 200


async def test_a_server_that_is_taken_off_the_list_keeps_no_socket() -> None:
    async with standing(TWO_PAIRS) as site:
        await site.serves()
        servers = {server.name: server for server in site.gateway.backend.servers()}
        gone = servers["d2"].upstream
        open_before = gone.open
        site.gateway.adopt(replace(site.config, worker=site.config.worker[:2]))
        await site.until("its sockets are closed", lambda: not gone.open)
        assert open_before > 0
