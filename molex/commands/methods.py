"""molex methods: every preset with its paper and equation, from the presets' own docstrings."""

import inspect
import json
from typing import Annotated

import typer

from molex.commands.console import Json, console, table


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
    console.print(table(rows, "molex.preset(name, **overrides)"))


def method_rows() -> list[dict[str, str]]:
    """One row for each preset, from its docstring and its defaults."""
    from molex.config import MixtureConfig
    from molex.experts import expert_kinds
    from molex.presets import presets

    rows = []
    for name in presets:
        title, equation, _ = _doc_parts(inspect.getdoc(presets[name]) or "")
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
        _, _, notes = _doc_parts(inspect.getdoc(presets[row["preset"]]) or "")
        settings = ", ".join(f"`{k}={v!r}`" for k, v in part_settings(presets[row["preset"]]()).items())
        pages.append(f"## {row['preset']}\n\n{row['method']}.\n\n    {row['equation']}\n")
        pages.append(f"{notes}\n\nIts own settings: {settings or 'none'}.\n")
    return "\n".join(pages).rstrip()


def _doc_parts(doc: str) -> tuple[str, str, str]:
    """A preset's docstring: the method and its paper, the equation, the deviations."""
    title, equation, *rest = doc.split("\n\n")
    return title.rstrip("."), " ".join(equation.split()), "\n\n".join(rest)
