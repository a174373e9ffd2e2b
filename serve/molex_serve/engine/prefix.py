"""What a prefix cache knows a prompt by.

Keys and values depend on the adapter that computed them, transformers' cache knows blocks by their tokens alone. So
it is shown, in the place of a prompt's first token, a number that stands for that token under this adapter. Every
block's hash contains the first block's: two adapters never share one, and all requests of one do.
"""

from collections.abc import Sequence

_FIRST = -2  # no token; -1 is transformers' sign for one that is not drawn yet


class PrefixSalt:
    def __init__(self) -> None:
        self._numbers: dict[tuple[object, int], int] = {}

    def apply(self, owner: object, tokens: Sequence[int]) -> list[int]:
        """owner: what keys and values depend on besides the tokens, falsy = the base's own."""
        if not owner or not tokens:
            return list(tokens)
        number = self._numbers.setdefault((owner, tokens[0]), _FIRST - len(self._numbers))
        return [number, *tokens[1:]]
