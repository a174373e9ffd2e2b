"""Measure the bench: what the base scores on each skill, and what a PEFT LoRA trained on that skill scores.

    python -m molex.workbench.measure                                        one adapter a skill
    python -m molex.workbench.measure --together --skills upper,ends --rank 16    one adapter for all

Prints a markdown table. The adapter is PEFT's own, on all linear layers, so that the numbers say nothing
about molex, only whether its bench can tell a model that has a skill from one that has not.
"""

import argparse
import time
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig
from torch import nn
from tqdm import trange
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from molex.workbench.data import Row, collate, dataset
from molex.workbench.model import load_base
from molex.workbench.scoring import exact_match_by_skill
from molex.workbench.skills import skills
from molex.workbench.tokenizer import load_tokenizer


def main() -> None:
    """Train and score one adapter per skill, or one for all, and print the table."""
    options = _arguments()
    groups = [options.skills] if options.together else [[name] for name in options.skills]
    print("| skill | base | LoRA | seconds |\n|---|---|---|---|")
    for names in groups:
        for name, base, adapted, seconds in measure(names, options):
            print(f"| {name} | {base:.2f} | {adapted:.2f} | {seconds:.0f} |", flush=True)


def measure(names: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    """Train one adapter on the named skills; yields (skill, base's score, adapter's score, seconds)."""
    torch.manual_seed(options.seed)
    tokenizer, model = load_tokenizer(), load_base()
    held_out = dataset(names, "test", options.test * len(names))
    before = exact_match_by_skill(model, tokenizer, held_out)
    model.add_adapter(LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"))
    started = time.monotonic()
    rows = dataset(names, "train", options.steps * options.batch, seed=options.seed)
    train(model, tokenizer, rows, options.batch, options.lr)
    seconds = time.monotonic() - started
    after = exact_match_by_skill(model, tokenizer, held_out)
    for name in names:
        yield name, before[name], after[name], seconds


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch: int,
    learning_rate: float,
) -> None:
    """One pass over the rows: AdamW, cosine after a short warm-up, loss on the answers."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    steps = len(rows) // batch
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    bar = trange(steps, leave=False)
    for step in bar:
        loss = model(**collate(rows[step * batch : (step + 1) * batch], tokenizer), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the base and LoRA adapters on the skills.")
    parser.add_argument("--skills", type=lambda names: names.split(","), default=list(skills()))
    parser.add_argument("--together", action="store_true", help="one adapter for all skills")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--test", type=int, default=100, help="held-out questions per skill")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
