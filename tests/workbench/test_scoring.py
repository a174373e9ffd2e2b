"""Scores against a decoder that is a loop over the full forward, one row at a time."""

from statistics import fmean

import pytest
import torch

from molex.workbench import (
    answers,
    dataset,
    exact_match,
    exact_match_by_skill,
    load_base,
    load_tokenizer,
    question_and_answer,
)


@pytest.fixture(scope="module")
def base():
    return load_base()


def greedy(model, tokenizer, prompt, longest):
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < longest and ids[-1] != tokenizer.eos_token_id:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return bytes(i for i in ids[start:] if i < 256).decode()


def test_batched_answers_equal_a_loop(base):
    tokenizer = load_tokenizer()
    prompts = [row["prompt"] for row in dataset(["copy", "sort", "unique", "title"], "test", 12)]
    expected = [greedy(base, tokenizer, prompt, 12) for prompt in prompts]
    assert answers(base, tokenizer, prompts, 12) == expected


def test_scores_count_exact_answers(base):
    tokenizer, rows = load_tokenizer(), dataset(["copy", "sort"], "test", 20)
    right = [greedy(base, tokenizer, *_prompt_and_room(row)) == row["completion"] for row in rows]
    assert exact_match(base, tokenizer, rows, batch_size=7) == fmean(right)
    assert exact_match_by_skill(base, tokenizer, rows) == {
        "copy": fmean(right[::2]),
        "sort": fmean(right[1::2]),
    }


def test_an_answer_that_goes_on_is_wrong(base):
    """`double: ab` starts with the answer of `copy: ab`; a prefix is not a match."""
    rows = [row | {"completion": row["completion"][: len(row["completion"]) // 2]} for row in _known("double")]
    assert exact_match(base, load_tokenizer(), rows) == 0.0


def test_training_mode_is_kept(base):
    base.train()
    exact_match(base, load_tokenizer(), _known("copy"))
    assert base.training
    base.eval()


def _known(name):
    return dataset([name], "test", 8)


def _prompt_and_room(row):
    prompt, answer = question_and_answer(row)
    return prompt, len(answer) + 1
