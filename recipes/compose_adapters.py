"""Single-skill adapters, trained with PEFT, become one mixture: does routing keep what each of them knows?

    python recipes/compose_adapters.py                                   ten skills, one seed
    python recipes/compose_adapters.py --seeds 0,1,2                     with spread
    python recipes/compose_adapters.py --skills upper,ends --adapter_steps 60 --router_steps 20

Rows are the base; each skill's own adapter (the oracle); the uniform merge and TIES, which need no router; Arrow, which
needs no training; and routers trained on all skills at once, half of the rows numbered prompts of one to four different
skills: MeteoRA's gates, its gates together with the LoRAs (as its released script does), X-LoRA's head, LoRA-Mixer's
second stage. MeteoRA's claim is that routing stays near the oracle.

The adapters change layers 2 and up: what a prompt asks for is not yet in the states that lower layers read (a linear
probe on the text's tokens names the skill for 16% of them at layer 0, 79% at layer 1, 98% from layer 2 on), so that no
router there could know. Half of all rows are numbered prompts of one to three questions of one skill, so that adapters
know the format of composite tasks. Routers start from --start_prompts prompts of each skill (molex.gates_from_prompts).

Every cell is one JSON file under --out/cells; one that exists is not run again.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import peft
import torch
from torch import nn
from transformers import HfArgumentParser

import molex
from molex.composing import from_peft
from molex.errors import ConfigError
from molex.mixture import Mixture
from molex.workbench import (
    dataset,
    exact_match,
    load_base,
    load_tokenizer,
    numbered,
    question_and_answer,
    skills,
)
from molex.workbench.cells import run_cell
from molex.workbench.data import Row, by_length
from molex.workbench.measure import train
from molex.workbench.tokenizer import ANSWER
from molex.workbench.training import Run, fit

TOKENIZER = load_tokenizer()
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GATES_RATE, LORAS_RATE = 3e-3, 5e-4  # at 3e-3 LoRAs that know their skills forget some of them
GATE_LOSS = 1.0  # of MeteoRA's; at the released code's 50 its gates answer worse


@dataclass
class Arguments:
    """What to run."""

    out: str = field(default="runs/composing", metadata={"help": "Where adapters, cells, mixtures and the table go."})
    skills: str = "reverse,upper,shift,ends,inner,vowels,mirror,triple,flip,descend"
    rows: str = field(default="", metadata={"help": "Row names between semicolons; all by default."})
    seeds: str = field(default="0", metadata={"help": "Comma-separated; processes with others may share --out."})
    adapter_steps: int = 400
    router_steps: int = 300
    batch: int = field(default=24, metadata={"help": "Rows of a step, of like length."})
    start_prompts: int = field(default=24, metadata={"help": "Prompts of each skill that routers start from."})
    test: int = field(default=100, metadata={"help": "Test questions for each skill."})


def practice(skill: str, count: int, seed: int) -> list[Row]:
    """Questions of one skill: every other row is a numbered prompt of one to three."""
    rng, own = Random(f"{seed} {skill}"), skills()[skill]
    rows = dataset([skill], "train", count, seed=seed)
    for index in range(1, count, 2):
        rows[index] = numbered([own] * rng.randint(1, 3), rng, "train")
    return rows


def learn_adapters(arguments: Arguments, names: list[str], seed: int) -> dict[str, Path]:
    """One LoRA for each skill, trained and saved by PEFT alone; folders by skill."""
    folders = {name: Path(arguments.out) / "adapters" / str(seed) / name for name in names}
    for skill, folder in folders.items():
        if folder.exists():
            continue
        torch.manual_seed(seed)
        layers = list(range(2, load_base().config.num_hidden_layers))
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, layers_to_transform=layers)
        model = peft.get_peft_model(load_base(), config)
        rows = practice(skill, arguments.batch * arguments.adapter_steps, seed)
        rows = by_length(rows, arguments.batch, Random(seed))
        train(model, TOKENIZER, rows, arguments.batch, learning_rate=4e-3)
        model.save_pretrained(str(folder))
    return folders


def token_tasks(row: Row, asked: list[int]) -> list[int]:
    """The task of each token of a numbered prompt and its answers, line by line; a token is a byte, or <bos>."""
    questions, answers = row["prompt"].removesuffix(ANSWER).split("\n"), row["completion"].split("\n")
    by_line = [*zip(questions, asked, strict=True), (ANSWER[1:-1], asked[0]), *zip(answers, asked, strict=True)]
    return [-1, *(task for line, task in by_line for _ in range(len(line.encode()) + 1))]


@dataclass(frozen=True)
class Bench:
    """The skills of one comparison, the adapters of one seed, and what becomes of them."""

    arguments: Arguments
    skills: list[str]
    adapters: dict[str, Path]
    seed: int

    def score(self, model: nn.Module) -> dict[str, float]:
        """Exact match on test questions, by skill."""
        each = self.arguments.test
        return {skill: exact_match(model, TOKENIZER, dataset([skill], "test", each)) for skill in self.skills}

    def base(self) -> dict[str, float]:
        return self.score(load_base().eval())

    def oracle(self) -> dict[str, float]:
        """Each skill by its own adapter, as one expert of a mixture: bit for bit PEFT's own model up to rounding."""
        mixture = from_peft(load_base(), self.adapters, router="arrow")
        scores = {}
        for skill in self.skills:
            with mixture.using(adapters=skill):
                scores[skill] = exact_match(mixture.model, TOKENIZER, dataset([skill], "test", self.arguments.test))
        return scores

    def merged(self, rule: str) -> dict[str, float]:
        """All adapters folded into the base."""
        model = molex.merge(load_base(), self.adapters, rule=rule)
        assert isinstance(model, nn.Module)
        return self.score(model.eval())

    def routed(self, name: str, router: str, **settings: Any) -> dict[str, float]:
        """A router over the adapters, started from prompts where it can be, and trained on all skills at once."""
        torch.manual_seed(self.seed)
        config = molex.preset(router, **settings)
        if (getattr(config.router, "top_k", None) or 0) > len(self.skills):
            config = config.override({"top_k": len(self.skills)})
        mixture = from_peft(load_base(), self.adapters, router=config)
        if mixture.trainable_parameters():
            self.start(mixture)
            rate = LORAS_RATE if config.train_experts else GATES_RATE
            run = Run(steps=self.arguments.router_steps, batch_size=self.arguments.batch, learning_rate=rate)
            rows = by_length(self.mixed(run.steps * run.batch_size), run.batch_size, Random(self.seed))
            fit(mixture, TOKENIZER, rows, run)
        mixture.save(Path(self.arguments.out) / "mixtures" / str(self.seed) / name)
        return self.score(mixture.model.eval())

    def mixed(self, count: int) -> list[Row]:
        """Single questions, and between them numbered prompts of one to four different skills."""
        rng, own = Random(f"{self.seed} mixed"), skills()
        rows = dataset(self.skills, "train", count, seed=self.seed)
        for index in range(1, count, 2):
            asked = rng.sample(self.skills, rng.randint(1, min(4, len(self.skills))))
            row = numbered([own[name] for name in asked], rng, "train")
            rows[index] = {**row, "task_ids": token_tasks(row, [self.skills.index(name) for name in asked])}
        return rows

    def start(self, mixture: Mixture) -> None:
        """Questions with their answers, so that routers know the states of both."""
        count = self.arguments.start_prompts
        rows = {skill: practice(skill, count, self.seed) for skill in self.skills}
        prompts = {skill: ["".join(question_and_answer(row)) for row in rows[skill]] for skill in self.skills}
        molex.gates_from_prompts(mixture, TOKENIZER, prompts, sharpness=8.0)


ROWS: dict[str, Callable[[Bench], dict[str, float]]] = {
    "base": Bench.base,
    "own adapter (oracle)": Bench.oracle,
    "uniform merge": lambda bench: bench.merged("linear"),
    "TIES": lambda bench: bench.merged("ties"),
    "arrow": lambda bench: bench.routed("arrow", "arrow"),
    "meteora": lambda bench: bench.routed("meteora", "meteora", task_coefficient=GATE_LOSS),
    "meteora, gates and LoRAs": lambda bench: bench.routed(
        "meteora-loras", "meteora", train_experts=True, task_coefficient=GATE_LOSS
    ),
    "xlora": lambda bench: bench.routed("xlora", "xlora"),
    "lora-mixer": lambda bench: bench.routed("lora-mixer", "lora-mixer", stage="soft", train_experts=False),
}


def scores_of(bench: Bench, row: str) -> dict[str, float]:
    """A cell's scores. Raises ConfigError where its file is of other settings."""
    settings = {key: value for key, value in asdict(bench.arguments).items() if key not in ("out", "rows", "seeds")}
    out = Path(bench.arguments.out)

    def make() -> dict[str, Any]:
        started = time.monotonic()
        scores = ROWS[row](bench)
        seconds = time.monotonic() - started
        return {"row": row, "seed": bench.seed, "settings": settings, "scores": scores, "seconds": seconds}

    record = run_cell(out, f"{row} seed {bench.seed}", make)
    if record["settings"] != settings:
        raise ConfigError(f"{out} holds cells of {record['settings']}, not of {settings}; choose another --out")
    return record["scores"]


def table(cells: dict[str, list[dict[str, float]]], names: list[str]) -> str:
    """Rows as a Markdown table: each skill's mean over seeds, and the mean over skills with its spread over seeds."""
    lines = [f"| row | {' | '.join(names)} | mean | seeds |", "|---" * (len(names) + 3) + "|"]
    for row, seeds in cells.items():
        by_skill = " | ".join(f"{fmean(scores[skill] for scores in seeds):.2f}" for skill in names)
        means = [fmean(scores.values()) for scores in seeds]
        spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
        lines.append(f"| {row} | {by_skill} | {fmean(means):.3f}{spread} | {len(means)} |")
    return "\n".join(lines)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    names = arguments.skills.split(",")
    wanted = arguments.rows.split(";") if arguments.rows else list(ROWS)
    unknown = [row for row in wanted if row not in ROWS]
    if unknown:
        raise ConfigError(f"no row {unknown[0]!r}; choose from (separated by ';'): {'; '.join(ROWS)}")
    cells: dict[str, list[dict[str, float]]] = {row: [] for row in wanted}
    for seed in map(int, arguments.seeds.split(",")):
        bench = Bench(arguments, names, learn_adapters(arguments, names, seed), seed)
        for row in wanted:
            cells[row].append(scores_of(bench, row))
    text = table(cells, names)
    (Path(arguments.out) / "table.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
