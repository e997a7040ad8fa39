"""Tables are whole for every reader."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from gateway import terminal

NAME = "a-server-with-a-rather-long-name.in.some.data-center.example.com:30000"


def test_a_pipe_gets_tables_as_wide_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("server", "role", "model")
    table.add_row(NAME, "prefill", "m" * 90)
    terminal.console().print(terminal.whole(table))
    assert f"│ {NAME} │ prefill │ {'m' * 90} │" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [30, 60, 80])
def test_a_narrow_terminal_gets_every_letter(columns: int) -> None:
    table = Table("server", "role")
    table.add_column("state", no_wrap=True)
    table.add_row(NAME, "prefill", "up")
    out = io.StringIO()
    Console(file=out, width=columns).print(terminal.whole(table))
    rows = [line.split("│") for line in out.getvalue().splitlines() if line.startswith("│")]
    assert "".join(row[1].strip() for row in rows) == NAME
    assert max(map(len, out.getvalue().splitlines())) <= columns
