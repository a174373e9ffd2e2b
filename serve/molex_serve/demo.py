"""`molex serve --demo`: the workbench's base, skills as LoRAs, and a mixture routed over them. Trained once, offline.

The base is a tiny Llama that ships with molex and does not know these skills; each adapter teaches one.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import molex
from molex.workbench import dataset, load_base, load_tokenizer
from molex.workbench.data import question_and_answer
from molex.workbench.training import Run, fit

SKILLS = ("upper", "reverse", "vowels")
MIXTURE = "mixture"
STEPS, ROWS = 100, 16


def demo_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    return load_base(), load_tokenizer()


def demo_adapters(folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Folders of the adapters, trained where they are not there yet."""
    for skill in SKILLS:
        if not (folder / skill).is_dir():
            say(f"training the adapter {skill!r}, once")
            train_skill(folder, skill)
    if not (folder / MIXTURE).is_dir():
        say(f"training a router over {', '.join(SKILLS)}, once")
        train_mixture(folder)
    adapters = {name: str(folder / name) for name in (*SKILLS, MIXTURE)}
    return adapters | {"blend": ":0.5+".join(SKILLS[:2]) + ":0.5"}


def train_skill(folder: Path, skill: str) -> None:
    torch.manual_seed(0)
    mixture = molex.convert(load_base(), molex.preset("lora", rank=8, dropout=0.0))
    run = Run(steps=STEPS, batch_size=ROWS)
    fit(mixture, load_tokenizer(), dataset([skill], "train", STEPS * ROWS), run)
    made = mixture.export_peft(folder / f".{skill}")
    made[0].rename(folder / skill)
    (folder / f".{skill}").rmdir()


def train_mixture(folder: Path) -> None:
    """Experts are the adapters, frozen; a gate in every linear starts from a few prompts of each, and learns."""
    torch.manual_seed(0)
    model, tokenizer = demo_model()
    mixture = molex.from_peft(model, {skill: folder / skill for skill in SKILLS}, router="lora-mixer")
    questions = {skill: [question_and_answer(row)[0] for row in dataset([skill], "train", 40)] for skill in SKILLS}
    molex.gates_from_prompts(mixture, tokenizer, questions)
    fit(mixture, tokenizer, dataset(SKILLS, "train", STEPS * ROWS), Run(steps=STEPS, batch_size=ROWS))
    mixture.save(folder / MIXTURE)
