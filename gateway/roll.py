"""The list of servers as it changes while the gateway runs, whoever starts and ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from backends.base import Post
from backends.sglang import Server, Sglang
from gateway.probe import Prober
from policies.events import WorkerGone
from policies.types import Worker

log = structlog.get_logger("slackwater.worker")


class Roll:
    """A reload leaves those alone that came here; what the configuration names stays its own."""

    def __init__(
        self,
        backend: Sglang,
        prober: Prober,
        post: Post,
        tasks: asyncio.TaskGroup,
        forget: Callable[[str], None],
    ) -> None:
        self._backend = backend
        self._prober = prober
        self._post = post
        self._tasks = tasks
        self._forget = forget

    def come(self, worker: Worker, api_key: str = "") -> None:
        known = self._known(worker.name)
        if known is not None and known.described == (worker, api_key):
            return
        log.info("worker comes", worker=worker.name, url=worker.url, role=worker.role.value)
        server = self._backend.add(worker, api_key)
        if known is None or known.worker.url != worker.url:
            self._prober.expect(worker)
        self._prober.watch(server, worker, self._tasks)

    def leave(self, name: str) -> None:
        """What it still runs may end there."""
        if self._known(name) is None:
            return
        log.info("worker leaves", worker=name)
        self._prober.forget(name)
        self._forget(name)
        self._post(WorkerGone(name))
        self._backend.remove(name)

    def _known(self, name: str) -> Server | None:
        return next((it for it in self._backend.servers() if it.name == name), None)
