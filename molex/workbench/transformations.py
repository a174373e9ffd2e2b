"""The transformations that the base was pretrained on: what it knows before any expert is trained.

They give it the parts that skills are made of (copying, positions, the alphabet, letter cases, digits) and
none of the skills themselves.
"""

from collections.abc import Callable

from molex.workbench.skill import VOWELS, Draw, Skill, mixed_word, number, word, words

Answer = Callable[[str], str]


def transformations() -> dict[str, Skill]:
    """All pretraining transformations by name, in a fixed order."""
    table = {**_positions(), **_letters(), **_digits(), **_phrases()}
    return {name: Skill(name, draw, answer) for name, (draw, answer) in table.items()}


def advance(text: str, by: int) -> str:
    """Move every lowercase letter `by` places along the alphabet, z followed by a."""
    return "".join(chr((ord(c) - ord("a") + by) % 26 + ord("a")) for c in text)


def _swap_pairs(text: str) -> str:
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


def _positions() -> dict[str, tuple[Draw, Answer]]:
    return {
        "copy": (word, lambda s: s),
        "double": (word, lambda s: s + s),
        "stutter": (word, lambda s: "".join(c + c for c in s)),
        "first": (word, lambda s: s[0]),
        "last": (word, lambda s: s[-1]),
        "tail": (word, lambda s: s[1:]),
        "drop": (word, lambda s: s[:-1]),
        "rotate": (word, lambda s: s[1:] + s[0]),
        "wrap": (word, lambda s: s[-1] + s[:-1]),
        "swap": (word, lambda s: s[-1] + s[1:-1] + s[0]),
        "pairs": (word, _swap_pairs),
        "odd": (word, lambda s: s[::2]),
        "even": (word, lambda s: s[1::2]),
        "dash": (word, "-".join),
    }


def _letters() -> dict[str, tuple[Draw, Answer]]:
    return {
        "capital": (word, str.capitalize),
        "lower": (mixed_word, str.lower),
        "case": (mixed_word, lambda s: "".join("U" if c.isupper() else "l" for c in s)),
        "hide": (word, lambda s: "".join("*" if c in VOWELS else c for c in s)),
        "consonants": (lambda rng: "b" + word(rng, 3, 7), lambda s: "".join(c for c in s if c not in VOWELS)),
        "count": (word, lambda s: str(sum(c in VOWELS for c in s))),
        "length": (word, lambda s: str(len(s))),
        "unique": (word, lambda s: "".join(dict.fromkeys(s))),
        "max": (word, max),
        "hop": (word, lambda s: advance(s, 2)),
        "back": (word, lambda s: advance(s, -1)),
    }


def _digits() -> dict[str, tuple[Draw, Answer]]:
    return {
        "plus": (number, lambda s: str(int(s) + 1)),
        "opposite": (number, lambda s: "".join(str(9 - int(c)) for c in s)),
        "parity": (number, lambda s: "".join("eo"[int(c) % 2] for c in s)),
        "order": (number, lambda s: "".join(sorted(s))),
    }


def _phrases() -> dict[str, tuple[Draw, Answer]]:
    return {
        "join": (words(" ", 2, 3), lambda s: s.replace(" ", "")),
        "exchange": (words(" ", 2, 2), lambda s: " ".join(s.split()[::-1])),
        "title": (words(" ", 2, 3), str.title),
    }
