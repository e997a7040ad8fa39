"""A PostgreSQL server of the tests' own, where its programs are installed: a socket in a folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFT_OUT = (
    "left out: the batch store's tests on PostgreSQL, whose initdb is not installed "
    "(apt-get install postgresql)"
)


def programs() -> Path | None:
    """The folder with initdb; Debian keeps it off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def is_included() -> bool:
    """Whether it is installed, or its absence is to be a failure."""
    return os.environ.get("SLACKWATER_REQUIRE_POSTGRES") == "1" or programs() is not None


@contextmanager
def postgres() -> Iterator[str]:
    """The address of an empty database; the server ends with the block."""
    bin_folder = programs()
    assert bin_folder is not None, LEFT_OUT
    folder = Path(tempfile.mkdtemp(prefix="slackwater-pg-"))
    user = _user(folder)
    data = folder / "data"
    control = [str(bin_folder / "pg_ctl"), "-D", str(data), "-w"]
    options = f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=60"

    def run(*command: str) -> None:
        with (folder / "log").open("ab") as log:
            subprocess.run(
                command, check=True, cwd=folder, stdout=log, stderr=log,
                user=user, group=None if user is None else pwd.getpwnam(user).pw_gid,
                extra_groups=None if user is None else [],
            )  # fmt: skip

    try:
        run(str(bin_folder / "initdb"), "-D", str(data), "-U", "slackwater", "-A", "trust", "-N")
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
