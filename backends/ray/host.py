"""What runs on a node of a Ray cluster: one server's process, on the GPUs that its actor was given.

It travels to nodes that need not have this package: the standard library and Ray are all it uses.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.util

READY_PAGES = ("/ready", "/health")
LOWEST_PORT, HIGHEST_PORT = 20_000, 32_000
LOG_LINES = 8
END_S = 20.0
DIE_WITH_US = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)
"""The kernel kills the server when its actor ends, however that happens."""


class Host:
    """One server; its address stays the same from one process to the next."""

    def __init__(self, name: str, command: list[str]) -> None:
        self._name = name
        self._command = command
        self._ip = str(ray.util.get_node_ip_address())
        ports = free_ports(self._ip)
        self._port, self._bootstrap_port = next(ports), next(ports)
        self._process: subprocess.Popen[bytes] | None = None
        self._role = ""
        self._log = Path(tempfile.gettempdir(), f"slackwater-ray-{os.getpid()}-{name}.log")
        self._log_from = 0

    def launch(self, role: str) -> None:
        """Ends what runs, and starts it anew."""
        self.stop()
        self._role = role
        argv = [
            *self._command,
            *("--host", self._ip, "--port", str(self._port)),
            *("--disaggregation-mode", role),
            *("--disaggregation-bootstrap-port", str(self._bootstrap_port)),
        ]
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", DIE_WITH_US, str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its scheduler and detokenizer, too
        process.wait(timeout=END_S)

    def state(self) -> dict[str, Any]:
        process = self._process
        code = None if process is None else process.poll()
        runs = process is not None and code is None
        return {
            "name": self._name,
            "url": f"http://{self._ip}:{self._port}",
            "bootstrap_port": self._bootstrap_port,
            "role": self._role,
            "runs": runs,
            "ready": runs and self._is_ready(),
            "words": "" if runs else self._last_words(code),
        }

    def _is_ready(self) -> bool:
        for page in READY_PAGES:
            try:
                url = f"http://{self._ip}:{self._port}{page}"
                with urllib.request.urlopen(url, timeout=1.0) as answer:
                    return bool(answer.status == 200)
            except urllib.error.HTTPError:
                continue  # an older server has no such page
            except (OSError, ValueError):
                return False
        return False

    def _last_words(self, code: int | None) -> str:
        try:
            lines = self._log.read_bytes()[self._log_from :].decode(errors="replace").splitlines()
        except OSError:
            lines = []
        ended = "it does not run" if code is None else f"it ended with {code}"
        return " | ".join([ended, *lines[-LOG_LINES:]])


class Holder:
    """The lease: only one actor of a namespace can have its name, and it ends with its owner."""

    def __init__(self, us: str) -> None:
        self._us = us

    def holder(self) -> str:
        return self._us


def free_ports(ip: str) -> Iterator[int]:
    """Below those that the system gives to connections, so that a free one stays free."""
    span = HIGHEST_PORT - LOWEST_PORT
    start = os.getpid() * 37 % span
    for step in range(span):
        port = LOWEST_PORT + (start + step) % span
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((ip, port))
            except OSError:
                continue
        yield port
