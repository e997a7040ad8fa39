"""A PostgreSQL server of our own, for a measurement or a test: a socket in a folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HASTE = ("fsync", "synchronous_commit", "full_page_writes", "jit")
"""Off where nothing has to outlive the server. Just-in-time compilation makes no answer another,
and costs more than all else where each connection asks for each thing once."""
LEFT_OUT = "left out: what needs PostgreSQL, whose initdb is not installed"


def programs() -> Path | None:
    """The folder with initdb; Debian keeps it off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def is_installed() -> bool:
    return programs() is not None


@contextmanager
def running(*, durable: bool = True) -> Iterator[str]:
    """The address of an empty database; the server ends with the block."""
    bin_folder = programs()
    assert bin_folder is not None, LEFT_OUT
    folder = Path(tempfile.mkdtemp(prefix="slackwater-pg-"))
    user = _user(folder)
    control = [str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-w"]
    options = f"-k {folder} -c listen_addresses= -c max_connections=60"
    if not durable:
        options += "".join(f" -c {name}=off" for name in HASTE)

    def run(*command: str) -> None:
        group = None if user is None else pwd.getpwnam(user).pw_gid
        groups = None if user is None else list[int]()
        with (folder / "log").open("ab") as log:
            subprocess.run(
                command, check=True, cwd=folder, stdout=log, stderr=log,
                user=user, group=group, extra_groups=groups,
            )  # fmt: skip

    try:
        data = str(folder / "data")
        run(str(bin_folder / "initdb"), "-D", data, "-U", "slackwater", "-A", "trust", "-N")
        run(*control, "-o", options, "start")
        try:
            yield f"postgresql://slackwater@/postgres?host={folder}"
        finally:
            run(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _user(folder: Path) -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    entry = pwd.getpwnam(user)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return user
