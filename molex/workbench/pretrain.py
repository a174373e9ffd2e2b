"""Pretrain the base: the script that made the shipped weights.

    python -m molex.workbench.pretrain --out runs/base

Generated text, seeded: single questions at first, then more and more numbered prompts of 1 to 10
questions, all over the transformations and never the skills. The loss is on the answers, plus a tenth of it
on the questions, so that training on whole texts finds a model that expects them.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from molex.workbench.data import FORMATS, Row, collate, dataset, numbered
from molex.workbench.model import base_config
from molex.workbench.scoring import exact_match, exact_match_by_skill
from molex.workbench.skill import Skill
from molex.workbench.tokenizer import build_tokenizer
from molex.workbench.transformations import transformations


@dataclass(frozen=True)
class Pretraining:
    """The recipe of the shipped base."""

    seed: int = 0
    steps: int = 6000
    questions: int = 96  # in a batch, however they are grouped into prompts
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    question_loss: float = 0.1
    numbered_share: float = 0.8  # of the batches, reached after a third of the steps; it grows from 0


def main() -> None:
    """Train, score on held-out inputs, save model, tokenizer and the record of the run."""
    recipe, out = _arguments()
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(base_config())
    started = time.monotonic()
    losses = train(model, tokenizer, recipe)
    seconds = time.monotonic() - started
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = asdict(recipe) | {
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "seconds": round(seconds),
        "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        **score(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), tokenizer),
    }
    (out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Pretraining) -> list[float]:
    """AdamW under a cosine schedule; returns the answer loss of every step."""
    rng, known = Random(recipe.seed), list(transformations().values())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.steps)
    losses = []
    bar = trange(recipe.steps, desc="pretraining", mininterval=5)
    for step in bar:
        share = recipe.numbered_share * min(1.0, 3 * step / recipe.steps)
        batch = collate(draw_batch(known, recipe.questions, share, rng), tokenizer)
        losses.append(train_step(model, batch, optimizer, schedule, recipe.question_loss))
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return losses


def train_step(
    model: LlamaForCausalLM,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    question_loss: float,
) -> float:
    """One update; returns the mean loss over the answers' tokens."""
    # Padding is on the right, where earlier tokens cannot see it: without a mask the fused attention runs.
    logits_BSV = model(batch["input_ids"], use_cache=False).logits[:, :-1]
    targets_T = batch["input_ids"][:, 1:].flatten()
    losses_T = cross_entropy(logits_BSV.flatten(0, 1), targets_T, reduction="none")
    answer_T = batch["labels"][:, 1:].flatten() != -100
    question_T = batch["attention_mask"][:, 1:].flatten().bool() & ~answer_T
    answer = losses_T[answer_T].mean()
    (answer + question_loss * losses_T[question_T].mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return answer.item()


def draw_batch(known: list[Skill], questions: int, numbered_share: float, rng: Random) -> list[Row]:
    """About `questions` questions: alone, or n to a numbered prompt, with one n for the whole batch."""
    if rng.random() >= numbered_share:
        row = FORMATS["prompt-completion"]
        return [row(skill.name, *skill.sample(rng, "train")) for skill in rng.choices(known, k=questions)]
    n = rng.randint(1, 10)
    return [numbered(rng.choices(known, k=n), rng, "train") for _ in range(questions // n)]


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Exact match on held-out inputs: every transformation alone, and whole numbered prompts."""
    known = transformations()
    rows = dataset(list(known), "test", 64 * len(known))
    rng = Random("numbered")
    prompts = {
        n: [numbered(rng.choices(list(known.values()), k=n), rng, "test") for _ in range(128)] for n in (1, 3, 5, 10)
    }
    return {
        "exact_match": exact_match_by_skill(model, tokenizer, rows),
        "exact_match_numbered": {n: exact_match(model, tokenizer, rows) for n, rows in prompts.items()},
    }


def _arguments() -> tuple[Pretraining, Path]:
    parser = argparse.ArgumentParser(description="Pretrain the base of the bench.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Pretraining.steps)
    parser.add_argument("--seed", type=int, default=Pretraining.seed)
    given = parser.parse_args()
    return Pretraining(seed=given.seed, steps=given.steps), given.out


if __name__ == "__main__":
    main()
