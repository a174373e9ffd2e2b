"""What the soak asks, and what each adapter answers when it is asked alone: token for token, as far as that is certain.

Greedy answers take the largest logit; sampled ones, at temperature t, the largest of

    logits / t + g(seed, position, token)

with the server's published noise g. Where the two largest are close, the order of a sum decides: an answer is only
compared up to there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedModel

from molex.workbench import load_tokenizer
from molex.workbench.tokenizer import ANSWER, EOS
from molex_serve.engine.noise import gumbel, noise_keys

CLEAR = 3e-3
LONGEST = 12  # tokens of an answer
SKILLS = ("upper", "reverse", "sort", "vowels", "shift", "double")
SHARED = "Several short tasks follow, and each has exactly one answer, after an equals sign.\n"


@dataclass(frozen=True)
class Question:
    """seeds: of its choices; none where it is greedy."""

    text: str
    seeds: tuple[int, ...] = ()
    temperature: float = 0.0

    @property
    def user(self) -> str:
        """What a chat says, whose template adds the answer mark."""
        return self.text.removesuffix(ANSWER)


@dataclass(frozen=True)
class Answer:
    """tokens: those that are certain. ended: the last of them is the end-of-sequence token."""

    tokens: tuple[int, ...]
    ended: bool

    def text(self, num_tokens: int) -> str:
        return bytes(token for token in self.tokens[:num_tokens] if token < 256).decode(errors="replace")

    def finish(self, num_tokens: int) -> str:
        return "stop" if self.ended and len(self.tokens) <= num_tokens else "length"


def questions(number: int, seed: int) -> list[Question]:
    """Some with a beginning in common, some sampled, of different lengths."""
    dice = Random(f"questions {seed}")
    found = []
    for index in range(number):
        words = "".join(dice.choice("abcdefghijklmnopqrst ") for _ in range(dice.randrange(3, 60)))
        text = f"{SHARED if index % 2 else ''}{SKILLS[index % len(SKILLS)]}: {words}{ANSWER}"
        first = dice.randrange(1 << 40)
        sampled = index % 4 == 3
        found.append(Question(text, (first, first + 1) if sampled else (), 0.8 if sampled else 0.0))
    return found


def answers(model: PreTrainedModel, asked: Sequence[Question]) -> dict[Question, list[Answer]]:
    """One for each choice; a greedy question has one. Those of which nothing is certain are left out."""
    found = {}
    for question in asked:
        own = [_answer(model, question, seed) for seed in question.seeds or (0,)]
        if all(answer.tokens for answer in own):
            found[question] = own
    return found


@torch.no_grad()
def _answer(model: PreTrainedModel, question: Question, seed: int) -> Answer:
    tokens: list[int] = []
    for first, second, token in _steps(model, load_tokenizer().encode(question.text), question.temperature, seed):
        if first - second < CLEAR:
            break
        tokens.append(token)
        if token == EOS or len(tokens) == LONGEST:
            break
    return Answer(tuple(tokens), EOS in tokens)


def _steps(model: PreTrainedModel, ids: list[int], temperature: float, seed: int) -> Iterator[tuple[float, float, int]]:
    """The two largest scores, and whose the first is."""
    cache, new = None, ids
    while True:
        outputs = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
        scores_V = outputs.logits[0, -1].float()
        if temperature:
            noise_V = gumbel(noise_keys([(seed, len(ids))]), len(scores_V))[0]
            scores_V = scores_V / temperature + noise_V
        best, which = scores_V.topk(2)
        yield best[0].item(), best[1].item(), int(which[0])
        cache, new = outputs.past_key_values, [int(which[0])]
        ids = [*ids, *new]
