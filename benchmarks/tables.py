"""The docs' tables from results/*.jsonl: of every configuration the newest row, whoever lost in it.

    python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`, under it on what it was measured. Cells are ratios,
median (10th to 90th percentile).
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import kernel_tables, serving_tables
from benchmarks.harness import RESULTS
from benchmarks.table_parts import Row, read

DOCS = Path(__file__).parent.parent / "docs"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.S)
Tables = dict[str, Callable[[list[Row]], str]]  # by the name of the results
PAGES: dict[Path, Tables] = {
    DOCS / "kernels.md": kernel_tables.TABLES,
    DOCS / "serving_performance.md": serving_tables.TABLES,
}
TABLES: Tables = kernel_tables.TABLES | serving_tables.TABLES


def render(page: str, results: Path) -> str:
    """The page with every table made anew."""

    def made(match: re.Match[str]) -> str:
        rows = read(results / f"{match[2]}.jsonl")
        return f"{match[1]}\n{TABLES[match[2]](rows) if rows else 'Nothing measured yet.'}\n\n{match[3]}"

    return MARKED.sub(made, page)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text(), RESULTS))
        print(page)


if __name__ == "__main__":
    main()
