"""Where results are written: looked at before anything runs, and never worth its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backends.words import in_words
from gateway.settings import ConfigError
from gateway.simulation.records import LogWriter, Record, RunFacts


def check_page(path: Path) -> None:
    """An earlier report stays as it is until there is a new one."""
    if not path.parent.is_dir():
        raise ConfigError(f"--html: there is no folder {path.parent}")
    is_new = not path.exists()
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--html: {in_words(error)}") from error


def write_page(path: Path, text: str) -> str:
    """What went wrong, if anything did."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"--html {path}: {in_words(error)}"
    return ""


class RequestLog:
    """The log of --log: where it cannot be written any more, the runs go on without it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._log = LogWriter(folder)
        except OSError as error:
            raise ConfigError(f"--log: {in_words(error)}") from error
        self.trouble = ""

    def write(self, facts: RunFacts, records: Sequence[Record]) -> None:
        if self.trouble:
            return
        try:
            self._log.write(facts, records)
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        try:
            self._log.close()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.trouble = self.trouble or f"--log {self._folder}: {in_words(error)}"
