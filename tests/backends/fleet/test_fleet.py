"""Real processes with a scripted server in SGLang's place: what is started is ended."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

import aiohttp
import pytest

from backends.fleet import interpreter, memory
from backends.fleet.command import add_arguments, run_fleet
from backends.fleet.fleet import Fleet, how_it_ended, last_lines
from backends.fleet.models import Shape
from backends.fleet.plan import Server
from backends.fleet.spec import FleetError, FleetSpec, Group
from policies.types import Role

pytestmark = pytest.mark.real_time

PROGRAM = (str(Path(__file__).with_name("scripted_server.py")),)
PAIR = (Group(role=Role.PREFILL), Group(role=Role.DECODE))


def model(folder: Path) -> str:
    path = folder / "model"
    path.mkdir(exist_ok=True)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 128}
    (path / "config.json").write_text(json.dumps(shape))
    return str(path)


@pytest.fixture
def spec(tmp_path: Path) -> FleetSpec:
    return FleetSpec(
        model=model(tmp_path),
        python=sys.executable,
        logs=str(tmp_path / "logs"),
        kv_tokens=65_536,
        servers=PAIR,
    )


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def pid_of(http: aiohttp.ClientSession, server: Server) -> int:
    async with http.get(server.url + "/pid") as answer:
        pid: int = (await answer.json(content_type=None))["pid"]
        return pid


async def gone(pids: set[int]) -> None:
    """Returns when none of them runs; a zombie no longer does."""
    async with asyncio.timeout(10):
        while any(runs(pid) for pid in pids):  # noqa: ASYNC110 - the kernel does not call back
            await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def family(fleet: Fleet) -> set[int]:
    return set(memory.family(fleet.pid))


async def test_a_fleet_is_ready_when_every_server_answers(
    spec: FleetSpec, http: aiohttp.ClientSession
) -> None:
    heard: list[tuple[str, str]] = []
    async with Fleet(spec, program=PROGRAM, report=lambda *news: heard.append(news)) as fleet:
        assert len({await pid_of(http, server) for server in fleet.servers}) == 2
        assert fleet.resident_bytes() > 10 << 20
    assert {("prefill-0", "ready"), ("decode-0", "ready")} <= set(heard)


async def test_nothing_is_left_when_the_block_ends(spec: FleetSpec) -> None:
    async with Fleet(spec, program=PROGRAM) as fleet:
        pids = family(fleet)
        assert len(pids) == 5  # the owner, two servers, and a child of each
    await gone(pids)


async def test_nothing_is_left_when_the_block_raises(spec: FleetSpec) -> None:
    pids: set[int] = set()

    async def divided() -> None:
        async with Fleet(spec, program=PROGRAM) as fleet:
            pids.update(family(fleet))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await divided()
    await gone(pids)


async def test_a_child_that_left_its_servers_group_ends_with_the_server(
    spec: FleetSpec, http: aiohttp.ClientSession
) -> None:
    async with Fleet(replace(spec, flags=("--stray",)), program=PROGRAM) as fleet:
        pids = family(fleet)
        server = await pid_of(http, fleet.server("decode-0"))
        descendants = set(memory.family(server))
        await fleet.kill("decode-0")
        await gone(descendants)
        assert len(pids - descendants) == len(descendants) + 1 == 4  # the owner is left, too
    await gone(pids)


async def test_nothing_is_left_when_the_owner_of_the_servers_is_killed(spec: FleetSpec) -> None:
    async with Fleet(spec, program=PROGRAM) as fleet:
        servers = family(fleet) - {fleet.pid}
        leaders = {pid for pid in servers if os.getpgid(pid) == pid}
        os.kill(fleet.pid, signal.SIGKILL)
        await gone(leaders)
        with pytest.raises(FleetError, match="the process that owns the servers ended"):
            await fleet.keep()
        for pid in servers - leaders:  # SGLang's own children watch for this themselves
            os.kill(pid, signal.SIGKILL)


async def test_a_killed_server_takes_its_children_along_and_starts_again_on_its_port(
    spec: FleetSpec, http: aiohttp.ClientSession
) -> None:
    async with Fleet(spec, program=PROGRAM) as fleet:
        server = fleet.server("decode-0")
        before = await pid_of(http, server)
        group = {pid for pid in family(fleet) if os.getpgid(pid) == before}
        await fleet.kill("decode-0")
        await gone(group)
        await fleet.start("decode-0")
        assert len(group) == 2
        assert await pid_of(http, server) != before


async def test_a_server_that_ends_by_itself_is_restarted(
    spec: FleetSpec, http: aiohttp.ClientSession
) -> None:
    news: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    async with Fleet(spec, program=PROGRAM, report=lambda *new: news.put_nowait(new)) as fleet:
        before = await pid_of(http, fleet.server("prefill-0"))
        keeping = asyncio.create_task(fleet.keep())
        while not news.empty():
            news.get_nowait()
        os.kill(before, signal.SIGKILL)
        told = [await news.get() for _ in range(4)]
        keeping.cancel()
        assert await pid_of(http, fleet.server("prefill-0")) != before
    assert [text for _, text in told] == [
        how_it_ended(-signal.SIGKILL),
        "restarting in 1 s",
        "starting",
        "ready",
    ]


@pytest.mark.usefixtures("_restarts_soon")
async def test_a_server_that_hangs_when_it_is_restarted_is_ended_and_tried_again(
    spec: FleetSpec, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    sign = tmp_path / "hang"
    hanging = replace(spec, flags=("--hang-if", str(sign)), servers=(Group(role=Role.UNIFIED),))
    news: asyncio.Queue[str] = asyncio.Queue()
    async with Fleet(hanging, program=PROGRAM, report=lambda _, new: news.put_nowait(new)) as fleet:
        fleet.spec = replace(hanging, start_timeout_s=1.0)
        keeping = asyncio.create_task(fleet.keep())
        sign.touch()
        os.kill(await pid_of(http, fleet.servers[0]), signal.SIGKILL)
        async with asyncio.timeout(10):
            while await news.get() != "not ready after 1 s":
                pass
            sign.unlink()
            while await news.get() != "ready":
                pass
        keeping.cancel()


@pytest.fixture
def used_logs(spec: FleetSpec) -> FleetSpec:
    """Its folder of logs has served an earlier fleet."""
    logs = Path(spec.logs)
    logs.mkdir()
    (logs / "decode-0.log").write_text("address already in use\n")
    return spec


async def test_whoever_gives_up_while_sglang_is_imported_does_not_wait_for_it(
    spec: FleetSpec, tmp_path: Path
) -> None:
    importing = tmp_path / "python"
    importing.write_text("#!/bin/sh\nexec sleep 30\n")
    importing.chmod(0o755)
    fleet, begun = Fleet(replace(spec, python=str(importing)), program=PROGRAM), monotonic()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0), fleet:
            pytest.fail("it started")

    assert monotonic() - begun < 5.0
    assert not runs(fleet.pid)


async def test_what_an_earlier_server_wrote_into_the_log_is_not_taken_for_this_ones(
    used_logs: FleetSpec,
) -> None:
    spec = used_logs
    async with Fleet(spec, program=PROGRAM) as fleet:
        assert len(fleet.servers) == 2


async def failing(spec: FleetSpec, **options: object) -> str:
    with pytest.raises(FleetError) as told:
        async with Fleet(spec, program=PROGRAM, **options):  # type: ignore[arg-type]
            pytest.fail("it started")
    return str(told.value)


async def test_a_server_that_dies_while_starting_is_named_with_its_last_lines(
    spec: FleetSpec,
) -> None:
    told = await failing(replace(spec, flags=("--die",)))
    assert told.partition(";")[0] in {
        "prefill-0 ended with exit status 1",
        "decode-0 ended with exit status 1",
    }
    assert told.endswith("\n    loading weights\n    weights do not fit")


async def test_a_server_that_finds_its_port_taken_is_named_with_its_last_lines(
    spec: FleetSpec,
) -> None:
    told = await failing(replace(spec, flags=("--taken",), servers=(Group(role=Role.UNIFIED),)))
    assert told.startswith("unified-0 found its port taken; the last lines of ")
    assert told.endswith("address already in use")


async def test_a_server_that_never_gets_ready_is_given_up(spec: FleetSpec) -> None:
    told = await failing(replace(spec, flags=("--hang",), start_timeout_s=1.0))
    assert told == "not ready after 1 s"


async def test_a_missing_model_directory_is_named(spec: FleetSpec, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    told = await failing(replace(spec, model=str(absent)))
    assert told.startswith(f"model directory {absent} does not exist")
    absent.mkdir()
    assert "has no config.json" in await failing(replace(spec, model=str(absent)))


async def test_too_little_memory_is_told_in_numbers(spec: FleetSpec) -> None:
    told = await failing(spec, available_bytes=lambda: 1 << 30)
    assert told.startswith("not enough memory: the fleet needs about 1.9 GiB, 1.0 GiB are")


async def test_a_port_in_use_stops_the_start(spec: FleetSpec) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = await failing(replace(spec, servers=(Group(role=Role.UNIFIED, port=port),)))
    assert told == f"port {port} is in use; choose another, or 0 for a free one"


async def test_a_missing_interpreter_is_an_error_of_one_line(spec: FleetSpec) -> None:
    told = await failing(replace(spec, python="/nowhere/python"))
    assert told == "cannot run /nowhere/python: No such file or directory"


async def test_a_missing_package_comes_with_the_command_that_installs_it(
    spec: FleetSpec,
) -> None:
    with pytest.raises(FleetError, match="install it with: slackwater fleet --install"):
        async with Fleet(replace(spec, python=bare_python())):
            pytest.fail("it started")


def bare_python() -> str:
    """The interpreter below any virtual environment: it has no torch."""
    return os.path.realpath(sys.executable)


def test_a_missing_library_comes_with_the_command_that_installs_it() -> None:
    def refuses(_name: str) -> object:
        raise OSError("cannot open shared object file")

    told = interpreter.missing_library(refuses)
    assert told is not None
    assert told.endswith("apt-get install -y --no-install-recommends libibverbs1")
    assert interpreter.missing_library(lambda name: name) is None


def test_the_estimate_grows_with_servers_tokens_and_weights() -> None:
    small = FleetSpec(servers=(Group(role=Role.UNIFIED),), kv_tokens=1000)
    shape = Shape(weight_bytes=1 << 20, kv_bytes_per_token=1024)
    least = memory.needed_bytes(small, shape)
    larger: list[Callable[[], int]] = [
        lambda: memory.needed_bytes(replace(small, kv_tokens=10_000), shape),
        lambda: memory.needed_bytes(replace(small, servers=PAIR), shape),
        lambda: memory.needed_bytes(small, replace(shape, weight_bytes=1 << 30)),
    ]
    assert all(estimate() > least for estimate in larger)


@pytest.mark.parametrize(
    ("code", "words", "told"),
    [
        (3, "", "ended with exit status 3"),
        (-signal.SIGTERM, "", "was ended by SIGTERM"),
        (-signal.SIGKILL, "no weights\nkill_process_tree called: parent_pid=7", "gave up"),
        (-signal.SIGKILL, "", "was killed (SIGKILL; the system does that when memory runs out)"),
    ],
)
def test_an_end_is_told_by_who_ended_it(code: int, words: str, told: str) -> None:
    assert how_it_ended(code, words) == told


def test_only_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    shown = last_lines(log)
    assert shown.endswith("line 99")
    assert len(shown.splitlines()) == 13
    assert last_lines(tmp_path / "absent.log") == ""


def test_the_command_reports_a_failed_start_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run_fleet(parser.parse_args(["--model", str(tmp_path / "absent")])) == 2
    assert "slackwater fleet: " in capsys.readouterr().err


OPEN_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from backends.fleet.fleet import Fleet
from backends.fleet.memory import family
from backends.fleet.spec import read_spec

async def main():
    async with Fleet(read_spec(Path(sys.argv[1])), program=(sys.argv[2],)) as fleet:
        print(*family(fleet.pid), flush=True)
        await fleet.keep()

asyncio.run(main())
"""


async def test_nothing_is_left_when_the_process_that_opened_the_fleet_is_killed(
    spec: FleetSpec, tmp_path: Path
) -> None:
    table = tmp_path / "fleet.toml"
    table.write_text(
        f'model = "{spec.model}"\npython = "{spec.python}"\nlogs = "{spec.logs}"\n'
        '[[servers]]\nrole = "unified"\ncount = 2\n'
    )
    opener = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OPEN_AND_WAIT, str(table), *PROGRAM, stdout=asyncio.subprocess.PIPE
    )
    assert opener.stdout is not None
    pids = {int(pid) for pid in (await opener.stdout.readline()).split()}
    leaders = {pid for pid in pids if os.getpgid(pid) == pid}
    opener.kill()
    await opener.communicate()
    await gone(leaders)
    assert len(leaders) == 3
    for pid in pids - leaders:  # SGLang's own children watch for this themselves
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
