"""What every command prints with: one console, one kind of table, one `--json` flag."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)  # a file has no width

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Records as a table; long cells are folded, never cut. Cells and titles are the user's own text, not markup."""
    made = Table(title=Text(title))
    for column in rows[0]:
        made.add_column(column, overflow="fold", no_wrap=column == "preset")
    for row in rows:
        made.add_row(*[Text(_plain(cell)) for cell in row.values()])
    return made


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
