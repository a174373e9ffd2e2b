"""Rows of skills in the formats users have, and the batches a plain training loop takes.

| format | columns |
|---|---|
| `prompt-completion` | `prompt` "reverse: hello\\n= ", `completion` "olleh" |
| `messages` | `messages`: user "reverse: hello", assistant "olleh" |
| `alpaca` | `instruction` "reverse", `input` "hello", `output` "olleh" |
| `text` | `text` "reverse: hello\\n= olleh" |

Every row also has `skill` (its name) and `task_ids` (that name's position in the list that was asked for).
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molex.errors import ConfigError
from molex.workbench.skill import SPLITS, Skill
from molex.workbench.skills import skills
from molex.workbench.tokenizer import ANSWER
from molex.workbench.transformations import transformations

Row = dict[str, Any]

FORMATS: dict[str, Callable[[str, str, str], Row]] = {
    "prompt-completion": lambda name, text, answer: {
        "prompt": f"{name}: {text}{ANSWER}",
        "completion": answer,
    },
    "messages": lambda name, text, answer: {
        "messages": [
            {"role": "user", "content": f"{name}: {text}"},
            {"role": "assistant", "content": answer},
        ]
    },
    "alpaca": lambda name, text, answer: {"instruction": name, "input": text, "output": answer},
    "text": lambda name, text, answer: {"text": f"{name}: {text}{ANSWER}{answer}"},
}


def dataset(names: Sequence[str], split: str, size: int, format: str = "prompt-completion", seed: int = 0) -> list[Row]:
    """Draw `size` rows that take the named skills in turn; `datasets.Dataset.from_list` takes the result.

    A name may also be one of the base's own transformations. The same arguments give the same rows on every
    machine, a larger `size` only appends to them, and no input is in two splits, whatever the seeds.

    Raises ConfigError for an unknown name, split or format.
    """
    known = {**skills(), **transformations()}
    _check("skill", names, known)
    _check("split", [split], SPLITS)
    _check("format", [format], FORMATS)
    rngs = {name: Random(f"{seed} {split} {name}") for name in names}
    rows = []
    for index in range(size):
        task_id = index % len(names)
        name = names[task_id]
        text, answer = known[name].sample(rngs[name], split)
        rows.append({**FORMATS[format](name, text, answer), "skill": name, "task_ids": task_id})
    return rows


def question_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt, up to and with the answer mark, and the answer of a row in any of the formats."""
    if "prompt" in row:
        return row["prompt"], row["completion"]
    if "messages" in row:
        user, assistant = (message["content"] for message in row["messages"])
        return user + ANSWER, assistant
    if "instruction" in row:
        return f"{row['instruction']}: {row['input']}{ANSWER}", row["output"]
    question, answer = row["text"].split(ANSWER, 1)
    return question + ANSWER, answer


def numbered(questions: Sequence[Skill], rng: Random, split: str) -> Row:
    """One prompt-completion row that asks several questions at once: "1. double: abc\\n2. swap: xyz"."""
    drawn = [(skill.name, *skill.sample(rng, split)) for skill in questions]
    asked = "\n".join(f"{i}. {name}: {text}" for i, (name, text, _) in enumerate(drawn, 1))
    answered = "\n".join(f"{i}. {answer}" for i, (_, _, answer) in enumerate(drawn, 1))
    return {"prompt": asked + ANSWER, "completion": answered}


def by_length(rows: Sequence[Row], batch_size: int, rng: Random, window: int = 8) -> list[Row]:
    """The same rows in another order: batches taken from it hold rows of like length, so that little is padding.

    Sorts each `window` batches of rows by length and shuffles those batches; rows move no further than that.
    """
    ordered: list[Row] = []
    for start in range(0, len(rows), window * batch_size):
        near = sorted(
            rows[start : start + window * batch_size], key=lambda row: sum(map(len, question_and_answer(row)))
        )
        batches = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        rng.shuffle(batches)
        ordered += [row for batch in batches for row in batch]
    return ordered


def collate(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels` (B, S); labels are -100 on prompt and padding."""
    pairs = [question_and_answer(row) for row in rows]
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    texts = [f"{prompt}{answer}{tokenizer.eos_token}" for prompt, answer in pairs]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids_BS, mask_BS = batch["input_ids"], batch["attention_mask"]
    prompt_lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
    answer_BS = (torch.arange(ids_BS.shape[1]) >= prompt_lengths_B1) & mask_BS.bool()
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.where(answer_BS, -100)}


def _check(kind: str, given: Sequence[str], allowed: Sequence[str] | Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in allowed]
    if unknown or not given:
        named = ", ".join(unknown) or "(none given)"
        raise ConfigError(f"no {kind} named {named}; choose from: {', '.join(allowed)}")
