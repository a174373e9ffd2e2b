"""Every method on the same skills at the same budget of trainable parameters: `make compare`.

    python recipes/compare_methods.py --skills upper,triple,inner,ends --steps 600 --out runs/comparison

Each row is trained on all skills at once until validation is flat (or --steps), with its own best of --learning_rates
(chosen on validation, first seed), then with every seed; scores are exact match on test questions. Rows under half of
the single-skill oracle are marked "did not learn". Presets over adapters route between the experts that LoRA-Mixer's
first stage trained, at the same budget.

The papers' claims that this bench can test are rows too: MoLA's shapes, DynMoLE against plain top-k, single ranks
(SMoRA) against blocks of ranks; and what is lost when models trained on one skill each are averaged (FlyLoRA, LoRA).

Every cell is one JSON file under --out/cells; a cell that exists is not run again, so the command can be stopped and
resumed, and several may share a folder with --rows of their own. Table and plot are made from the cells there are.
"""

import json
import re
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import HfArgumentParser, LlamaForCausalLM

from molex.config import MixtureConfig
from molex.errors import ConfigError
from molex.io.loading import load
from molex.mixture import Mixture
from molex.presets import preset, presets
from molex.routers.staged import Stage, StagedRouter
from molex.surgery import convert
from molex.workbench import dataset, exact_match, load_base, load_tokenizer, skills
from molex.workbench.cells import run_cell
from molex.workbench.model import base_config
from molex.workbench.plots import bars
from molex.workbench.settings import OVER_ADAPTERS, task_types, workbench_preset
from molex.workbench.training import Run, fit

TOKENIZER = load_tokenizer()


@dataclass
class Arguments:
    """What to run; the defaults are the full comparison, hours on two cores."""

    out: str = field(default="docs/comparison", metadata={"help": "Where cells, table and plot go."})
    skills: str = field(default="", metadata={"help": "Comma-separated; all of the workbench's by default."})
    rows: str = field(default="", metadata={"help": "Comma-separated row names; all by default."})
    budget: int = field(default=600_000, metadata={"help": "Trainable parameters of every row, as near as it gets."})
    steps: int = field(default=2000, metadata={"help": "Most training steps of a cell."})
    check_every: int = field(default=200, metadata={"help": "Steps between looks at validation."})
    learning_rates: str = field(default="2e-3,5e-3,1e-2", metadata={"help": "Tried on the first seed."})
    seeds: int = field(default=3, metadata={"help": "Seeds of every row at its best learning rate."})
    test: int = field(default=100, metadata={"help": "Test questions for each skill."})


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in presets},
    "mola: rectangle": ("mola", {"allocation": "rectangle"}),
    "mola: triangle": ("mola", {"allocation": "triangle"}),
    "mola: hourglass": ("mola", {"allocation": "hourglass"}),
    "mola: diamond": ("mola", {"allocation": "diamond"}),
    "dynmole: plain top-2": ("dynmole", {"router": {"kind": "topk", "top_k": 2}, "losses": ()}),
    "smora: 8 blocks": ("mola", {"allocation": None, "num_experts": 8, "top_k": 1}),
}
DIALS = {"smora": "num_experts", "flylora": "num_experts", "moram": "num_experts", "mos": "pool_rank"}


def at_budget(row: str, num_skills: int, budget: int) -> MixtureConfig:
    """A row's configuration with its size set so that it trains about `budget` parameters."""
    preset_name, overrides = ROWS[row]
    config = workbench_preset(preset_name, num_skills).override({"train_experts": True, **overrides})
    if preset_name in OVER_ADAPTERS:
        rank = at_budget("lora-mixer", num_skills, budget).rank
        assert isinstance(rank, int)
        return config.override({"rank": rank, "alpha": 2.0 * rank, "train_experts": False})
    dial = DIALS.get(preset_name, "rank")
    values = range(16 if dial == "num_experts" else 1, 129)
    above = bisect_left(values, budget, key=lambda value: count(_sized(config, dial, value)))
    nearest = [_sized(config, dial, value) for value in values[max(above - 1, 0) : above + 1]]
    return min(nearest, key=lambda candidate: abs(count(candidate) - budget))


def _sized(config: MixtureConfig, dial: str, value: int) -> MixtureConfig:
    changes: dict[str, Any] = {dial: value}
    if dial == "rank" and config.method not in ("poly", "mhr"):
        changes["alpha"] = 2.0 * value
    if config.method in ("flylora", "moram"):  # the papers' scale is 2, a quarter of the ranks works, or all of them
        changes |= {"alpha": 2.0 * value, "top_k": value if config.method == "moram" else value // 4}
    if dial == "pool_rank":
        changes |= {"rank": 4 * value, "alpha": 8.0 * value, "private_rank": value // 2}
    return config.override(changes)


def count(config: MixtureConfig) -> int:
    """Trainable parameters, without making any."""
    with torch.device("meta"):
        return convert(LlamaForCausalLM(base_config()), config).num_parameters()["trainable"]


@dataclass(frozen=True)
class Bench:
    """The data of one comparison, and how a mixture is trained and scored on it."""

    names: list[str]
    arguments: Arguments
    out: Path

    def title(self) -> str:
        """What the numbers of this comparison are."""
        a = self.arguments
        return (
            f"Exact match on {a.test} test questions a skill ({', '.join(self.names)}), trained at most {a.steps} "
            f"steps, about {a.budget:,} trainable parameters, each row at the best of the learning rates tried for it."
        )

    def fit(self, mixture: Mixture, learning_rate: float, seed: int, steps: int) -> list[float]:
        """Trains until validation stops rising, at most `steps`; returns the validation scores."""
        scores: list[float] = []
        run = Run(steps=steps, learning_rate=learning_rate, task_types=task_types(mixture.config.method))
        rows = dataset(self.names, "train", steps * run.batch_size, seed=seed)

        def flat(step: int, loss: float) -> bool:
            if (step + 1) % self.arguments.check_every == 0 or step + 1 == steps:
                scores.append(self.score(mixture, "validation", 40))
            return len(scores) > 2 and max(scores[-2:]) <= max(scores[:-2]) and scores[-1] > 0.5

        fit(mixture, TOKENIZER, rows, run, flat)
        return scores

    def score(self, mixture: Mixture, split: str, each: int) -> float:
        """Mean exact match over the skills; methods that go by task are told the task."""
        types = task_types(mixture.config.method) or len(self.names)
        hits = []
        for task, name in enumerate(self.names):
            with mixture.using(tasks=[task % types]):
                hits.append(exact_match(mixture.model, TOKENIZER, dataset([name], split, each)))
        return fmean(hits)

    def learn(self, mixture: Mixture, learning_rate: float, seed: int) -> list[float]:
        """A method's own way of training: LoRA-Mixer has two stages, presets over adapters take its experts."""
        steps, method = self.arguments.steps, mixture.config.method
        if method in OVER_ADAPTERS:
            library = load(self.out / "experts" / str(seed))
            for expert_id in range(len(self.names)):
                mixture.load_expert(expert_id, self.names[expert_id], library.factors(expert_id))
            return self.fit(mixture, learning_rate, seed, steps // 2) if mixture.trainable_parameters() else []
        if method != "lora-mixer":
            return self.fit(mixture, learning_rate, seed, steps)
        first = self.stage(mixture, "hard", learning_rate, seed)
        mixture.save(self.out / "experts" / str(seed))
        return first + self.stage(mixture, "soft", learning_rate, seed)

    def stage(self, mixture: Mixture, stage: Stage, learning_rate: float, seed: int) -> list[float]:
        """Half of the steps in one of LoRA-Mixer's stages."""
        for layer in mixture.layers.values():
            assert isinstance(layer.router, StagedRouter)
            layer.router.stage = stage
        return self.fit(mixture, learning_rate, seed, self.arguments.steps // 2)

    def row(self, name: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Trains one row once and scores it on the test questions."""
        torch.manual_seed(seed)
        started = time.monotonic()
        mixture = convert(load_base(), at_budget(name, len(self.names), self.arguments.budget))
        validation = self.learn(mixture, learning_rate, seed)
        return {
            "validation": validation or [self.score(mixture, "validation", 40)],
            "test": self.score(mixture, "test", self.arguments.test),
            "active": mixture.active_parameters(),
            "seconds": time.monotonic() - started,
            **mixture.num_parameters(),
        }

    def oracle(self, skill: str) -> dict[str, Any]:
        """A LoRA of rank 8 that learns one skill alone."""
        alone = Bench([skill], self.arguments, self.out)
        torch.manual_seed(0)
        mixture = convert(load_base(), preset("lora", dropout=0.0))
        alone.fit(mixture, 5e-3, 0, min(self.arguments.steps, 400))
        return {"test": alone.score(mixture, "test", self.arguments.test)}

    def averaged(self, name: str, seed: int) -> dict[str, Any]:
        """One model for each skill from one start, then the average of their parameters: what is lost?"""
        states, single = [], []
        for skill in self.names:
            torch.manual_seed(seed)
            mixture = convert(load_base(), at_budget(name, 1, self.arguments.budget // len(self.names)))
            alone = Bench([skill], self.arguments, self.out)
            alone.fit(mixture, 5e-3, seed, min(self.arguments.steps, 400))
            single.append(alone.score(mixture, "test", self.arguments.test))
            states.append(mixture.state_dict())
        mean = {key: torch.stack([s[key].double() for s in states]).mean(0) for key in states[0]}
        mixture.model.load_state_dict({k: v.to(states[0][k].dtype) for k, v in mean.items()}, strict=False)
        return {"single": fmean(single), "merged": self.score(mixture, "test", self.arguments.test)}


def same_comparison(out: Path, arguments: Arguments) -> None:
    """Notes what the folder's cells were run with. Raises ConfigError where they were run with something else."""
    keys = ("skills", "budget", "steps", "check_every", "test")
    wanted = {key: getattr(arguments, key) for key in keys}
    path = out / "arguments.json"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1) + "\n")
    found = json.loads(path.read_text())
    if found != wanted:
        raise ConfigError(f"{out} holds cells of {found}, not of {wanted}; choose another --out")


def run_row(bench: Bench, name: str) -> None:
    """All rates on the first seed, then the other seeds at the best of them."""
    rates = [float(rate) for rate in bench.arguments.learning_rates.split(",")]
    if name == "arrow":
        rates = rates[:1]
    tried = {r: run_cell(bench.out, f"{name} lr {r} seed 0", lambda r=r: bench.row(name, r, 0)) for r in rates}
    best = max(rates, key=lambda rate: max(tried[rate]["validation"]))
    for seed in range(1, bench.arguments.seeds):
        run_cell(bench.out, f"{name} lr {best} seed {seed}", lambda seed=seed: bench.row(name, best, seed))


def rows_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The cells there are, by row: those of its best rate on the first seed's validation, seed by seed."""
    found: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
    for path in (out / "cells").glob("*.json"):
        record = json.loads(path.read_text())
        if match := re.fullmatch(r"(.+) lr (\S+) seed (\d+)", record["cell"]):
            found.setdefault(match[1], {}).setdefault(float(match[2]), {})[int(match[3])] = record
    rows = {}
    for name, by_rate in found.items():
        tried = {rate: max(seeds[0]["validation"]) for rate, seeds in by_rate.items() if 0 in seeds}
        best = max(tried, key=lambda rate: tried[rate])
        rows[name] = [{"rate": best, "tried": len(tried), **seeds} for _, seeds in sorted(by_rate[best].items())]
    return rows


def table(rows: dict[str, list[dict[str, Any]]], oracle: float) -> str:
    """The rows as a Markdown table, best first."""
    lines = [
        "| row | test exact match | seeds | learning rate | of | stored | trainable | active |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in sorted(rows.items(), key=lambda item: -fmean(cell["test"] for cell in item[1])):
        scores = [cell["test"] for cell in cells]
        spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
        failed = " (did not learn)" if fmean(scores) < oracle / 2 else ""
        first = cells[0]
        counts = " | ".join(f"{first[key]:,}" for key in ("stored", "trainable", "active"))
        rate = f"{first['rate']:g} | {first['tried']}"
        lines.append(f"| {name} | {fmean(scores):.3f}{spread}{failed} | {len(scores)} | {rate} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    names = arguments.skills.split(",") if arguments.skills else list(skills())
    wanted = arguments.rows.split(",") if arguments.rows else list(ROWS)
    wanted.sort(key=lambda name: name in OVER_ADAPTERS)  # their experts come from lora-mixer's row
    bench = Bench(names, arguments, Path(arguments.out))
    same_comparison(bench.out, arguments)
    oracles = [run_cell(bench.out, f"oracle {skill}", lambda skill=skill: bench.oracle(skill)) for skill in names]
    oracle = fmean(cell["test"] for cell in oracles)
    for name in wanted:
        run_row(bench, name)
        rows = rows_of(bench.out)
        text = f"{bench.title()} Single-skill oracle: {oracle:.3f}.\n\n{table(rows, oracle)}\n"
        (bench.out / "table.md").write_text(text)
        bars({n: [c["test"] for c in cells] for n, cells in rows.items()}, bench.out / "table.png", oracle)
    for name in ("lora", "flylora") if len(names) > 1 else ():
        cell = run_cell(bench.out, f"averaged {name}", lambda name=name: bench.averaged(name, 0))
        print(f"averaging {name}: single {cell['single']:.3f}, merged {cell['merged']:.3f}")
    print((bench.out / "table.md").read_text())


if __name__ == "__main__":
    main()
