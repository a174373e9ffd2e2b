"""Tasks of lm-evaluation-harness made in memory: a configuration whose data are rows, with no file and no download."""

from collections.abc import Sequence
from typing import Any

from molex.evaluation.rows import Row

Config = dict[str, Any]  # what the harness takes in the place of a task's name


def rows_task(name: str, rows: Sequence[Row]) -> Config:
    """The part of a task's configuration that names it and gives its rows; the caller adds how they are asked."""
    return {"task": name, "custom_dataset": _Rows(rows), "test_split": "test", "num_fewshot": 0}


class _Rows:
    """Called by the harness for the data, once for each model, with the task's metadata, which rows have no use for."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = list(rows)

    def __call__(self, **metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(self.rows)}
