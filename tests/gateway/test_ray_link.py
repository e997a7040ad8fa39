"""The line to the process that joins a Ray cluster: what becomes of it when that cannot start."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from backends.actuators.ray import RayTurn
from backends.actuators.settings import Ray
from backends.actuators.turning import Hindrance, UnfitError
from backends.fleet import interpreter
from policies.types import Role

JOINS = """
import json, sys
print(json.dumps({"event": "joined"}), flush=True)
sys.stdin.readline()
"""

pytestmark = pytest.mark.real_time


@pytest.fixture
def joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Joined at once; a command ends it, as it ends with a lost cluster."""
    script = tmp_path / "joins.py"
    script.write_text(JOINS)
    argv = [sys.executable, str(script)]
    monkeypatch.setattr(interpreter, "command", lambda *_: list(argv))
    monkeypatch.setattr("backends.actuators.ray.AGAIN_S", 0.05)
    return argv


def turning(tasks: asyncio.TaskGroup) -> RayTurn:
    clock, roll = asyncio.get_running_loop(), cast("Any", None)
    return RayTurn(Ray(command="serve"), clock, random.Random(0), tasks, roll)


async def test_a_process_that_cannot_be_started_for_a_while_is_tried_again(
    joins: list[str],
) -> None:
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        turn = turning(tasks)
        await turn.open()
        python, joins[0] = joins[0], "/nowhere/python"
        assert await turn._ask("start") == {"why": "the Ray cluster is lost", "is_restarted": True}
        await asyncio.sleep(0.2)
        assert await turn._ask("start") == {"why": "the Ray cluster is lost"}
        joins[0] = python
        while turn._link is None or turn._link.lost.done():  # noqa: ASYNC110  # a real process
            await asyncio.sleep(0.02)
        await turn.close()


HOLDS = """
import json, sys
def tell(event, **more):
    print(json.dumps({"event": event, **more}), flush=True)
tell("joined")
for line in sys.stdin:
    ours = json.loads(line)["do"] == "take"
    tell("servers", servers=[], holder="us" if ours else "another gateway", ours=ours)
    tell("done", id=json.loads(line)["id"])
"""


async def test_whoever_has_not_the_lease_is_not_ready(joins: list[str], tmp_path: Path) -> None:
    script = tmp_path / "holds.py"
    script.write_text(HOLDS)
    joins[1] = str(script)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        turn = turning(tasks)
        await turn.open()
        unknown = await turn.hindrance()
        assert unknown is not None
        assert not unknown.by_another
        await turn._ask("look")
        assert await turn.hindrance() == Hindrance(
            why="another gateway has the lease", by_another=True
        )
        await turn._ask("take")
        assert await turn.hindrance() is None
        await turn.close()


async def test_a_launch_that_goes_wrong_ends_nothing_else(
    joins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_do: str, **_details: object) -> dict[str, Any]:
        raise RuntimeError("odd")

    with capture_logs() as lines:
        async with asyncio.TaskGroup() as tasks:
            turn = turning(tasks)
            monkeypatch.setattr(turn, "_ask", fails)
            assert turn.size is not None
            turn.size.launch(Role.DECODE)
    assert lines[0]["event"] == "no actor was started"
    assert turn.size.starting == {Role.DECODE: 0}


async def test_an_interpreter_without_ray_is_told_of_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No package at all lies on its path, as on a machine where only the gateway is installed."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    actors = Ray(command="serve", python=str(bare))
    wanted = "no Ray cluster at auto: .* has no ray: pip install 'slackwater.ray.' there"
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        clock, roll = asyncio.get_running_loop(), cast("Any", None)
        turn = RayTurn(actors, clock, random.Random(0), tasks, roll)
        with pytest.raises(UnfitError, match=wanted):
            await turn.open()
        with pytest.raises(UnfitError, match=wanted):
            await turn.problems([])
    assert capfd.readouterr().err == ""
