"""Starts the programs under measurement, and reads from the kernel what they used."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CPUCLOCK_SCHED = 2
STOP_S = 1.0


def free_port() -> int:
    """A port that nobody listens on now; the caller uses it soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def raise_file_limit() -> int:
    """Children inherit it; thousands of streams need two descriptors each in a proxy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def tree(pid: int) -> list[int]:
    """A process and all below it; those that have ended are left out."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                found += tree(int(child))
    return found


def cpu_s(pid: int) -> float:
    """The scheduler's own sum over all threads, in nanoseconds where the kernel lends its clock."""
    try:
        return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)
    except OSError:
        return ticked_cpu_s(pid)


def ticked_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def kib(pid: int, file: str, key: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children had used at one instant."""

    cpu_s: float
    rss_mib: float
    pss_mib: float


def usage_of(pid: int) -> Usage:
    pids = tree(pid)
    return Usage(
        cpu_s=sum(map(cpu_s, pids)),
        rss_mib=sum(kib(each, "status", "VmRSS") for each in pids) / 1024,
        pss_mib=sum(kib(each, "smaps_rollup", "Pss") for each in pids) / 1024,
    )


def machine_busy_s() -> float:
    """CPU seconds of everything on this machine, and what a hypervisor took from it."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, waiting = fields[3], fields[4]
    return (sum(fields) - idle - waiting) / TICKS_PER_S


def own_busy_s() -> float:
    """CPU seconds of this process and of all children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@dataclass(frozen=True, slots=True)
class Watch:
    """How much of the machine others used meanwhile: it tells what the figures are worth."""

    began: float
    machine_s: float
    own_s: float

    @classmethod
    def begin(cls) -> Watch:
        return cls(time.monotonic(), machine_busy_s(), own_busy_s())

    @property
    def others_cores(self) -> float:
        """Once the measured programs have ended: until then they count as others."""
        others_s = machine_busy_s() - self.machine_s - (own_busy_s() - self.own_s)
        return max(0.0, others_s / (time.monotonic() - self.began))

    def note(self) -> str:
        cores, of = self.others_cores, os.cpu_count()
        worth = "a quiet machine" if cores < 0.1 else "ratios hold better than figures"
        return f"other programs used {cores:.2f} of {of} cores meanwhile: {worth}"


class DidNotStart(RuntimeError):
    """A program ended, or stayed silent, before it could serve; carries what it said last."""


@dataclass(slots=True)
class Running:
    """A program that we started; ended by its own id, with its children."""

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def usage(self) -> Usage:
        return usage_of(self.pid)

    def last_words(self, most_bytes: int = 2000) -> str:
        end = os.fstat(self.log.fileno()).st_size
        tail = os.pread(self.log.fileno(), most_bytes, max(0, end - most_bytes))
        return tail.decode(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """To the whole session: a launcher's child must not outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def has_ended_by(self, deadline: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        return self.ended


def stop(running: list[Running]) -> None:
    """All together: each may take its time to drain, and nobody waits for it one by one."""
    for each in running:
        each.signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_S
    for each in running:
        each.has_ended_by(deadline)
        each.signal(signal.SIGKILL)
        each.process.wait()
        each.log.close()


def start(name: str, command: Iterable[str], *, cwd: Path | None = None) -> Running:
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        start_new_session=True,
    )
    return Running(name, process, log)


@contextlib.contextmanager
def all_stopped() -> Iterator[list[Running]]:
    """A list to put started programs on; whatever happens, they end with the block."""
    running: list[Running] = []
    try:
        yield running
    finally:
        stop(running)


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This process, and what it starts: children have the cores of their parent."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def cores_shared_out(
    *, pinned: bool
) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """A core for the one program under measurement, to be started in the block that is given here;
    its clients and servers, which have machines of their own elsewhere, have the others."""
    its, *others = sorted(os.sched_getaffinity(0))
    if not pinned or not others:
        yield contextlib.nullcontext
        return
    with on_cores(set(others)):
        yield lambda: on_cores({its})


def wait_until_listening(program: Running, port: int, *, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and not program.ended:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise DidNotStart(f"{program.name} does not listen on {port}: {program.last_words()}")
