"""Merge adapters by every rule and see what each keeps: a table of rules against skills.

    python recipes/merge_checkpoint.py                               trains an adapter a skill on the workbench first
    python recipes/merge_checkpoint.py --adapters upper=runs/a sort=runs/b     takes these, trained on its base

Rows are the base, each adapter alone, each rule, and a soup whose weights were learned on a few examples. A rule gives
every adapter the same weight, the one of --weights with the lowest loss on validation rows. Columns are that weight,
exact match on each skill, the merged update's norm, and how far it is from the weighted sum of its sources.
`molex merge` then writes the one you like.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import HfArgumentParser, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import molex
from molex.commands.console import table
from molex.io.adapter import Adapter
from molex.io.peft import read_adapter
from molex.library import Factors
from molex.merging import Merged, learn_soup, make_rule, merge_factors, rules
from molex.merging.evaluating import mean_loss
from molex.merging.folding import fold
from molex.workbench import collate, dataset, exact_match_by_skill, load_base, load_tokenizer
from molex.workbench.training import Run, fit


@dataclass
class Arguments:
    """What is merged, and how it is measured."""

    skills: list[str] = field(default_factory=lambda: ["upper", "sort", "ends"])
    adapters: list[str] = field(default_factory=list, metadata={"help": "name=folder, instead of training some"})
    rules: list[str] = field(default_factory=lambda: [*rules])
    out: Path = Path("runs/merge_checkpoint")
    weights: list[float] = field(default_factory=lambda: [0.35, 0.6, 1.0])
    train_steps: int = 120
    rank: int = 8
    test_rows: int = 40
    soup_steps: int = 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains or reads adapters, merges them, prints the table."""
    (options,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)  # type: ignore[arg-type]
    disable_progress_bar()
    console = Console()
    adapters = read(options.adapters) if options.adapters else train(options)
    factors = {adapter.name: adapter.factors for adapter in adapters}
    skills = [adapter.name for adapter in adapters] if options.adapters else options.skills
    rows = [measured("base", None, skills, options)]
    for adapter in adapters:
        alone = merge_factors({adapter.name: adapter.factors}, make_rule("linear"))
        rows.append(measured(f"{adapter.name} alone", alone, skills, options))
    for name in track(options.rules, "merging", console=console, transient=True):
        weight, merged = best(name, factors, skills, options)
        rows.append(measured(name, merged, skills, options, weight))
    rows.append(measured("soup", soup(adapters, skills, options), skills, options))
    console.print(table(rows, f"{len(adapters)} adapters merged"))


def train(options: Arguments) -> list[Adapter]:
    """One LoRA for each skill, on all linears of the workbench's base, written as PEFT folders."""
    adapters = []
    for skill in options.skills:
        torch.manual_seed(0)
        mixture = molex.convert(load_base(), molex.preset("lora", rank=options.rank, alpha=2.0 * options.rank))
        rows = dataset([skill], "train", options.train_steps * 48)
        fit(mixture, load_tokenizer(), rows, Run(steps=options.train_steps))
        (folder,) = mixture.export_peft(options.out / skill)
        adapters.append(read_adapter(folder, skill))
    return adapters


def read(named: Sequence[str]) -> list[Adapter]:
    """Adapters from name=folder."""
    pairs = [entry.partition("=") for entry in named]
    return [read_adapter(folder, name) for name, _, folder in pairs]


def best(name: str, factors: Mapping[str, Factors], skills: Sequence[str], options: Arguments) -> tuple[float, Merged]:
    """The weight, the same for all, at which a rule's merge has the lowest loss, and that merge."""
    batch = collate(dataset(skills, "validation", 48), load_tokenizer())
    tried = {w: merge_factors(factors, make_rule(name), [w] * len(factors)) for w in options.weights}
    losses = {weight: mean_loss(with_update(merged), [batch]) for weight, merged in tried.items()}
    weight = min(losses, key=losses.__getitem__)
    return weight, tried[weight]


def with_update(merged: Merged | None) -> PreTrainedModel:
    """The workbench's base, with a merged update folded in."""
    model = load_base()
    if merged is not None:
        fold(model, merged.factors)
    return model


def soup(adapters: Sequence[Adapter], skills: Sequence[str], options: Arguments) -> Merged:
    """Weights for each linear, learned on a few validation rows of all skills."""
    rows = dataset(skills, "validation", 48)
    given = {adapter.name: adapter for adapter in adapters}
    weights = learn_soup(load_base(), given, [collate(rows, load_tokenizer())], steps=options.soup_steps)
    return merge_factors({adapter.name: adapter.factors for adapter in adapters}, make_rule("linear"), weights)


def measured(
    name: str, merged: Merged | None, skills: Sequence[str], options: Arguments, weight: float | None = None
) -> Mapping[str, Any]:
    """One row: exact match on each skill of the base with a merged update folded in."""
    model = with_update(merged)
    rows = dataset(skills, "test", options.test_rows * len(skills))
    scores = exact_match_by_skill(model, load_tokenizer(), rows)
    row: dict[str, Any] = {"merge": name, "weight": "" if weight is None else weight}
    row |= {skill: f"{score:.2f}" for skill, score in scores.items()}
    row["mean"] = f"{sum(scores.values()) / len(scores):.2f}"
    layers = () if merged is None else merged.layers
    size = sum(layer.norm**2 for layer in layers) ** 0.5
    row["norm"] = f"{size:.1f}"
    row["from sum"] = f"{max((layer.from_sum for layer in layers), default=0.0):.2f}"
    return row


if __name__ == "__main__":
    main()
