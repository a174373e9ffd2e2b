"""molex eval PATH: a mixture, its base and other models on tasks of lm-evaluation-harness, side by side."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import molex
from molex.commands.composite import refuse_beside_composite, show_composite
from molex.commands.console import Json, console, table
from molex.errors import ConfigError

if TYPE_CHECKING:
    from molex.evaluation.harness import Score, Task


def eval(
    path: Annotated[Path, typer.Argument(help="A mixture's folder, or any checkpoint's.")],
    tasks: Annotated[
        str, typer.Option(help="Names separated by commas: workbench_upper, ..., or any the harness knows.")
    ] = "",
    commonsense: Annotated[
        Path | None, typer.Option(help="Folder of LLM-Adapters' NAME/test.json: tasks commonsense_NAME.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="One more column: NAME=FOLDER. May be repeated.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id, where the models' have none.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Samples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the tokenizer's chat template.")] = False,
    task_id: Annotated[
        list[str] | None, typer.Option(help="TASK=NUMBER, for mixtures that route by task. May be repeated.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Also the mixture with its experts off.")] = True,
    composite: Annotated[
        str, typer.Option(help="Ask several tasks in one prompt, such as 3,5,10 of them; docs/composite.md.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="A JSON file for the scores; with --composite a folder.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a mixture, its base and other models on the same tasks. Offline where the tasks are."""
    from molex.evaluation.harness import check_harness, evaluate, side_by_side

    if composite:
        others = {
            "commonsense": commonsense,
            "model": model,
            "include-path": include_path,
            "chat": chat,
            "task-id": task_id,
        }
        refuse_beside_composite({**others, "no-base": not base})
        show_composite(path, composite, tasks, tokenizer, limit or 200, batch_size, out, as_json)
        return
    check_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is on purpose here: a model in memory
    columns = {"model": path, **_columns(model or [])}
    ids, chosen = _task_ids(task_id or []), _tasks(tasks, commonsense, chat)
    scores = evaluate(
        columns,
        list(chosen.values()),
        tokenizer=tokenizer,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=chat,
        with_base=base,
        task_ids=ids,
    )
    if out is not None:
        settings = {"limit": limit, "batch_size": batch_size, "apply_chat_template": chat, "task_ids": ids}
        _write(out, columns, list(chosen), settings, scores)
    if as_json:
        typer.echo(json.dumps([asdict(score) for score in scores], indent=2, ensure_ascii=False))
    else:
        console.print(table(side_by_side(scores), str(path)))


def _columns(given: Sequence[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not (name and equals and place) or name == "model" or name in columns:
            raise ConfigError(f"--model {text}: give NAME=FOLDER with a new name; 'model' is the first column's")
        columns[name] = place
    return columns


def _task_ids(given: Sequence[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not (name and equals and number.isdecimal()) or name in ids:
            raise ConfigError(f"--task-id {text}: give TASK=NUMBER, each task once")
        ids[name] = int(number)
    return ids


def _tasks(names: str, commonsense: Path | None, chat: bool) -> "dict[str, Task]":
    """The tasks by name: ours made in memory, the harness's by name alone. A folder of commonsense sets means all it
    has, unless tasks are named."""
    from molex.evaluation.commonsense import commonsense_tasks
    from molex.workbench.harness_tasks import harness_tasks

    sets = {} if commonsense is None else commonsense_tasks(commonsense)
    ours: Mapping[str, Any] = {**harness_tasks(chat=chat), **sets}
    named = [name.strip() for name in names.split(",") if name.strip()] or list(sets)
    if not named:
        raise ConfigError(f"no tasks: give --tasks, or --commonsense FOLDER. Ours are {', '.join(ours)}")
    return {name: ours.get(name, name) for name in named}


def _write(
    out: Path,
    columns: Mapping[str, object],
    tasks: Sequence[str],
    settings: Mapping[str, object],
    scores: "Sequence[Score]",
) -> None:
    from importlib.metadata import version

    from molex.io.files import staged, write_json

    document = {
        "molex_version": molex.__version__,
        "lm_eval_version": version("lm_eval"),
        "models": {name: str(place) for name, place in columns.items()},
        "tasks": list(tasks),
        **settings,
        "scores": [asdict(score) for score in scores],
    }
    with staged(out.parent) as scratch:
        write_json(scratch / out.name, document)
