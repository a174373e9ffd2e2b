"""What a skill is: a name, a way to draw inputs, and a function that gives the one right answer.

Both lists of the bench are made of these: `transformations.py` (the base has learnt them) and `skills.py` (it
has not). An input belongs to a split by its own hash, so the splits are disjoint whatever the seed and size.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

VOWELS = "aeiou"
SPLITS = ("train", "validation", "test")

Draw = Callable[[Random], str]


@dataclass(frozen=True)
class Skill:
    """A verifiable mapping from one short string to another, asked for as `name: input`."""

    name: str
    draw: Draw
    answer: Callable[[str], str]

    def sample(self, rng: Random, split: str) -> tuple[str, str]:
        """Draw an input of that split; returns (input, answer)."""
        while True:
            text = self.draw(rng)
            if split_of(self.name, text) == split:
                return text, self.answer(text)


def split_of(name: str, text: str) -> str:
    """The split that owns an input: 8 in 10 train, 1 validation, 1 test."""
    tenth = hashlib.sha256(f"{name}: {text}".encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(tenth, "train")


def letter(rng: Random) -> str:
    """A lowercase letter; two in five are vowels."""
    return rng.choice(VOWELS) if rng.random() < 0.4 else rng.choice(ascii_lowercase)


def word(rng: Random, shortest: int = 3, longest: int = 8) -> str:
    """Lowercase letters."""
    return "".join(letter(rng) for _ in range(rng.randint(shortest, longest)))


def mixed_word(rng: Random) -> str:
    """Letters of either case."""
    return "".join(rng.choice((c, c.upper())) for c in word(rng))


def number(rng: Random, shortest: int = 3, longest: int = 6) -> str:
    """Decimal digits without a leading zero."""
    first = rng.choice("123456789")
    return first + "".join(rng.choice("0123456789") for _ in range(rng.randint(shortest, longest) - 1))


def words(separator: str, fewest: int, most: int) -> Draw:
    """A draw of several short words with a separator between them."""
    return lambda rng: separator.join(word(rng, 2, 4) for _ in range(rng.randint(fewest, most)))
