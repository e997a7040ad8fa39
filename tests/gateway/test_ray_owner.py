"""The owner of Ray actors goes on whatever one of them, or one command, does; Ray is scripted."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

OURS = "backends.ray.owner"


class RayError(Exception):
    """As Ray's own: an actor that is no more."""


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        try:
            answer.set_result(self._call(*arguments))
        except (RayError, KeyError) as error:
            answer.set_exception(error)
        return answer


class Scripted:
    """All actors of one cluster, by name."""

    def __init__(self) -> None:
        self.alive: dict[str, SimpleNamespace] = {}
        self.fails: Exception | None = None

    def remote(self, kind: type) -> Any:
        def options(name: str, **_more: Any) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *told: self._new(kind.__name__, name, told))

        return SimpleNamespace(options=options)

    def _new(self, kind: str, name: str, told: tuple[Any, ...]) -> SimpleNamespace:
        if name in self.alive:
            raise ValueError(f"{name} is taken")
        actor = SimpleNamespace(
            launch=Method(lambda role: setattr(actor, "role", role)),
            state=Method(lambda: self._state(name, actor)),
            holder=Method(lambda: self._holder(name, told)),
            role="",
        )
        self.alive[name] = actor
        return actor

    def _holder(self, name: str, told: tuple[Any, ...]) -> Any:
        if name not in self.alive:
            raise RayError
        return told[0]

    def _state(self, name: str, actor: SimpleNamespace) -> dict[str, Any]:
        if self.fails is not None:
            raise self.fails
        return {"name": name, "role": actor.role, "runs": True, "ready": True, "words": ""}

    def get_actor(self, name: str) -> SimpleNamespace:
        return self.alive[name]

    def kill(self, actor: SimpleNamespace) -> None:
        self.alive = {name: it for name, it in self.alive.items() if it is not actor}

    def named(self) -> list[str]:
        return list(self.alive)


class Site:
    def __init__(self, ray: Scripted, module: Any, read: int, write: int) -> None:
        self.ray, self._module, self._read, self._write = ray, module, read, write

    def owner(self, tasks: asyncio.TaskGroup) -> Any:
        told = self._module.Told(
            us="us",
            address="auto",
            namespace="ours",
            command=["serve"],
            prefill=1,
            decode=1,
            gpus=1.0,
            cpus=1.0,
            start_s=10.0,
            poll_s=1.0,
            outlive=False,
        )
        return self._module.Owner(told, self._write, tasks)

    def heard(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in os.read(self._read, 1 << 16).splitlines()]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    scripted, ray = Scripted(), ModuleType("ray")
    util, exceptions = ModuleType("ray.util"), ModuleType("ray.exceptions")
    vars(util).update(list_named_actors=scripted.named)
    vars(exceptions).update(RayError=RayError)
    vars(ray).update(
        remote=scripted.remote,
        get_actor=scripted.get_actor,
        kill=scripted.kill,
        util=util,
        cloudpickle=ModuleType("ray.cloudpickle"),
    )
    for name, module in (("ray", ray), ("ray.util", util), ("ray.exceptions", exceptions)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in (OURS, "backends.ray.host"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    read, write = os.pipe()
    yield Site(scripted, importlib.import_module(OURS), read, write)
    for name in (OURS, "backends.ray.host"):
        sys.modules.pop(name, None)
    os.close(read)
    os.close(write)


async def test_an_odd_turn_is_followed_by_the_next_one(site: Site) -> None:
    async with asyncio.TaskGroup() as tasks:
        owner = site.owner(tasks)
        keeping = tasks.create_task(owner.keep())
        await asyncio.sleep(1.5)
        site.ray.fails = KeyError("odd")
        await asyncio.sleep(2.0)
        site.ray.fails = None
        site.heard()
        await asyncio.sleep(1.0)
        assert len(site.heard()[-1]["servers"]) == 2
        keeping.cancel()


async def test_a_lease_that_has_died_is_taken_again_for_the_same_servers(site: Site) -> None:
    async with asyncio.TaskGroup() as tasks:
        owner = site.owner(tasks)
        keeping = tasks.create_task(owner.keep())
        await asyncio.sleep(1.5)
        await owner.end("server-2")
        first = site.ray.alive.pop("lease")
        await asyncio.sleep(2.0)
        assert site.ray.alive["lease"] is not first
        assert site.ray.named() == ["server-1", "lease"]
        keeping.cancel()


async def test_an_actor_that_dies_while_it_starts_is_not_replaced(site: Site) -> None:
    async with asyncio.TaskGroup() as tasks:
        owner = site.owner(tasks)
        await owner._turn()
        site.ray.fails = RayError("its node is lost")
        await owner.obey({"id": 7, "do": "start", "role": "decode"})
        assert sorted(owner.servers) == ["server-1", "server-2"]
        assert site.heard()[-1]["why"] == "RayError: its node is lost"


async def test_a_command_that_goes_wrong_is_answered_and_ends_nothing(site: Site) -> None:
    async with asyncio.TaskGroup() as tasks:
        owner = site.owner(tasks)
        await owner._turn()
        await owner.obey({"id": 8, "do": "dance"})
        told = site.heard()[-1]
        assert (told["id"], told["why"]) == (8, "KeyError: 'dance'")
