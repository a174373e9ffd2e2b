"""molex inspect PATH: what is in a mixture's or an adapter's folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from molex.commands.console import Json, console, table


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
    console.print(table([{"what": key, "value": value} for key, value in description.items()], str(path)))
    console.print(table(layers, "layers"))
