"""The pretraining script: seeded, learns, asks about transformations alone."""

from random import Random

import torch
from transformers import LlamaForCausalLM

from molex.workbench import skills, transformations
from molex.workbench.model import base_config
from molex.workbench.pretrain import Pretraining, draw_batch, train
from molex.workbench.tokenizer import build_tokenizer


def run(steps: int) -> tuple[list[float], LlamaForCausalLM]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(base_config())
    recipe = Pretraining(steps=steps, questions=10, warmup=2, numbered_share=1.0)
    return train(model, tokenizer, recipe), model


def test_same_seed_same_losses_and_the_loss_falls():
    first, _ = run(12)
    second, _ = run(12)
    assert first == second
    assert first[-1] < first[0] - 0.5


def test_batches_hold_transformations_alone():
    known, rng = list(transformations().values()), Random(0)
    for share in (0.0, 1.0):
        for _ in range(20):
            for row in draw_batch(known, 96, share, rng):
                assert not any(f"{name}: " in row["prompt"] for name in skills())


def test_batches_keep_their_number_of_questions():
    known, rng = list(transformations().values()), Random(0)
    sizes = set()
    for _ in range(60):
        rows = draw_batch(known, 96, 0.5, rng)
        asked = {row["prompt"].count(": ") for row in rows}
        assert len(asked) == 1
        n = asked.pop()
        assert len(rows) == 96 // n
        sizes.add(n)
    assert sizes == set(range(1, 11))
