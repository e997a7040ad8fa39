"""How wide a table is: as its reader's terminal, or as it likes where a file or a pipe reads."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

PIPE_COLUMNS = 220


def console() -> Console:
    """A pipe has no width: whatever would be cut off there would be lost."""
    out = Console(emoji=False)
    return out if out.is_terminal else Console(emoji=False, width=PIPE_COLUMNS)


def counted(number: int, what: str) -> str:
    """1 server, 2 servers."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def whole(table: Table) -> Table:
    """On a narrow terminal its cells are broken over several lines, and nothing is left out."""
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", False
    return table
