"""The eight commonsense sets in the format of LLM-Adapters (arXiv 2304.01933), on which LoRA mixtures are compared.

A folder holds NAME/test.json for each set: a list of rows with `instruction`, `input`, `output`, `answer`. The model
continues Alpaca's prompt by up to 32 tokens, beam search over 4; the first label in what it wrote is its answer. A text
without a label is wrong. The data are not shipped; the authors' repository has them.

Their evaluation code has 16 spaces before every line of the prompt, which its indentation put there. The default here
has none; `prompt` takes the one that a model was trained with.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from molex.checks import near_and_known
from molex.errors import ConfigError
from molex.evaluation.inline import Config, rows_task
from molex.evaluation.rows import read_rows

LABELS = {
    "boolq": "true|false",
    "piqa": "solution[12]",
    "social_i_qa": "answer[1-5]",
    "hellaswag": "ending[1-4]",
    "winogrande": "option[12]",
    "ARC-Easy": "answer[1-5]",
    "ARC-Challenge": "answer[1-5]",
    "openbookqa": "answer[1-5]",
}

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def commonsense_tasks(
    folder: str | Path, names: Iterable[str] | None = None, *, prompt: str = ALPACA_PROMPT, num_beams: int = 4
) -> dict[str, Config]:
    """Task configurations "commonsense_boolq", ... of the named sets, by default of all that the folder has.

    Raises ConfigError on an unknown set, a missing file, rows of another format, or a prompt without {instruction}.
    """
    if "{instruction}" not in prompt:
        raise ConfigError(f"prompt={prompt!r:.60} has no {{instruction}} to put the question in")
    present = [name for name in LABELS if (Path(folder) / name / "test.json").is_file()]
    chosen = present if names is None else list(names)
    unknown = [name for name in chosen if name not in LABELS]
    if unknown:
        raise ConfigError(f"no commonsense set {unknown[0]!r}{near_and_known(unknown[0], LABELS)}")
    if not chosen:
        raise ConfigError(f"{folder} has no NAME/test.json; the names are {', '.join(LABELS)}")
    return {f"commonsense_{name}": _task(name, Path(folder), prompt, num_beams) for name in chosen}


def _task(name: str, folder: Path, prompt: str, num_beams: int) -> Config:
    rows = [_row(row, name, prompt) for row in read_rows(folder / name / "test.json")]
    return {
        **rows_task(f"commonsense_{name}", rows),
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "max_gen_toks": 32, "do_sample": False, "num_beams": num_beams},
        "filter_list": [{"name": "label", "filter": _first_label(LABELS[name])}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _first_label(pattern: str) -> list[dict[str, str]]:
    return [{"function": "regex", "regex_pattern": f"({pattern})", "fallback": ""}, {"function": "take_first"}]


def _row(row: dict[str, Any], name: str, prompt: str) -> dict[str, str]:
    question, answer = row.get("instruction"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not re.fullmatch(LABELS[name], answer):
        raise ConfigError(f"{name}: a row has no `instruction` and `answer` ({LABELS[name]}): {row!r:.80}")
    given = f"{question}\n\n{row['input']}" if row.get("input") else question
    return {"prompt": prompt.replace("{instruction}", given), "answer": answer}
