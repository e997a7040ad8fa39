"""A Kubernetes API of a few calls, and a controller behind it: its pods are emulated servers."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from backends.emulator import EmulatedFleet
from backends.emulator.fleet import listening_socket
from policies.types import Role

NAMESPACE = "inference"
APPS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
GROUPS = f"/apis/workloads.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/rolebasedgroups"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
COST = "controller.kubernetes.io/pod-deletion-cost"
NAMES = {Role.PREFILL: "sglang-prefill", Role.DECODE: "sglang-decode"}


@dataclass
class FakePod:
    """One that runs the emulated server of the same name."""

    name: str
    role: Role
    url_port: int
    bootstrap_port: int
    ready: bool = False
    leaving: bool = False
    cost: int = 0
    waits: str = ""

    def object(self, owner: str) -> dict[str, Any]:
        ports = [
            {"name": "http", "containerPort": self.url_port},
            {"name": "bootstrap", "containerPort": self.bootstrap_port},
        ]
        waiting = {"waiting": {"reason": self.waits}} if self.waits else {}
        meta: dict[str, Any] = {
            "name": self.name,
            "labels": {"role": self.role.value, "slackwater.io/pool": "relaxed"},
            "ownerReferences": [{"kind": owner}],
        }
        if self.leaving:
            meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        return {
            "metadata": meta,
            "spec": {"containers": [{"name": "sglang", "ports": ports}]},
            "status": {
                "phase": "Running" if self.ready else "Pending",
                "podIP": "127.0.0.1" if self.ready else "",
                "conditions": [{"type": "Ready", "status": str(self.ready)}],
                "containerStatuses": [{"state": waiting}],
            },
        }


@dataclass
class ScriptedCluster:
    """Makes pods come and go as their numbers say; spare emulated servers are its free GPUs."""

    start_s: float = 20.0
    end_s: float = 5.0
    crashes: set[Role] = field(default_factory=set)
    """Pods of this role never become ready."""
    wrong: set[Role] = field(default_factory=set)
    """Pods of this role come up as servers of the other one."""
    ignores: bool = False
    """Numbers are taken, and nothing comes of them."""
    dead: bool = False
    """Nobody answers."""
    refuses: set[str] = field(default_factory=set)
    """Rights that nobody has, as verb and resource."""
    owner: str = "ReplicaSet"
    fleet: EmulatedFleet | None = None
    pods: dict[str, FakePod] = field(default_factory=dict)
    replicas: dict[Role, int] = field(default_factory=dict)
    lease: dict[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    scaled: list[tuple[str, int]] = field(default_factory=list)
    spares: list[str] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _plugs: dict[str, list[socket.socket]] = field(default_factory=dict)
    _version: int = 0

    async def _kill(self, name: str) -> None:
        """Its ports are kept meanwhile: nobody else on this machine may be given them."""
        assert self.fleet is not None
        server = self.fleet[name]
        await self.fleet.kill(name)
        ports = (server.port, server.bootstrap_port)
        self._plugs[name] = [listening_socket(port) for port in ports]

    async def _revive(self, name: str) -> None:
        assert self.fleet is not None
        await self.fleet[name].restart()
        self._unplug(name)

    def _unplug(self, name: str) -> None:
        for plug in self._plugs.pop(name, []):
            plug.close()

    # What runs.

    async def adopt(self, fleet: EmulatedFleet, running: dict[str, Role]) -> None:
        """Those that run are pods; the others are what new pods get."""
        self.fleet = fleet
        for name, server in fleet.servers.items():
            if name in running:
                pod = FakePod(name, running[name], server.port, server.bootstrap_port, ready=True)
                self.pods[name] = pod
            else:
                await self._kill(name)
                self.spares.append(name)
        for role in NAMES:
            self.replicas[role] = sum(it is role for it in running.values())

    def settle(self) -> None:
        """As a controller does; called whenever a number has changed."""
        if self.ignores:
            return
        for role, wanted in self.replicas.items():
            pods = [it for it in self.pods.values() if it.role is role and not it.leaving]
            for pod in sorted(pods, key=self._rank)[: max(0, len(pods) - wanted)]:
                pod.leaving = True
                self._spawn(self._end(pod))
            for _ in range(wanted - len(pods)):
                if self.spares:
                    self._spawn(self._start(self.spares.pop(0), role))

    def _rank(self, pod: FakePod) -> tuple[Any, ...]:
        if self.owner == "ReplicaSet":
            return (pod.ready, pod.cost, pod.name)
        return (-int(pod.name.rpartition("-")[2]),)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, pod: FakePod) -> None:
        assert self.fleet is not None
        if pod.ready:
            await asyncio.sleep(self.end_s)
            await self._kill(pod.name)
        del self.pods[pod.name]
        self.spares.append(pod.name)
        self.settle()

    async def _start(self, name: str, role: Role) -> None:
        assert self.fleet is not None
        server = self.fleet[name]
        pod = FakePod(name, role, server.port, server.bootstrap_port)
        self.pods[name] = pod
        await asyncio.sleep(self.start_s)
        if role in self.crashes:
            pod.waits = "CrashLoopBackOff"
        elif not pod.leaving:
            await self._revive(name)
            other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
            server.engine.machine.take_role(other if role in self.wrong else role)
            pod.ready = True

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for name in list(self._plugs):
            self._unplug(name)

    # What is asked.

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path, method = request.path, request.method
        self.calls.append(f"{method} {path}")
        body = json.loads(await request.read() or b"{}")
        if self.dead:
            return web.json_response({"message": "etcd is away"}, status=503)
        if path == REVIEWS:
            return self._review(body["spec"]["resourceAttributes"])
        if path.startswith(PODS):
            return self._of_pods(request, body)
        if path.startswith(LEASES):
            return self._of_leases(method, body)
        if path.startswith((APPS, GROUPS)):
            return self._of_workloads(method, path, body)
        return web.json_response({"message": "not found"}, status=404)

    def _review(self, asked: dict[str, str]) -> web.StreamResponse:
        resource = "/".join(it for it in (asked["resource"], asked["subresource"]) if it)
        allowed = f"{asked['verb']} {resource}" not in self.refuses
        return web.json_response({"status": {"allowed": allowed}}, status=201)

    def _of_pods(self, request: web.Request, body: Any) -> web.StreamResponse:
        if request.method == "PATCH":
            pod = self.pods.get(request.path.rpartition("/")[2])
            if pod is None:
                return web.json_response({"message": "no such pod"}, status=404)
            pod.cost = int(body["metadata"]["annotations"][COST] or 0)
            return web.json_response(pod.object(self.owner))
        wanted = dict(it.split("=") for it in request.query["labelSelector"].split(","))
        role = next((it.value for it in NAMES if NAMES[it] in wanted.values()), wanted.get("role"))
        found = [it.object(self.owner) for it in self.pods.values() if it.role.value == role]
        return web.json_response({"items": found})

    def _of_leases(self, method: str, body: Any) -> web.StreamResponse:
        if method == "GET":
            return web.json_response(self.lease, status=200 if self.lease else 404)
        known = self.lease.get("metadata", {}).get("resourceVersion")
        if body["metadata"].get("resourceVersion") != known:
            return web.json_response({"message": "it has been modified"}, status=409)
        self.hold(body)
        return web.json_response(self.lease, status=201 if method == "POST" else 200)

    def hold(self, lease: dict[str, Any]) -> None:
        self._version += 1
        meta = {**lease.get("metadata", {}), "resourceVersion": str(self._version)}
        self.lease = {**lease, "metadata": meta}

    def _of_workloads(self, method: str, path: str, body: Any) -> web.StreamResponse:
        if path.startswith(GROUPS):
            if method == "PATCH":
                return self._patched(body)
            roles = [{"name": NAMES[it], "replicas": self.replicas[it]} for it in NAMES]
            return web.json_response({"spec": {"roles": roles}})
        name, _, part = path.removeprefix(f"{APPS}/").partition("/")
        role = next((it for it, named in NAMES.items() if named == name), None)
        if role is None:
            return web.json_response({"message": "no such deployment"}, status=404)
        if not part:
            labels = {"matchLabels": {"role": role.value}}
            return web.json_response({"spec": {"selector": labels}})
        if method == "PATCH":
            return self._patched(body, role)
        count = self.replicas[role]
        return web.json_response({"spec": {"replicas": count} if count else {}})

    def _patched(self, patch: list[dict[str, Any]], role: Role | None = None) -> web.StreamResponse:
        roles = list(NAMES)
        for step in patch:
            index = step["path"].split("/")[3] if role is None else None
            of = role if role is not None else roles[int(str(index))]
            has = NAMES[of] if step["path"].endswith("/name") else self.replicas[of]
            if step["op"] == "test" and step["value"] != has:
                return web.json_response({"message": "the test failed"}, status=422)
            if step["op"] == "add":
                self.replicas[of] = step["value"]
                self.scaled.append((of.value, step["value"]))
        self.settle()
        return web.json_response({})


@asynccontextmanager
async def serving(cluster: ScriptedCluster, folder: Path) -> AsyncIterator[Path]:
    """The kubeconfig that leads there."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", cluster.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    path = folder / "kubeconfig"
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": {"token": "secret"}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    try:
        yield path
    finally:
        await cluster.close()
        await runner.cleanup()
