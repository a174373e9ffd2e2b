"""molex export PATH: a saved mixture as a native mixture-of-experts checkpoint, or as PEFT adapters."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molex.commands.console import Json, console, table
from molex.errors import ConfigError

if TYPE_CHECKING:
    from molex.io.native import NativeExport


def export(
    path: Annotated[Path, typer.Argument(help="A folder written by mixture.save.")],
    to: Annotated[
        Literal["native", "peft"], typer.Option(help="One native checkpoint, or an adapter for each expert.")
    ],
    out: Annotated[Path, typer.Option(help="Where the export goes: a new or an empty folder.")],
    target: Annotated[str, typer.Option(help="What runs it: transformers, vllm or llama.cpp.")] = "transformers",
    family: Annotated[str | None, typer.Option(help="The native architecture, where several would do.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id of a tokenizer to write beside it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Forecast the sizes, write nothing.")] = False,
    check: Annotated[bool, typer.Option(help="Load the result and compare it with the mixture.")] = True,
    as_json: Json = False,
) -> None:
    """Export a mixture to what other programs load; docs/exporting.md says what they can express."""
    import molex

    if to == "peft":
        if dry_run or family or tokenizer:
            raise ConfigError("--dry-run, --family and --tokenizer go with --to native; leave them out")
        folders = molex.load(path).export_peft(out)
        _show([{"adapter": folder.name, "folder": str(folder)} for folder in folders], str(out), as_json)
        return
    from transformers import AutoTokenizer

    from molex.io.native import export_native

    mixture = molex.load(path)
    report = export_native(mixture, out, target, family=family, dry_run=True)
    if not dry_run:
        if not as_json:
            console.print(f"{report.family} for {target}: {report.forecast}", highlight=False)
        beside = None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
        report = export_native(mixture, out, target, family=family, tokenizer=beside, check=check)
    _show([_row(report)], str(out), as_json)


def _row(report: "NativeExport") -> dict[str, Any]:
    """Flat, for a table and for scripts."""
    row = asdict(report)
    sizes, agreement = row.pop("forecast"), row.pop("agreement")
    measured = {"difference": None} if agreement is None else agreement._asdict()
    return {**row, **sizes, "ratio": round(report.forecast.ratio, 3), **measured}


def _show(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif len(rows) == 1:
        console.print(table([{"what": key, "value": value} for key, value in rows[0].items()], title))
    elif rows:
        console.print(table(rows, title))
