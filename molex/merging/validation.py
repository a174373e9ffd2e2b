"""Batches with labels from a file of rows, to measure losses of causal language models on.

| row, one JSON object a line | what the loss covers |
|---|---|
| `{"prompt": ..., "completion": ...}` | the completion and the end of text |
| `{"messages": [{"role": ..., "content": ...}, ...]}` | the last message, in the tokenizer's chat template |
| `{"text": ...}` | everything |
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molex.errors import ConfigError

Batch = dict[str, Tensor]


def validation_batches(path: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16) -> list[Batch]:
    """Raises ConfigError on a file that cannot be read, or has a row of no kind above."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON, one object a line: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has no rows")
    pairs = [_encoded(row, tokenizer, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    return [_batch(pairs[start : start + batch_size]) for start in range(0, len(pairs), batch_size)]


def _encoded(row: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[list[int], int]:
    """Token ids, and how many of them the loss leaves out."""
    asked, whole = _texts(row, tokenizer, place)
    end = str(tokenizer.eos_token or "")
    special = "messages" not in row  # a chat template writes its own
    ids: Any = tokenizer(whole if whole.endswith(end) else whole + end, add_special_tokens=special)["input_ids"]
    prompt: Any = tokenizer(asked, add_special_tokens=special)["input_ids"] if asked else []
    return ids, len(prompt)


def _texts(row: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[str, str]:
    """What is asked, and the same with the answer."""
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"], row["prompt"] + row["completion"]
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list) and row["messages"]:
        template: Any = tokenizer.apply_chat_template
        asked = template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        return asked, template(row["messages"], tokenize=False)
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return "", row["text"]
    keys = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
    raise ConfigError(f"{place} is {keys}; give prompt and completion, messages, or text")


def _batch(pairs: list[tuple[list[int], int]]) -> Batch:
    """Padded on the right; labels are -100 where nothing is learned."""
    length = max(len(ids) for ids, _ in pairs)
    ids_BS = torch.zeros(len(pairs), length, dtype=torch.int64)
    mask_BS, labels_BS = torch.zeros_like(ids_BS), torch.full_like(ids_BS, -100)
    for row, (ids, num_asked) in enumerate(pairs):
        ids_BS[row, : len(ids)] = torch.tensor(ids)
        mask_BS[row, : len(ids)] = 1
        labels_BS[row, num_asked : len(ids)] = torch.tensor(ids[num_asked:])
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
