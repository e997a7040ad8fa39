"""A server of the other role in the place of this one: one workload smaller, the other one larger.

The smaller one comes first, because its GPUs are what the new pod waits for. Both numbers are only
changed from what they were, so that nobody else's change is undone; where the new server does not
come, both go back, and the cluster starts a server of the old role again.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Sequence
from contextlib import suppress

import structlog

from backends.actuators.launches import Launches
from backends.actuators.settings import Kubernetes
from backends.actuators.turning import Hindrance, Turned, UnfitError
from backends.base import Roll, Size
from backends.kubernetes.api import AbsentError, Api, ApiError, ConflictError, connected
from backends.kubernetes.lease import Lease
from backends.kubernetes.pods import COST_ANNOTATION, Pod
from backends.kubernetes.presence import ROLES, Presence
from backends.kubernetes.workloads import Deployments, Group, Workloads
from backends.pause import pause
from backends.sglang import Server
from policies.clock import Clock
from policies.types import Role, Worker

log = structlog.get_logger("slackwater.kubernetes")

GOING_S = 30.0
"""A pod that the cluster has not begun to end by then stays."""
LEAST_COST = str(-(2**31))
_OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


def workloads_of(cluster: Kubernetes, api: Api) -> Workloads:
    names = {Role.PREFILL: cluster.prefill, Role.DECODE: cluster.decode}
    if cluster.group:
        return Group(api, cluster.group, cluster.group_version, names)
    return Deployments(api, names)


def rights_of(workloads: Workloads) -> list[tuple[str, str, str]]:
    """All that is asked of the cluster's access control."""
    leases = [(verb, "coordination.k8s.io", "leases") for verb in ("get", "create", "update")]
    return [("list", "", "pods"), ("patch", "", "pods"), *leases, *workloads.needs()]


async def _problems(api: Api, workloads: Workloads) -> list[str]:
    found = []
    for verb, group, resource in rights_of(workloads):
        if not await api.may(verb, group, resource):
            where = f"{resource} of {group}" if group else resource
            found.append(f"we may not {verb} {where} in the namespace {api.namespace}")
    for role in ROLES:
        if not await workloads.replicas(role):
            found.append(f"the cluster is to have no {role.value} server at all")
        if not await workloads.selector(role):
            found.append(f"the pods of the {role.value} servers have no labels to be known by")
    return found


class KubernetesTurn:
    def __init__(
        self,
        cluster: Kubernetes,
        clock: Clock,
        rng: random.Random,
        tasks: asyncio.TaskGroup,
        roll: Roll,
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._us = f"{socket.gethostname()}-{rng.getrandbits(32):08x}"
        self._tasks = tasks
        self._roll = roll
        self._loop: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._launches = Launches(tasks, self._start, _not_started)
        self.size: Size | None = self._launches
        self.at_once: int | None = 1

    async def open(self) -> None:
        """The pods that serve are on the list before the first request comes."""
        cluster = self._cluster
        try:
            self._api = await connected(cluster.kubeconfig, cluster.namespace)
        except ApiError as error:
            raise UnfitError(str(error)) from None
        self._workloads = workloads_of(cluster, self._api)
        self._lease = Lease(self._api, cluster.lease, self._us, self._clock)
        self._presence = Presence(
            self._api,
            self._workloads,
            self._roll,
            port=cluster.port,
            bootstrap_port=cluster.bootstrap_port,
        )
        with suppress(ApiError):  # told of by the loop, which goes on trying
            await self._presence.look()
        self._loop = self._tasks.create_task(self._watch())

    async def problems(self, workers: Sequence[Worker]) -> list[str]:
        cluster = self._cluster
        try:
            api = await connected(cluster.kubeconfig, cluster.namespace)
        except ApiError as error:
            raise UnfitError(str(error)) from None
        try:
            return await _problems(api, workloads_of(cluster, api))
        except ApiError as error:
            return [str(error)]
        finally:
            await api.close()

    async def close(self) -> None:
        if self._loop is None:
            return
        self._loop.cancel()
        self._launches.cancel()
        with suppress(ApiError):
            if self._lease.is_held and self._lease.plan:
                await self._finish(self._lease.plan)
            await self._lease.give_up()
        await self._api.close()

    async def _watch(self) -> None:
        """An API that does not answer takes nobody off the list."""
        failing = False
        while True:
            try:
                await self._presence.look()
                await self._lease.look()
                failing = False
            except Exception as error:  # noqa: BLE001  # whatever it answers, it is asked again
                if not failing:
                    log.warning("the Kubernetes API does not answer", error=str(error))
                failing = True
            await pause(self._clock, self._cluster.poll_s)

    async def hindrance(self) -> Hindrance | None:
        try:
            await self._presence.look()
            await self._lease.look()
        except ApiError as error:
            return Hindrance(why=str(error))
        if self._lease.is_anothers:
            return Hindrance(why=self._holder_has_it, by_another=True)
        return None

    @property
    def _holder_has_it(self) -> str:
        return f"{self._lease.holder} has the lease"

    # Roles.

    async def turn(self, server: Server, role: Role) -> Turned:
        async with self._one_at_a_time:
            try:
                return await self._turn(server.name, role)
            except ConflictError as error:
                return Turned(why=str(error), by_another=True)
            except ApiError as error:
                return Turned(why=str(error))

    async def _turn(self, name: str, role: Role) -> Turned:
        if not await self._is_ours():
            return Turned(why=self._holder_has_it, by_another=True)
        await self._presence.look()
        source = _OTHER[role]
        if why := self._unfit(name, source):
            return Turned(why=why)
        had = {it: await self._workloads.replicas(it) for it in ROLES}
        if had[source] < 2:
            return Turned(why=f"the cluster keeps {had[source]} {source.value} servers")
        with self._presence.keeping(name):
            await self._note(had, role)
            before = {it.name for it in self._presence.of(role)}
            if why := await self._given_up(name, source, had[source]):
                await self._lease.note("")
                return Turned(why=why)
            turned = await self._replaced(before, role, had)
            with suppress(ApiError):  # the change is made, and whoever finishes it sees that it is
                await self._lease.note("")
        return turned

    def _unfit(self, name: str, source: Role) -> str:
        """Why it would be another pod that the cluster gives up."""
        pod = self._presence.pods.get(name)
        if pod is None or pod.leaving or pod.role is not source:
            return f"no pod of the {source.value} servers is called {name}"
        others = [it for it in self._presence.of(source) if it.name != name]
        if unready := [it.name for it in others if not it.ready]:
            return f"the cluster would give up {unready[0]} first, which is not ready"
        if pod.owner != "ReplicaSet" and any(it.ordinal > pod.ordinal for it in others):
            return f"a {pod.owner} gives up its last pod first, which {name} is not"
        return ""

    async def _given_up(self, name: str, source: Role, had: int) -> str:
        """The pod is on its way out; else all is as it was, and why."""
        await self._mark(name, LEAST_COST)
        try:
            await self._workloads.scale(source, had, had - 1)
        except ApiError:
            await self._mark(name, None)
            raise
        until_s = self._clock.time() + GOING_S
        while self._clock.time() < until_s:
            with suppress(ApiError):  # a number that was changed is waited for whatever comes
                await self._presence.look()
            pod = self._presence.pods.get(name)
            if pod is None or pod.leaving:
                return ""
            await pause(self._clock, self._cluster.poll_s)
        await self._workloads.scale(source, had - 1, had)
        await self._mark(name, None)
        return f"the cluster has not given it up within {GOING_S:.0f} s"

    async def _replaced(self, before: set[str], role: Role, had: dict[Role, int]) -> Turned:
        source, why = _OTHER[role], ""
        try:
            await self._workloads.scale(role, had[role], had[role] + 1)
        except ApiError as error:
            await self._restore(source, had[source] - 1, had[source])
            conflict = isinstance(error, ConflictError)
            return Turned(why=str(error), by_another=conflict, is_gone=True)
        new, why = await self._new(before, role)
        if new is not None:
            return Turned(is_gone=True, successor=new.name)
        await self._restore(role, had[role] + 1, had[role])
        await self._restore(source, had[source] - 1, had[source])
        return Turned(why=why, is_gone=True)

    async def _new(self, before: set[str], role: Role) -> tuple[Pod | None, str]:
        """Ready, or why none came."""
        until_s = self._clock.time() + self._cluster.start_s
        trouble = "it does not come"
        while self._clock.time() < until_s:
            with suppress(ApiError):
                await self._presence.look()
            for pod in self._presence.of(role):
                if pod.name not in before and pod.serves:
                    return pod, ""
                if pod.name not in before:
                    trouble = f"{pod.name} is not ready" + (pod.trouble and f": {pod.trouble}")
            await pause(self._clock, self._cluster.poll_s)
        return None, f"no {role.value} server within {self._cluster.start_s:.0f} s: {trouble}"

    async def _restore(self, role: Role, was: int, wanted: int) -> None:
        """Tried until it is heard, as long as nobody else has changed it: a server is missing."""
        while True:
            try:
                await self._workloads.scale(role, was, wanted)
                return
            except (ConflictError, AbsentError) as error:
                log.warning("the number of replicas is somebody else's now", error=str(error))
                return
            except ApiError as error:
                log.warning("the Kubernetes API does not answer", error=str(error))
                await pause(self._clock, self._cluster.poll_s)

    async def _mark(self, name: str, cost: str | None) -> None:
        path = f"/api/v1/namespaces/{self._api.namespace}/pods/{name}"
        with suppress(AbsentError):
            await self._api.patch(path, {"metadata": {"annotations": {COST_ANNOTATION: cost}}})

    # What others may not do meanwhile.

    async def _is_ours(self) -> bool:
        """With it comes what a gateway before us has begun and not ended."""
        had_it = self._lease.is_held
        if not await self._lease.take():
            return False
        if not had_it and self._lease.plan:
            await self._finish(self._lease.plan)
        return True

    async def _note(self, had: dict[Role, int], role: Role) -> None:
        plan = {"to": role.value, **{it.value: had[it] for it in ROLES}}
        await self._lease.note(json.dumps(plan))

    async def _finish(self, plan: str) -> None:
        """One server was given up, and the one in its place not yet asked for."""
        try:
            told = json.loads(plan)
            role = Role(told["to"])
            had = {it: int(told[it.value]) for it in ROLES}
        except (ValueError, KeyError, TypeError):
            return
        has = {it: await self._workloads.replicas(it) for it in ROLES}
        source = _OTHER[role]
        if (has[source], has[role]) == (had[source] - 1, had[role]):
            log.warning("a change that another gateway has begun is finished", to=role.value)
            await self._workloads.scale(role, had[role], had[role] + 1)
        await self._lease.note("")

    # Size.

    async def _start(self, role: Role) -> str:
        async with self._one_at_a_time:
            try:
                return await self._added(role)
            except ApiError as error:
                return str(error)

    async def _added(self, role: Role) -> str:
        """Why there is not one more; empty where there is."""
        if not await self._is_ours():
            return self._holder_has_it
        await self._presence.look()
        before = {it.name for it in self._presence.of(role)}
        had = await self._workloads.replicas(role)
        await self._workloads.scale(role, had, had + 1)
        new, why = await self._new(before, role)
        if new is None:
            await self._restore(role, had + 1, had)
        return why

    async def end(self, server: Server) -> str:
        async with self._one_at_a_time:
            try:
                return await self._end(server.name, server.worker.role)
            except ApiError as error:
                return str(error)

    async def _end(self, name: str, role: Role) -> str:
        if not await self._is_ours():
            return self._holder_has_it
        await self._presence.look()
        if why := self._unfit(name, role):
            return why
        had = await self._workloads.replicas(role)
        if had < 2:
            return f"the cluster keeps {had} {role.value} servers"
        with self._presence.keeping(name):
            return await self._given_up(name, role, had)


def _not_started(role: Role, why: str) -> None:
    log.warning("no server was started", role=role.value, error=why)
