"""Rows and batches: equal tokens from every format, splits that share nothing, labels on the answer alone."""

from random import Random

import pytest
import torch
from datasets import Dataset

from molex.errors import ConfigError
from molex.workbench import (
    FORMATS,
    collate,
    dataset,
    load_tokenizer,
    numbered,
    question_and_answer,
    skills,
    split_of,
    transformations,
)
from molex.workbench.data import by_length


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_collates_to_the_same_batch(format):
    tokenizer, names = load_tokenizer(), list(skills())
    expected = collate(dataset(names, "train", 20), tokenizer)
    batch = collate(dataset(names, "train", 20, format), tokenizer)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_collate_by_hand():
    rows = [{"prompt": "a\n= ", "completion": "xy"}, {"prompt": "abc\n= ", "completion": "z"}]
    batch = collate(rows, load_tokenizer())
    bos, eos, pad = 257, 258, 256
    first = [bos, *b"a\n= xy", eos, pad]
    second = [bos, *b"abc\n= z", eos]
    assert batch["input_ids"].tolist() == [first, second]
    assert batch["attention_mask"].tolist() == [[1] * 8 + [0], [1] * 9]
    assert batch["labels"].tolist() == [[-100] * 5 + [*b"xy", eos, -100], [-100] * 7 + [*b"z", eos]]


def test_row_of_each_format():
    format_row = {name: make("reverse", "hello", "olleh") for name, make in FORMATS.items()}
    assert format_row == {
        "prompt-completion": {"prompt": "reverse: hello\n= ", "completion": "olleh"},
        "messages": {
            "messages": [
                {"role": "user", "content": "reverse: hello"},
                {"role": "assistant", "content": "olleh"},
            ]
        },
        "alpaca": {"instruction": "reverse", "input": "hello", "output": "olleh"},
        "text": {"text": "reverse: hello\n= olleh"},
    }
    for row in format_row.values():
        assert question_and_answer(row) == ("reverse: hello\n= ", "olleh")


def test_rows_take_the_skills_in_turn_and_carry_task_ids():
    rows = Dataset.from_list(dataset(["sort", "copy", "upper"], "validation", 7))
    assert rows["skill"] == ["sort", "copy", "upper", "sort", "copy", "upper", "sort"]
    assert rows["task_ids"] == [0, 1, 2, 0, 1, 2, 0]


def test_reproducible_and_larger_sizes_append():
    names = list(skills())
    assert dataset(names, "train", 200) == dataset(names, "train", 300)[:200]
    assert dataset(names, "train", 200) != dataset(names, "train", 200, seed=1)


def test_the_rows_of_seed_0_never_change():
    assert [row["prompt"] for row in dataset(["reverse", "minus"], "test", 4)] == [
        "reverse: eiauptaj\n= ",
        "minus: 4678\n= ",
        "reverse: qoijiao\n= ",
        "minus: 9153\n= ",
    ]


def test_no_input_is_in_two_splits():
    names = list(skills())
    seen = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1):
            for row in dataset(names, split, 1000, seed=seed):
                assert seen.setdefault(row["prompt"], split) == split
    assert set(seen.values()) == {"train", "validation", "test"}


def test_shares_of_the_splits():
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    for i in range(5000):
        counts[split_of("sort", str(i))] += 1
    assert counts["validation"] == pytest.approx(500, rel=0.2)
    assert counts["test"] == pytest.approx(500, rel=0.2)


def test_numbered_prompts_ask_in_order():
    known = transformations()
    row = numbered([known["copy"], known["length"]], Random(0), "train")
    first, second = row["prompt"].removesuffix("\n= ").split("\n")
    text, other = first.removeprefix("1. copy: "), second.removeprefix("2. length: ")
    assert row["completion"] == f"1. {text}\n2. {len(other)}"


@pytest.mark.parametrize("wrong", [{"names": ["sorted"]}, {"names": []}, {"split": "dev"}, {"format": "chatml"}])
def test_unknown_names_say_what_is_allowed(wrong):
    arguments = {"names": ["sort"], "split": "train", "size": 1, **wrong}
    with pytest.raises(ConfigError, match=r"choose from: .*(reverse|validation|alpaca)"):
        dataset(**arguments)


def test_batches_of_like_length_hold_the_same_rows_near_their_places():
    own, rng = skills()["upper"], Random(0)
    rows = [{**numbered([own] * (1 + i % 3), rng, "train"), "index": i} for i in range(100)]
    ordered = by_length(rows, 8, Random(1), window=4)
    assert sorted(row["index"] for row in ordered) == list(range(100))
    assert all(row["index"] // 32 == place // 32 for place, row in enumerate(ordered))
    tokenizer = load_tokenizer()

    def padding(rows):
        masks = [collate(rows[i : i + 8], tokenizer)["attention_mask"] for i in range(0, 96, 8)]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    assert padding(ordered) < 0.15 < 0.3 < padding(rows)
    lengths = [len(row["prompt"]) for row in ordered[:32:8]]
    assert lengths != sorted(lengths)
    assert by_length(rows, 8, Random(1), window=4) == ordered
