"""molex inspect PATH: what is in a mixture's or an adapter's folder; with --routing, what its routers do."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molex.commands.console import Json, console, table
from molex.errors import ConfigError

if TYPE_CHECKING:
    from molex.evaluation.heat_map import Panel


def inspect(
    path: Annotated[Path, typer.Argument(help="A folder written by molex, or a PEFT LoRA adapter.")],
    as_json: Json = False,
    routing: Annotated[
        bool, typer.Option("--routing", help="Load a mixture and show its routing: routing.html, routing.png, a table.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="--routing: the text to continue, shown in colours.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="--routing: how far to continue it.")] = 64,
    data: Annotated[
        Path | None, typer.Option(help="--routing: rows with `text`, or `prompt` and `completion` (.json or .jsonl).")
    ] = None,
    label: Annotated[str, typer.Option(help="--routing: the column of --data that tells the panels apart.")] = "skill",
    out: Annotated[Path, typer.Option(help="--routing: where the page and the picture go.")] = Path("runs/routing"),
) -> None:
    """Show what is in a mixture or an adapter: layers, experts, sizes. Only --routing reads more than headers."""
    if routing:
        if prompt is None:
            raise ConfigError("--routing shows a text: give its beginning with --prompt")
        _show_routing(path, prompt, max_new_tokens, data, label, out, as_json)
        return
    if prompt is not None or data is not None:
        raise ConfigError("--prompt and --data go with --routing; add it, or leave them out")
    from molex.io.inspect import describe

    description = asdict(describe(path))
    if as_json:
        typer.echo(json.dumps(description, indent=2, ensure_ascii=False))
        return
    layers, (fewest, most) = description.pop("layers"), description["num_experts"]
    description["num_experts"] = fewest if fewest == most else f"{fewest} to {most}"
    console.print(table([{"what": key, "value": value} for key, value in description.items()], str(path)))
    console.print(table(layers, "layers"))


def _show_routing(
    path: Path, prompt: str, max_new_tokens: int, data: Path | None, label: str, out: Path, as_json: bool
) -> None:
    """Writes the page and the picture, and prints the mean weights. Without --data the prompt is the only panel."""
    from molex.evaluation.figures import check_plots
    from molex.evaluation.heat_map import routing_by_label, routing_heat_map
    from molex.evaluation.opening import open_model, open_tokenizer
    from molex.evaluation.routing_page import write_page
    from molex.evaluation.rows import labelled_texts, read_rows
    from molex.mixture import Mixture

    texts, labels = ([prompt], ["prompt"]) if data is None else labelled_texts(read_rows(data), label)
    model = open_model(path)
    mixture, tokenizer = Mixture.of(model), open_tokenizer(None, model, path)
    panels = routing_by_label(mixture, tokenizer, texts, labels)
    write_page(mixture, tokenizer, prompt, out / "routing.html", max_new_tokens)
    written = [str(out / "routing.html")]
    try:
        check_plots()
    except ConfigError as error:
        typer.echo(f"no routing.png: {error}", err=True)
    else:
        routing_heat_map(panels, out / "routing.png", experts=mixture.experts, title=str(path))
        written.append(str(out / "routing.png"))
    if as_json:
        numbers = {name: {layer: row.tolist() for layer, row in panel.items()} for name, panel in panels.items()}
        typer.echo(json.dumps({"files": written, "experts": mixture.experts, "mean_weights": numbers}, indent=2))
        return
    console.print(table(_mean_rows(panels, mixture.experts), "mean weight over layers"))
    console.print(f"Written: {', '.join(written)}", highlight=False, markup=False, soft_wrap=True)


def _mean_rows(panels: "Mapping[str, Panel]", experts: list[str]) -> list[dict[str, str]]:
    """A row for each expert, a column for each label; a layer without an expert counts as 0."""
    return [
        {"expert": expert, **{label: f"{_mean(panel, expert_id):.3f}" for label, panel in panels.items()}}
        for expert_id, expert in enumerate(experts)
    ]


def _mean(panel: "Panel", expert_id: int) -> float:
    return sum(float(row[expert_id]) for row in panel.values() if expert_id < len(row)) / len(panel)
