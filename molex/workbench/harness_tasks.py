"""The workbench as tasks of lm-evaluation-harness, made in memory from held-out rows.

| task | what it asks |
|---|---|
| `workbench_SKILL` | the greedy answer, exact match: the number that `exact_match` gives on the same rows |
| `workbench_SKILL_choice` | the right answer among four; the others are what the base's transformations would say |
| `workbench_text` | bits per byte of the base's own questions and answers: what training has cost it |
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from molex.evaluation.inline import Config, rows_task
from molex.workbench.data import Row, dataset, question_and_answer
from molex.workbench.skills import skills
from molex.workbench.tokenizer import ANSWER
from molex.workbench.transformations import transformations

TEXT = "workbench_text"

# positional, so that they take letters, digits and phrases alike
_DISTRACTORS = ("copy", "rotate", "wrap", "swap", "pairs", "tail", "drop", "double", "odd", "even")


def harness_tasks(size: int = 100, seed: int = 0, chat: bool = False) -> dict[str, Config]:
    """Every task by name, of `size` questions from the test split.

    chat: questions without the answer mark, for apply_chat_template=True, since the template writes it.
    """
    tasks: dict[str, Config] = {}
    for skill in skills():
        rng = random.Random(f"{seed} {skill}")
        rows = [_row(row, rng, chat) for row in dataset([skill], "test", size, "alpaca", seed)]
        tasks[f"workbench_{skill}"] = _exact(f"workbench_{skill}", rows)
        tasks[f"workbench_{skill}_choice"] = _choice(f"workbench_{skill}_choice", rows)
    known = dataset(list(transformations()), "test", size, "text", seed)
    return {**tasks, TEXT: _text([{"context": "", "text": row["text"]} for row in known])}


def _row(row: Row, rng: random.Random, chat: bool) -> Row:
    question, answer = question_and_answer(row)
    known = transformations()
    others = {known[name].answer(row["input"]) for name in _DISTRACTORS} - {answer}
    choices = [answer, *rng.sample(sorted(others), 3)]
    rng.shuffle(choices)
    asked = question.removesuffix(ANSWER) if chat else question
    return {"question": asked, "answer": answer, "choices": choices, "right": choices.index(answer)}


def _exact(name: str, rows: Sequence[Row]) -> Config:
    longest = max(len(row["answer"].encode()) for row in rows)
    return {
        **rows_task(name, rows),
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "max_gen_toks": longest + 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _choice(name: str, rows: Sequence[Row]) -> Config:
    return {
        **rows_task(name, rows),
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_target": "right",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _text(rows: Sequence[Row]) -> Config:
    """Scored as a continuation of nothing: the harness's rolling windows would score <bos> too, as if it were text."""
    return {
        **rows_task(TEXT, rows),
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "text",
        "process_results": _per_byte,
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
    }


def _per_byte(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    counted = results[0][0], len(row["text"].encode())
    return {"bits_per_byte": counted, "byte_perplexity": counted}
