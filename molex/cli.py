"""The command line:  molex demo | methods | inspect PATH   (also python -m molex ...).

Tables for people, `--json` where a script would read; errors of molex are one sentence on stderr and exit code 1.
"""

import inspect as python_inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molex.errors import MolexError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
console = Console()

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.callback()
def molex() -> None:
    """Mixtures of LoRA experts, in one library."""


@app.command()
def methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/methods.md.")] = False,
) -> None:
    """List the published methods that are presets: paper and equation."""
    rows = method_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if markdown:
        typer.echo(method_pages(rows))
        return
    console.print(_table(rows, "molex.preset(name, **overrides)"))


def method_rows() -> list[dict[str, str]]:
    """One row for each preset, from its docstring and its defaults."""
    from molex.config import MixtureConfig
    from molex.experts import expert_kinds
    from molex.presets import presets

    rows = []
    for name in presets:
        title, equation, _ = _doc_parts(python_inspect.getdoc(presets[name]) or "")
        config: MixtureConfig = presets[name]()
        scope = "model" if config.router.model_scope else config.scope
        experts = f"{config.num_experts} x {expert_kinds.name_of(type(config.experts))} r{config.rank}"
        rows.append({"preset": name, "method": title, "equation": equation, "scope": scope, "experts": experts})
    return rows


def method_pages(rows: list[dict[str, str]]) -> str:
    """docs/methods.md: each preset's docstring and its own settings with their defaults."""
    from molex.config import part_settings
    from molex.presets import presets

    pages = ["# Methods\n\nEvery preset, as its docstring has it. Written by `molex methods --markdown`; settings in"]
    pages[0] += " common are\nin [converting.md](converting.md).\n"
    for row in rows:
        _, _, notes = _doc_parts(python_inspect.getdoc(presets[row["preset"]]) or "")
        settings = ", ".join(f"`{k}={v!r}`" for k, v in part_settings(presets[row["preset"]]()).items())
        pages.append(f"## {row['preset']}\n\n{row['method']}.\n\n    {row['equation']}\n")
        pages.append(f"{notes}\n\nIts own settings: {settings or 'none'}.\n")
    return "\n".join(pages).rstrip()


def _doc_parts(doc: str) -> tuple[str, str, str]:
    """A preset's docstring: the method and its paper, the equation, the deviations."""
    title, equation, *rest = doc.split("\n\n")
    return title.rstrip("."), " ".join(equation.split()), "\n\n".join(rest)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A folder written by molex, or a PEFT LoRA adapter.")],
    as_json: Json = False,
) -> None:
    """Show what is in a mixture or an adapter: layers, experts, router, sizes. Reads headers only."""
    from molex.io.inspect import describe

    description = asdict(describe(path))
    if as_json:
        typer.echo(json.dumps(description, indent=2, ensure_ascii=False))
        return
    layers, (fewest, most) = description.pop("layers"), description["num_experts"]
    description["num_experts"] = fewest if fewest == most else f"{fewest} to {most}"
    console.print(_table([{"what": key, "value": value} for key, value in description.items()], str(path)))
    console.print(_table(layers, "layers"))


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Records as a table; long cells are folded, never cut. Cells and titles are the user's own text, not markup."""
    table = Table(title=Text(title))
    for column in rows[0]:
        table.add_column(column, overflow="fold", no_wrap=column == "preset")
    for row in rows:
        table.add_row(*[Text(_plain(cell)) for cell in row.values()])
    return table


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where tables, curves, heat map and mixtures go.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the three compared methods.")] = 100,
) -> None:
    """Turn a small dense model into mixtures by every method: train, compare, save, reload, generate. Offline."""
    from molex.workbench.demo import run_demo

    run_demo(out, console, steps)


def main() -> None:
    """The console script: user errors are one sentence, not a traceback."""
    try:
        app()
    except MolexError as error:
        sentence = Text.assemble(("error: ", "red"), str(error))  # no markup: paths and values may hold brackets
        Console(stderr=True).print(sentence, highlight=False, soft_wrap=True)
        sys.exit(1)
