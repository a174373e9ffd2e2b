"""molex merge: adapters over a base, or a mixture, into one dense checkpoint or one adapter."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from molex.commands.console import console, table
from molex.errors import ConfigError

if TYPE_CHECKING:
    from molex.merging import Merged
    from molex.merging.adapters import Output
    from molex.merging.recipe import MergeRecipe
    from molex.mixture import Mixture

RECIPE_FILE = "molex_merge.yaml"


def merge(
    source: Annotated[Path | None, typer.Argument(help="A recipe (YAML), or a mixture's folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the result goes.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="name=path or name=path:weight; once for each.")] = None,
    rule: Annotated[str | None, typer.Option(help="How to merge; see docs/merging.md.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the rule, name=value.")] = None,
    rank: Annotated[int | None, typer.Option(help="The largest rank of the merged update.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or the share of its squared norm to keep.")] = None,
    kind: Annotated[str | None, typer.Option("--as", help="dense (a checkpoint) or lora (a PEFT folder).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of what is written; by default the base's.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Of a dense checkpoint's files, such as 5GB.")] = None,
    validate: Annotated[Path | None, typer.Option(help="Rows (JSONL) to measure merges of a mixture on.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="For --validate; by default the mixture's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; read headers only.")] = False,
) -> None:
    """Merge LoRA adapters, or a mixture's experts. Streams: memory holds the adapters and one tensor of the base."""
    flags = {"base": base, "rule": rule, "rank": rank, "energy": energy, "as": kind, "dtype": dtype}
    flags |= {"shard_size": shard_size, "adapters": _adapters(adapter), "parameters": _settings(settings)}
    recipe = _recipe(source, {key: value for key, value in flags.items() if value is not None})
    if out is None and not dry_run and validate is None:
        raise ConfigError("say where the result goes: --out FOLDER (or look first: --dry-run)")
    if recipe.mixture:
        _merge_mixture(recipe, out, validate, tokenizer, dry_run)
        return
    if validate is not None or tokenizer is not None:
        raise ConfigError("--validate measures merges of a mixture; leave it, and --tokenizer, out")
    if dry_run or out is None:
        _show_plan(recipe)
    else:
        _merge_adapters(recipe, out)


def _recipe(source: Path | None, flags: dict[str, Any]) -> "MergeRecipe":
    from molex.merging.recipe import make_recipe, read_recipe

    if source is None:
        return make_recipe(flags)
    if source.is_dir():
        return make_recipe({"mixture": str(source), **flags})
    return read_recipe(source, flags)


def _adapters(given: list[str] | None) -> dict[str, Any] | None:
    """name=path or name=path:weight."""
    if not given:
        return None
    found: dict[str, Any] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or name in found:
            raise ConfigError(f"--adapter {entry}: give name=path or name=path:weight, each name once")
        before, _, last = path.rpartition(":")
        weight = _number(last) if before else None
        found[name] = {"path": path} if weight is None else {"path": before, "weight": weight}
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _settings(given: list[str] | None) -> dict[str, Any] | None:
    """name=value, values as YAML reads them."""
    import yaml

    if not given:
        return None
    pairs = [entry.partition("=") for entry in given]
    wrong = next((entry for entry, (name, equals, _) in zip(given, pairs, strict=True) if not (name and equals)), None)
    if wrong is not None:
        raise ConfigError(f"--set {wrong}: give name=value")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def _show_plan(recipe: "MergeRecipe") -> None:
    from molex.merging.preview import preview

    told = preview(recipe)
    console.print(table(told.layers, f"{recipe.rule or 'linear'} over {', '.join(recipe.adapters)}"))
    if told.files:
        console.print(table(told.files, f"a dense checkpoint, on {recipe.base}"))
    console.print("nothing was written")


def _merge_adapters(recipe: "MergeRecipe", out: Path) -> None:
    from molex.merging.adapters import merge_folder, read_sources

    rule = recipe.ready_rule()
    assert rule is not None
    with Progress(console=console, transient=True) as bar:
        merged = merge_folder(
            recipe.base,
            read_sources(recipe.adapters),
            rule,
            recipe.weights,
            out,
            _output(recipe, bar),
            rank=recipe.rank,
            energy=recipe.energy,
        )
    _tell(merged, out)


def _merge_mixture(
    recipe: "MergeRecipe", out: Path | None, validate: Path | None, tokenizer: str | None, dry_run: bool
) -> None:
    from molex.merging.saved_mixture import merge_saved, open_mixture

    if validate is not None:
        _compare(recipe, validate, tokenizer)
    saved = open_mixture(recipe.mixture)
    if dry_run or out is None:
        _show_offer(saved.mixture)
        return
    with Progress(console=console, transient=True) as bar:
        merged = merge_saved(
            saved,
            recipe.ready_rule(),
            recipe.weights,
            out,
            _output(recipe, bar),
            rank=recipe.rank,
            energy=recipe.energy,
        )
    _tell(merged, out)


def _output(recipe: "MergeRecipe", bar: "Progress") -> "Output":
    """What is written, with its progress told to the bar."""
    from molex.merging.adapters import Output

    task = bar.add_task("merging", total=None)
    return Output(
        kind=recipe.kind,
        dtype=recipe.torch_dtype(),
        shard_size=recipe.shard_size,
        texts={RECIPE_FILE: recipe.to_yaml()},
        on_layer=lambda layer: bar.update(task, description=f"merging {layer}", advance=1),
        on_tensor=lambda name: bar.update(task, description=f"writing {name}", advance=1),
    )


def _compare(recipe: "MergeRecipe", rows: Path, tokenizer: str | None) -> None:
    from transformers import AutoTokenizer

    import molex
    from molex.io.hub import source_of
    from molex.merging import compare_merges, rules
    from molex.merging.validation import validation_batches

    mixture = molex.load(recipe.mixture)
    name = tokenizer or source_of(mixture.model) or recipe.mixture
    batches = validation_batches(rows, AutoTokenizer.from_pretrained(name))
    candidates = [*rules] if recipe.rule is None else [recipe.ready_rule() or recipe.rule]
    losses = compare_merges(mixture, candidates, batches, recipe.weights, rank=recipe.rank, energy=recipe.energy)
    console.print(table([{"merge": name, "loss": f"{loss:.4f}"} for name, loss in losses.items()], str(rows)))


def _show_offer(mixture: "Mixture") -> None:
    from molex.merging import offered

    rows = [{"rule": name, "offered": told} for name, told in offered(mixture).items()]
    console.print(table(rows, "a dense equivalent"))
    console.print("nothing was written")


def _tell(merged: "Merged", out: Path) -> None:
    ranks = [report.rank for report in merged.layers]
    console.print(
        f"{out}: {len(merged.factors)} linears changed, ranks {min(ranks)} to {max(ranks)}, "
        f"error of the cut {merged.truncation:.3g}",
        highlight=False,
        soft_wrap=True,
    )
