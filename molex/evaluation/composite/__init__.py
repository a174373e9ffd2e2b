"""Composite-n: several tasks in one prompt, one generation, and which expert answered what.

reports = evaluate(mixture, tokenizer, tasks, counts=(3, 5, 10))
"""

from molex.evaluation.composite.attribution import Attribution
from molex.evaluation.composite.metrics import Score, metrics
from molex.evaluation.composite.parsing import split_answers
from molex.evaluation.composite.prompts import Composite, CompositeSettings, PromptFormat, compose, formats
from molex.evaluation.composite.report import attribution_rows, report_dict, score_rows, write_report
from molex.evaluation.composite.running import CompositeReport, evaluate
from molex.evaluation.composite.scores import Scores
from molex.evaluation.composite.tasks import Pair, Task, read_task

__all__ = [
    "Attribution",
    "Composite",
    "CompositeReport",
    "CompositeSettings",
    "Pair",
    "PromptFormat",
    "Score",
    "Scores",
    "Task",
    "attribution_rows",
    "compose",
    "evaluate",
    "formats",
    "metrics",
    "read_task",
    "report_dict",
    "score_rows",
    "split_answers",
    "write_report",
]
