"""The skills: what the base does not know, and an expert has to learn."""

from random import Random
from string import ascii_lowercase

from molex.workbench.skill import VOWELS, Skill, mixed_word, number, word, words
from molex.workbench.transformations import advance


def _even_word(rng: Random) -> str:
    """Letters drawn evenly: among many vowels the least letter would nearly always be a."""
    return "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(3, 8)))


def skills() -> dict[str, Skill]:
    """All skills by name, in a fixed order."""
    table = {
        "reverse": (word, lambda s: s[::-1]),
        "upper": (word, str.upper),
        "sort": (word, lambda s: "".join(sorted(s))),
        "shift": (word, lambda s: advance(s, 1)),
        "ends": (lambda rng: word(rng, 4, 8), lambda s: s[0] + s[-1]),
        "inner": (word, lambda s: s[1:-1]),
        "vowels": (
            lambda rng: rng.choice("bdfgklmnprst") + word(rng, 2, 6) + rng.choice(VOWELS),
            lambda s: "".join(c for c in s if c in VOWELS),
        ),
        "min": (_even_word, min),
        "mirror": (lambda rng: word(rng, 3, 6), lambda s: s + s[::-1]),
        "triple": (lambda rng: word(rng, 3, 6), lambda s: s * 3),
        "flip": (mixed_word, str.swapcase),
        "digitsum": (number, lambda s: str(sum(map(int, s)))),
        "minus": (number, lambda s: str(int(s) - 1)),
        "descend": (number, lambda s: "".join(sorted(s, reverse=True))),
        "initials": (words(" ", 2, 4), lambda s: "".join(w[0] for w in s.split())),
        "undash": (words("-", 2, 4), lambda s: s.replace("-", "")),
    }
    return {name: Skill(name, draw, answer) for name, (draw, answer) in table.items()}
