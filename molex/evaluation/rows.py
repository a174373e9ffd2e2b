"""Rows of a user's file, and the text in them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molex.errors import ConfigError

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """A JSON list of objects, or one object a line in a .jsonl. Raises ConfigError on anything else, or on none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines] if Path(path).suffix == ".jsonl" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a file of rows") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON: {error}; give a list of objects, or a .jsonl with one a line"
        ) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} holds no rows; give a JSON list of objects, or a .jsonl with one a line")
    return rows


def labelled_texts(rows: Sequence[Row], label: str) -> tuple[list[str], list[str]]:
    """Each row's text, `text` or `prompt` and `completion` together, and its value in the column `label`.

    Raises ConfigError where a row lacks them, or they are no texts.
    """
    texts = []
    for row in rows:
        parts = [row.get("text")] if "text" in row else [row.get("prompt"), row.get("completion", "")]
        if not all(isinstance(part, str) for part in parts) or label not in row:
            raise ConfigError(
                f"a row needs `text`, or `prompt` and `completion`, as texts, and the label `{label}`; "
                f"one has {', '.join(row)}"
            )
        texts.append("".join(map(str, parts)))
    return texts, [str(row[label]) for row in rows]
