"""The workbench's skills, and its base's own transformations, as tasks of the composite evaluation."""

from collections.abc import Sequence

from molex.evaluation.composite import Pair, Task
from molex.workbench.data import dataset


def skill_tasks(names: Sequence[str], size: int, num_examples: int = 0) -> list[Task]:
    """A task for each name: `size` test questions, and worked examples from the train split.

    Raises ConfigError for an unknown name.
    """
    return [
        Task(name=name, rows=_pairs(name, "test", size), examples=_pairs(name, "train", num_examples))
        for name in dict.fromkeys(names)
    ]


def _pairs(name: str, split: str, size: int) -> tuple[Pair, ...]:
    rows = dataset([name], split, size, format="alpaca")
    return tuple(Pair(f"{row['instruction']}: {row['input']}", row["output"]) for row in rows)
