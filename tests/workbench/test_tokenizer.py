"""The tokenizer against UTF-8 itself, the chat template's masks, and TRL's preparation of every format."""

from random import Random

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from molex.workbench import dataset, load_base, load_tokenizer
from molex.workbench.tokenizer import BOS, EOS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_a_token_is_a_byte(tokenizer):
    rng = Random(0)
    texts = ["", " a  b\n", "\x00\x7f", "héllo 😀 ￿", "".join(chr(c) for c in range(256))]
    texts += ["".join(chr(rng.randrange(0xE000, 0x110000)) for _ in range(20))]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == [BOS, *text.encode()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_specials(tokenizer):
    assert len(tokenizer) == 264
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)


def test_the_shipped_files_are_the_built_tokenizer(tokenizer):
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert tokenizer("a é")["input_ids"] == built("a é")["input_ids"]


def test_chat_template_masks_the_answers_alone(tokenizer):
    turns = [("user", "copy: ab"), ("assistant", "ab"), ("user", "last: xyz"), ("assistant", "z")]
    messages = [{"role": role, "content": content} for role, content in turns]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    expected = [(BOS, 0)]
    for question, answer in (("copy: ab", "ab"), ("last: xyz", "z")):
        expected += [(byte, 0) for byte in f"{question}\n= ".encode()]
        expected += [(byte, 1) for byte in answer.encode()] + [(EOS, 1)]
    assert list(zip(out["input_ids"], out["assistant_masks"], strict=True)) == expected


def test_generation_prompt_is_the_question_and_the_answer_mark(tokenizer):
    user = [{"role": "user", "content": "reverse: hello"}]
    ids = tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer("reverse: hello\n= ")["input_ids"]


@pytest.mark.parametrize("format", ["prompt-completion", "messages", "text"])
def test_trl_prepares_the_same_tokens_from_every_format(format, tokenizer, tmp_path):
    """Labels too: the answer and <eos> where the format marks the answer, else everything."""
    config = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", assistant_only_loss=format == "messages"
    )
    rows = Dataset.from_list(dataset(["upper"], "train", 3, format))
    trainer = SFTTrainer(load_base(), config, train_dataset=rows, processing_class=tokenizer)
    for row, plain in zip(trainer.train_dataset, dataset(["upper"], "train", 3), strict=True):
        prompt, answer = plain["prompt"].encode(), plain["completion"].encode()
        assert row["input_ids"] == [BOS, *prompt, *answer, EOS]
        if format != "text":
            assert row["labels"] == [-100] * (1 + len(prompt)) + [*answer, EOS]
