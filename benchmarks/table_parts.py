"""What tables are made of: the newest row of each configuration, cells of ratios, and on what they were measured."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
UNTIMED = ("preset", "waits", "mib")  # rows that have these say what was counted
BY_THE_WALL = ("loop", "load")  # and these, how long requests took


def read(path: Path) -> list[Row]:
    """Oldest first."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda row: row["date"])


def newest(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], Row]:
    """The last row for each device and values of the fields."""
    found = {(device(row), *(row.get(field) for field in fields)): row for row in rows}
    return dict(sorted(found.items(), key=lambda item: [str(part) for part in item[0]]))


def device(row: Row) -> str:
    return row["gpu"] if row.get("device") == "cuda" else row["cpu"]


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def cell(ratio: dict[str, float] | float | None) -> str:
    if ratio is None:
        return ""
    if not isinstance(ratio, dict):
        return f"{ratio:.2f}"
    return "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**ratio)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    all_lines = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in all_lines)


def measured_on(rows: Iterable[Row]) -> str:
    """A line for every machine, commit and day, with the load that a CPU had where something was timed."""
    loads: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        versions = [f"{name} {row[name]}" for name in ("torch", "triton", "peft", "cuda", "driver") if name in row]
        line = ", ".join([_where(row), *versions, f"commit {row['commit']}", row["date"][:10]])
        loads[line].add(round(row["load_1min"]))
    return "\n".join(f"{line}{_load(found) if ' time, ' in line else ''}." for line, found in loads.items())


def _where(row: Row) -> str:
    if row.get("device") == "cuda" or not row.keys().isdisjoint(UNTIMED):
        return device(row)
    if not row.keys().isdisjoint(BY_THE_WALL):
        return f"{device(row)}, wall time"
    clock = "1 thread, process time" if row["threads"] == 1 else f"{row['threads']} threads, wall time"
    return f"{device(row)}, {clock}"


def _load(found: set[int]) -> str:
    return f", load {min(found)}" + (f" to {max(found)}" if len(found) > 1 else "")


def section(title: str, body: str, rows: Iterable[Row]) -> str:
    return f"{title}\n\n{body}\n\n{measured_on(rows)}"


def by_contestant(columns: dict[str, dict[str, str]]) -> str:
    """columns: header -> contestant -> cell. Contestants in the order they first come in."""
    names = dict.fromkeys(name for cells in columns.values() for name in cells)
    return table(
        ["", *columns], ([f"`{name}`", *(cells.get(name, "") for cells in columns.values())] for name in names)
    )
