"""The process that owns a fleet's servers: it starts them on request and outlives none of them.

On a CPU it imports SGLang once and forks every server (importing costs 10 s of CPU and a stock
server pays it three times); on a GPU it runs stock server processes. It reads one JSON command a
line from its standard input and writes one JSON event a line to its standard output; the end of
its input ends the fleet, and so does the death of its parent.

Runs inside the interpreter that has SGLang: the standard library is all it may import by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from backends.fleet.stand_ins import import_torch, send_plain_indices

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SCRATCH = "slackwater-fleet-"
"""Its folder of temporary files is named by this and its process id."""
POLL_S = 0.05
ARCHITECTURES = {"llama", "qwen2", "qwen3", "registry", "utils"}
"""Model files worth importing on a CPU; each of the other 200 costs start-up time."""
IMPORTED_ONCE = (
    "sglang.launch_server",
    "sglang.srt.arg_groups.pipeline",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang.srt.models.llama",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.disaggregation.mooncake.conn",
    "sglang.srt.model_loader.loader",
)
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_HOST_IP": "127.0.0.1",
    "MOONCAKE_PROTOCOL": "tcp",
    "MC_FORCE_TCP": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # penalties are compiled, and a compiler asks triton what it is
}

Serve = Callable[[list[str]], None]


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """What a server leaves behind becomes a child of this process, which can then end it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def follow_parents() -> None:
    """Every process forked from here on, by whomever, ends with the one that forked it."""
    parents = [os.getpid()]

    def note() -> None:
        parents[0] = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: die_with(parents[0]))


def skip_other_architectures() -> str:
    """The model modules that SGLang's registry should leave alone, as its variable wants them."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    models = Path(torch.origin).parents[1] / "sglang" / "srt" / "models"
    names = (module.name for module in pkgutil.iter_modules([str(models)]))
    return ",".join(name for name in names if name not in ARCHITECTURES)


def import_sglang() -> Serve:
    """Everything a server needs, in memory that its forks share."""
    warnings.filterwarnings("ignore")
    os.environ |= {**CPU_ENVIRONMENT, "SGLANG_DISABLED_MODEL_ARCHS": skip_other_architectures()}
    fork_instead_of_spawn()
    import_torch()
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    send_plain_indices()
    gc.collect()
    gc.freeze()  # a collector that never visits these objects leaves their pages shared
    return serve_with_imported_sglang


def fork_instead_of_spawn() -> None:
    """SGLang asks for "spawn" by name; a forked child has everything imported already."""
    set_start_method = multiprocessing.set_start_method
    set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: set_start_method(
        "fork", force=True
    )


def serve_with_imported_sglang(argv: list[str]) -> None:
    launch: Any = importlib.import_module("sglang.launch_server")
    arguments: Any = importlib.import_module("sglang.srt.server_args")
    launch.run_server(arguments.prepare_server_args(argv))


def replace_by(program: list[str]) -> Serve:
    """A stock server process; what the kernel was told of its parent survives the exec."""
    return lambda argv: os.execv(sys.executable, [sys.executable, *program, *argv])


class Spawner:
    """Servers by name, each in a process group of its own."""

    def __init__(self, serve: Serve, events: int, scratch: str) -> None:
        self.serve, self.events, self.scratch = serve, events, scratch
        self.names: dict[int, str] = {}

    def tell(self, event: str, **details: object) -> None:
        os.write(self.events, json.dumps({"event": event, **details}).encode() + b"\n")

    def start(self, name: str, argv: list[str], env: dict[str, str], log: str) -> None:
        pid = os.fork()
        if pid == 0:
            self._become(argv, env, log)
        with contextlib.suppress(OSError):  # it has done so itself, and runs another program by now
            os.setpgid(pid, pid)
        self.names[pid] = name
        self.tell("started", name=name, pid=pid)

    def _become(self, argv: list[str], env: dict[str, str], log: str) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            redirect(log)
            os.close(self.events)
            folder = tempfile.mkdtemp(dir=self.scratch)
            os.environ |= {"PROMETHEUS_MULTIPROC_DIR": folder, **env}
            sys.path += filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
            self.serve(argv)
            code = 0
        except SystemExit as ended:  # whoever raised it has said why
            code = exit_status(ended)
        except BaseException:  # noqa: BLE001 - the edge of a process: its log is the only witness
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def kill(self, name: str, number: int) -> None:
        for pid in [pid for pid, of in self.names.items() if of == name]:
            if number == signal.SIGKILL:
                unlink_shared_memory(pid)
            end_group(pid, number)

    def reap(self, options: int = os.WNOHANG) -> None:
        while self.names:
            pid, status = os.waitpid(-1, options)
            if not pid:
                return
            if pid in self.names:
                end_group(pid, signal.SIGKILL)  # its scheduler and detokenizer
                name = self.names.pop(pid)
                self.end_orphans()
                self.tell("ended", name=name, code=os.waitstatus_to_exitcode(status))

    def end_orphans(self) -> None:
        """Whoever has left a dead server's group may still hold its port or its memory."""
        for pid in children_of(os.getpid()):
            if pid not in self.names:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for pid in self.names:
            unlink_shared_memory(pid)
            end_group(pid, signal.SIGKILL)
        self.names.clear()
        while children_of(os.getpid()):
            self.end_orphans()
            os.waitpid(-1, 0)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def obey(self, command: dict[str, Any]) -> None:
        actions: dict[str, Callable[..., None]] = {"start": self.start, "kill": self.kill}
        actions[command.pop("do")](**command)

    def run(self) -> None:
        """Until the input ends."""
        pending = b""
        while True:
            ready, _, _ = select.select([0], [], [], POLL_S)
            self.reap()
            if not ready:
                continue
            if not (got := os.read(0, 1 << 16)):
                return
            *lines, pending = (pending + got).split(b"\n")
            for line in lines:
                self.obey(json.loads(line))


def unlink_shared_memory(pid: int) -> None:
    """What a killed server cannot remove itself; SGLang shares its load counters in such files."""
    try:
        members = (pid, *children_of(pid))
        maps = [Path(f"/proc/{member}/maps").read_text() for member in members]
    except OSError:
        return
    lines = "".join(maps).splitlines()
    for path in {line.rpartition(" ")[2] for line in lines if " /dev/shm/sglang_" in line}:
        Path(path).unlink(missing_ok=True)


def children_of(pid: int) -> list[int]:
    """Of all its threads, zombies too."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, listed.read_text().split())
    return found


def end_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def redirect(log: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)


def exit_status(ended: SystemExit) -> int:
    """As the interpreter would have it: a text is written out and means failure."""
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    sys.stderr.write(f"{ended.code}\n")
    return 1


def sweep(folder: Path) -> None:
    """Removes what killed predecessors left."""
    for left in folder.glob(f"{SCRATCH}*-*"):
        owner = Path("/proc", left.name.removeprefix(SCRATCH).partition("-")[0])
        try:
            alive = bool((owner / "cmdline").read_bytes())  # a zombie has none
        except OSError:
            alive = False
        if not alive:
            shutil.rmtree(left, ignore_errors=True)


def leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: list[str]) -> None:
    """argv: parent's pid, the log for what importing prints, then a program to run or nothing."""
    parent, log, *program = argv
    die_with(int(parent))
    events = os.dup(1)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sweep(Path(tempfile.gettempdir()))
    scratch = tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-")
    os.environ |= {"PROMETHEUS_MULTIPROC_DIR": scratch, "TMPDIR": scratch}
    tempfile.tempdir = scratch
    follow_parents()
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    spawner = Spawner(replace_by(program), events, scratch)
    try:
        if not program:
            spawner.serve = import_sglang()
        spawner.tell("ready")
        spawner.run()
    except ImportError as error:
        traceback.print_exc()
        spawner.tell("missing", module=error.name, message=str(error))
    finally:
        spawner.end()
