"""Data formats: detected by their columns, turned into what SFTTrainer trains on."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from molex.errors import ConfigError
from molex.training.data import detect_format, supervised
from molex.workbench import FORMATS, dataset, load_tokenizer, skills
from tests.training.small import mixture_of, trainer_of

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["messages", "id"], "messages"),
        (["conversations"], "messages"),
        (["prompt", "completion", "text"], "prompt-completion"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["instruction", "output"], "alpaca"),
        (["text", "prompt"], "text"),
    ],
)
def test_detects_the_format_by_columns(columns: list[str], expected: str) -> None:
    assert detect_format(columns) == expected


def test_unknown_columns_are_an_error_that_names_them_and_the_formats() -> None:
    with pytest.raises(ConfigError, match=r"question, answer .*messages or conversations.*prompt \+ completion"):
        detect_format(["question", "answer"])


def test_a_format_asked_for_must_have_its_columns() -> None:
    rows = Dataset.from_list([{"instruction": "i", "output": "o", "text": "t"}])
    assert supervised(rows, "text", chat=False).column_names == ["text"]
    with pytest.raises(ConfigError, match=r"'messages' needs messages or conversations; .* instruction, output, text"):
        supervised(rows, "messages", chat=False)
    with pytest.raises(ConfigError, match="format='csv'"):
        supervised(rows, "csv", chat=False)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"text": "a b"},
    ],
)
def test_rows_that_need_nothing_stay_and_lose_other_columns(row: dict[str, Any]) -> None:
    ready = supervised(Dataset.from_list([{**row, "source": "web", "task_id": 3}]), chat=True)
    assert ready[0] == {**row, "task_ids": 3}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "text=None in the first row"),
        ({"text": 3}, "text=3"),
        ({"instruction": "upper", "output": 3}, "output=3"),
        ({"prompt": "a", "completion": None}, "completion=None"),
        ({"messages": "hello"}, "messages are a list"),
        ({"messages": [{"who": "me", "content": "x"}]}, "messages are a list"),
        ({"text": "a", "task_ids": 0.5}, "task ids 0.5"),
        ({"text": "a", "task_id": "law"}, "task ids 'law'"),
    ],
)
def test_values_of_a_wrong_kind_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        supervised(Dataset.from_list([row]), chat=True)


def test_a_data_set_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        supervised(Dataset.from_dict({"text": []}), chat=True)


def test_alpaca_becomes_prompt_and_completion() -> None:
    rows = Dataset.from_list(
        [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi {you}", "input": "", "output": "!"}]
    )
    text, bare = supervised(rows, chat=False)
    assert text == {"prompt": "### Instruction:\nAdd\n\n1 2\n\n### Response:\n", "completion": "3"}
    assert bare["prompt"] == "### Instruction:\nHi {you}\n\n### Response:\n"
    chat, _ = supervised(rows, chat=True, join="{instruction}: {input}")
    assert chat["prompt"] == [{"role": "user", "content": "Add: 1 2"}]
    assert chat["completion"] == [{"role": "assistant", "content": "3"}]


def test_streams_are_read_as_tables_are() -> None:
    rows = Dataset.from_list([{"instruction": "Add", "input": "1 2", "output": "3", "task_id": 1}])
    assert list(supervised(rows.to_iterable_dataset(), chat=True)) == list(supervised(rows, chat=True))


def test_every_format_of_the_workbench_trains_on_the_same_tokens(tmp_path: Path) -> None:
    names, seen = list(skills())[:2], {}
    for format in FORMATS:
        rows = supervised(
            Dataset.from_list(dataset(names, "train", 2, format)), chat=True, join="{instruction}: {input}"
        )
        trainer = trainer_of("sft", mixture_of("mtlora", num_experts=3), tmp_path, rows, max_steps=1)
        trainer.train()
        assert sorted(trainer.tasks[0].tolist()) == [0, 1]
        seen[format] = sorted(load_tokenizer().batch_decode(trainer.seen[0]["input_ids"]))
    assert len({tuple(decoded) for decoded in seen.values()}) == 1, seen
