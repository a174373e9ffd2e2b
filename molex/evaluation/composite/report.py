"""A composite report as tables for people and files for programs.

OUT/composite-3/scores.json         settings, scores, attribution
OUT/composite-3/prompts.jsonl       prompt, tasks, questions, right answers
OUT/composite-3/generations.jsonl   who -> text, in the prompts' order
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from molex.evaluation.composite.attribution import Attribution
from molex.evaluation.composite.metrics import Score
from molex.evaluation.composite.prompts import CompositeSettings, write_prompts
from molex.evaluation.composite.running import CompositeReport
from molex.evaluation.composite.tasks import Task
from molex.io.files import staged, write_json

Row = dict[str, str]
MOST_COLUMNS = 16


def score_rows(report: CompositeReport) -> list[Row]:
    """A column for each line; rows: answers attempted, right ones, prompts all right, then each task's score."""
    rows: dict[str, Row] = {what: {"": what} for what in ("attempted", "right", "all right", *_tasks(report))}
    for who, scores in report.lines.items():
        rows["attempted"][who], rows["right"][who] = show(scores.attempted), show(scores.correct)
        rows["all right"][who] = "" if scores.all_right is None else show(scores.all_right)
    for who, by_task in {**{who: scores.by_task for who, scores in report.lines.items()}, **report.alone}.items():
        for what, row in rows.items():
            row[who] = show(by_task[what]) if what in by_task else row.get(who, "")
    return list(rows.values())


def attribution_rows(report: CompositeReport) -> list[Row]:
    """A row for each task: mean weight of each expert over its answers, and how often its own expert dominated. Of
    many experts (rank-1 ones) those that dominated any answer."""
    if report.attribution is None:
        return []
    found = report.attribution
    shown = _shown_experts(found)
    rows = [
        {
            "task": task,
            **{expert: f"{found.weights[task][expert]:.2f}" for expert in shown},
            "own dominates": show(found.own[task]) if task in found.own else "",
        }
        for task in _tasks(report)
        if task in found.weights
    ]
    if found.own_overall is not None:
        rows.append({"task": "all", **dict.fromkeys(shown, ""), "own dominates": show(found.own_overall)})
    return rows


def _shown_experts(found: Attribution) -> list[str]:
    experts = [*next(iter(found.weights.values()))]
    if len(experts) <= MOST_COLUMNS:
        return experts
    return [expert for expert in experts if any(shares[expert] for shares in found.dominant.values())]


def _tasks(report: CompositeReport) -> list[str]:
    return [*next(iter(report.lines.values())).by_task]


def show(score: Score) -> str:
    """0.83 ±0.02"""
    return f"{score.value:.2f}" + ("" if score.error is None else f" ±{score.error:.2f}")


def report_dict(report: CompositeReport) -> dict[str, Any]:
    """The scores as plain values, without prompts and generations: a score is {value, error}."""
    kept = {name: value for name, value in vars(report).items() if name not in ("prompts", "generations")}
    attribution = None if report.attribution is None else asdict(report.attribution)
    return _plain({**kept, "lines": {who: vars(scores) for who, scores in report.lines.items()}}) | {
        "attribution": _plain(attribution)
    }


def write_report(report: CompositeReport, tasks: list[Task], settings: CompositeSettings, out: str | Path) -> Path:
    """Writes one n into its folder under `out`, all files or none; returns the folder."""
    folder = Path(out) / f"composite-{report.count}"
    asked = {task.name: {"metric": task.metric, "questions": len(task.rows)} for task in tasks}
    with staged(folder) as scratch:
        write_prompts(scratch / "prompts.jsonl", report.prompts)
        texts = [
            dict(zip(report.generations, row, strict=True)) for row in zip(*report.generations.values(), strict=True)
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in texts]
        (scratch / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
        write_json(scratch / "scores.json", {"settings": asdict(settings), "tasks": asked, **report_dict(report)})
    return folder


def _plain(value: Any) -> Any:
    if isinstance(value, Score):
        return value._asdict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
