"""molex eval PATH --composite 3,5,10: several tasks in one prompt; see docs/composite.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molex.commands.console import console, table
from molex.errors import ConfigError

if TYPE_CHECKING:
    from molex.evaluation.composite import Task


def show_composite(
    path: Path,
    counts: str,
    tasks: str,
    tokenizer: str | None,
    num_prompts: int,
    batch_size: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluates and prints a table for each n. tasks: names of workbench skills, jsonl files and folders of tasks,
    separated by commas. out: a folder."""
    import molex
    from molex.evaluation import composite
    from molex.evaluation.opening import open_model, open_tokenizer
    from molex.io.record import CONFIG_FILE

    wanted, settings = _counts(counts), composite.CompositeSettings(num_prompts=num_prompts, batch_size=batch_size)
    asked = _tasks(tasks, num_prompts)
    model = molex.load(path) if (path / CONFIG_FILE).is_file() else open_model(path)
    subject = open_model(model)
    reports = composite.evaluate(model, open_tokenizer(tokenizer, subject, path), asked, wanted, settings)
    if out is not None:
        for report in reports:
            composite.write_report(report, asked, settings, out)
    if as_json:
        typer.echo(json.dumps([composite.report_dict(report) for report in reports], indent=2, ensure_ascii=False))
        return
    for report in reports:
        console.print(table(composite.score_rows(report), f"composite-{report.count}, {num_prompts} prompts"))
        if report.attribution is not None:
            console.print(table(composite.attribution_rows(report), "mean gate weight while a task was answered"))


def refuse_beside_composite(given: Mapping[str, object]) -> None:
    """Raises ConfigError on a flag of the harness, which would have no effect."""
    for flag in (name for name, value in given.items() if value):
        raise ConfigError(f"--{flag} is for tasks of lm-evaluation-harness; with --composite leave --{flag} out")


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--composite {text}: give how many questions a prompt asks, such as 3,5,10")
    return [int(part) for part in parts]


def _tasks(names: str, num_prompts: int) -> "list[Task]":
    from molex.evaluation.composite import read_task
    from molex.workbench.tasks import skill_tasks

    given = [name.strip() for name in names.split(",") if name.strip()]
    if not given:
        raise ConfigError("no tasks: give --tasks, names of workbench skills, jsonl files or folders with test.jsonl")
    return [
        task
        for name in given
        for task in ([read_task(name)] if Path(name).exists() else skill_tasks([name], num_prompts))
    ]
