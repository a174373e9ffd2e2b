"""Composite-n evaluation: several tasks in one prompt, and which expert answered which of them.

    python recipes/composite_eval.py
    python recipes/composite_eval.py --mixture runs/mixture --skills upper ends triple --counts 3 --num_prompts 100
    python recipes/composite_eval.py --model_name_or_path MODEL --adapters law=path/a code=path/b --router arrow \
        --files law/ code.jsonl --metrics law=contains --counts 2 --format meteora --shots 2

Without arguments it trains something small first: a mixture of three of the workbench's skills, too short to be good.
A YAML file (--config) holds the same names as the flags, and flags win. Prints a table for each n: every task's score
by the base, the routed mixture, a merged model (--merge_rule) and, one question at a time, each task's own expert; then
who was at work. The output folder gets scores, prompts, generations and `run.yaml`, which runs the same again.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.scripts.utils import TrlParser

import molex
from molex import workbench
from molex.errors import ConfigError
from molex.evaluation.composite import (
    CompositeReport,
    CompositeSettings,
    Task,
    attribution_rows,
    evaluate,
    formats,
    read_task,
    score_rows,
    write_report,
)
from molex.evaluation.opening import open_tokenizer
from molex.merging import merge_mixture
from molex.routers.staged import Stage, StagedRouter
from molex.workbench.settings import workbench_preset
from molex.workbench.tasks import skill_tasks
from molex.workbench.training import Run, fit

console = Console()
BATCH = 48


@dataclass
class ModelSettings:
    """What answers: a saved mixture, adapters over a base, or by default a small mixture that is trained first."""

    mixture: str | None = field(default=None, metadata={"help": "Folder or hub id that molex.load takes."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The base of --adapters."})
    adapters: list[str] = field(default_factory=list, metadata={"help": "PEFT folders: law=path/a code=path/b."})
    router: str = field(default="arrow", metadata={"help": "How adapters are routed; arrow needs no training."})
    tokenizer: str | None = field(default=None, metadata={"help": "By default the mixture's or the base's own."})
    dtype: str = field(default="auto", metadata={"help": "Of the base of --adapters."})
    merge_rule: str | None = field(
        default=None, metadata={"help": "Also the experts merged by this rule: linear, ties."}
    )
    train_steps: int = field(
        default=60, metadata={"help": "Of the small mixture's experts; half as many of its router."}
    )


@dataclass
class TaskSettings:
    """What is asked."""

    skills: list[str] = field(
        default_factory=list, metadata={"help": "Workbench skills; by default upper ends triple."}
    )
    files: list[str] = field(
        default_factory=list,
        metadata={"help": "jsonl files, or folders with test.jsonl (and train.jsonl), a task each."},
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "task=metric; exact by default. See molex.evaluation.composite.metrics."},
    )
    own: list[str] = field(default_factory=list, metadata={"help": "task=expert, where they have not one name."})
    counts: list[int] = field(default_factory=lambda: [3], metadata={"help": "Questions of a prompt: 3 5 10."})
    out: str = field(default="runs/composite", metadata={"help": "Output folder."})


@dataclass(frozen=True, kw_only=True)
class PromptSettings(CompositeSettings):
    """How it is asked: fewer prompts than a publication needs."""

    num_prompts: int = 60


def main() -> None:
    """Load, ask, score, show, write."""
    models, asked, settings = read_arguments()
    tasks = load_tasks(asked, settings)
    mixture = load_mixture(models, [task.name for task in tasks])
    tokenizer = load_tokenizer(models, mixture)
    merged = load_merged(models, mixture)
    reports = evaluate(
        mixture,
        tokenizer,
        tasks,
        asked.counts,
        settings,
        merged=merged,
        own=pairs(asked.own, "own") or None,
        on_part=lambda part: console.print(part, style="dim"),
    )
    for report in reports:
        show(report)
        write_report(report, tasks, settings, asked.out)
    stated = {**asdict(models), **asdict(asked), **asdict(settings)}
    known = {name: value for name, value in stated.items() if value is not None}
    (Path(asked.out) / "run.yaml").write_text(yaml.safe_dump(known, sort_keys=False))
    console.print(f"written to {asked.out}", markup=False)


def read_arguments(arguments: list[str] | None = None) -> tuple[ModelSettings, TaskSettings, PromptSettings]:
    """Flags over YAML over defaults. Raises ValueError on names that nothing has."""
    parser = TrlParser((ModelSettings, TaskSettings, PromptSettings))  # type: ignore[arg-type]
    return parser.parse_args_and_config(arguments)  # type: ignore[return-value]


def load_tasks(asked: TaskSettings, settings: CompositeSettings) -> list[Task]:
    """Files and skills as tasks; of a skill as many questions as the largest prompts can need."""
    metrics = pairs(asked.metrics, "metrics")
    wrapped = formats[settings.format].alone
    tasks = [read_task(file, wrapped=wrapped) for file in asked.files]
    skills = asked.skills or ([] if asked.files else ["upper", "ends", "triple"])
    most = settings.num_prompts * (max(asked.counts) if settings.repeat else 1)
    tasks += skill_tasks(skills, most, settings.shots * max(asked.counts)) if skills else []
    unknown = set(metrics) - {task.name for task in tasks}
    if unknown:
        raise ConfigError(f"--metrics names {', '.join(unknown)}; the tasks are {', '.join(t.name for t in tasks)}")
    return [Task(**{**vars(task), "metric": metrics.get(task.name, task.metric)}) for task in tasks]


def load_mixture(models: ModelSettings, skills: list[str]) -> molex.Mixture:
    """The mixture named, or one of the adapters named, or a small one trained here."""
    if models.mixture is not None:
        if models.adapters or models.model_name_or_path:
            raise ConfigError("--mixture has its base and experts; leave --model_name_or_path and --adapters out")
        return molex.load(models.mixture)
    if models.adapters:
        return molex.from_peft(load_base(models), pairs(models.adapters, "adapters"), router=models.router)
    if models.model_name_or_path:
        raise ConfigError("--model_name_or_path is the base of --adapters name=path; give some, or a --mixture")
    return train_small(skills, models.train_steps)


def load_base(models: ModelSettings) -> PreTrainedModel:
    if models.model_name_or_path is None:
        return workbench.load_base()
    return AutoModelForCausalLM.from_pretrained(models.model_name_or_path, dtype=models.dtype)


def load_tokenizer(models: ModelSettings, mixture: molex.Mixture) -> PreTrainedTokenizerBase:
    model = mixture.model
    assert isinstance(model, PreTrainedModel)
    on_workbench = models.tokenizer is None and models.mixture is None and models.model_name_or_path is None
    tokenizer = (
        workbench.load_tokenizer()
        if on_workbench
        else open_tokenizer(models.tokenizer, model, models.mixture or mixture)
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_merged(models: ModelSettings, mixture: molex.Mixture) -> torch.nn.Module | None:
    """A copy of the mixture, merged into a plain model."""
    if models.merge_rule is None:
        return None
    return merge_mixture(molex.Mixture.of(deepcopy(mixture.model)), models.merge_rule)


def train_small(skills: list[str], steps: int) -> molex.Mixture:
    """LoRA-Mixer's two stages on the workbench: an expert for each skill, side by side, then a router among them."""
    unknown = set(skills) - set(workbench.skills())
    if unknown:
        raise ConfigError(f"no --mixture, and {', '.join(unknown)} cannot be learnt here; give one, or --skills alone")
    console.print(f"no --mixture: training a small one of {', '.join(skills)}", style="dim")
    torch.manual_seed(0)
    mixture = molex.convert(workbench.load_base(), workbench_preset("lora-mixer", len(skills)))
    stages: list[tuple[Stage, int]] = [("hard", steps), ("soft", steps // 2)]
    for stage, length in stages:
        for layer in mixture.layers.values():
            assert isinstance(layer.router, StagedRouter)
            layer.router.stage = stage
            layer.experts.requires_grad_(stage == "hard")  # so that an expert alone stays what routing is held against
        rows = numbered_rows(skills, length * BATCH, one_skill=stage == "hard")
        fit(mixture, workbench.load_tokenizer(), rows, Run(steps=length, batch_size=BATCH))
    for expert_id, skill in enumerate(skills):
        mixture.load_expert(expert_id, skill, mixture.factors(expert_id))
    return mixture


def numbered_rows(skills: list[str], size: int, one_skill: bool) -> list[dict[str, Any]]:
    """Prompts of one question, or of two or three with numbers: of one skill each, in turn, or of any."""
    rng, known = Random(f"numbered {one_skill}"), workbench.skills()
    rows = []
    for index in range(size):
        task = index % len(skills)
        drawn = [skills[task] if one_skill else rng.choice(skills) for _ in range(rng.randint(1, 3))]
        if len(drawn) == 1:
            row = workbench.dataset(drawn, "train", 1, seed=index)[0]
        else:
            row = workbench.numbered([known[name] for name in drawn], rng, "train")
        rows.append({**row, "task_ids": task})
    return rows


def pairs(given: list[str], flag: str) -> dict[str, str]:
    """name=value texts. Raises ConfigError on anything else."""
    split = [text.partition("=") for text in given]
    wrong = [text for text, parts in zip(given, split, strict=True) if not all(parts)]
    if wrong:
        raise ConfigError(f"--{flag} {wrong[0]}: write name=value")
    return {name: value for name, _, value in split}


def show(report: CompositeReport) -> None:
    """Scores, then who was at work."""
    for title, rows in (
        (f"composite-{report.count}, {len(report.prompts)} prompts", score_rows(report)),
        (f"composite-{report.count}: mean gate weight while a task was answered", attribution_rows(report)),
    ):
        if rows:
            table = Table(*rows[0], title=title)
            for row in rows:
                table.add_row(*row.values())
            console.print(table)


if __name__ == "__main__":
    main()
