"""Tokens as the bytes that they add to a text, so that texts are put together exactly and no character is ever cut.

Decoding token by token through `tokenizer.decode` shows a replacement character for every part of a character and
costs the whole text each time; bytes are put together once. How a token spells bytes follows from the tokenizer's
decoder: byte-level (one printable character a byte), byte fallback (<0xE2>, ▁ for a space), or, for any other, what
the token adds behind a fixed one.
"""

import json
import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


class Vocabulary:
    """size: ids from 0 up to it may be in a prompt. silent: tokens that are no text, such as the end's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.silent = frozenset(tokenizer.all_special_ids)
        self._kinds = frozenset(_decoder_kinds(tokenizer))
        self._byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
        self._known: dict[int, bytes] = {}
        self._anchor = "" if self._kinds & {"ByteLevel", "ByteFallback", "Metaspace"} else "a"

    def spelling(self, token_id: int) -> bytes:
        """What a token is written as, special ones by their names. Nothing for ids that the tokenizer lacks."""
        if token_id not in self._known:
            self._known[token_id] = self._spell(token_id)
        return self._known[token_id]

    def text(self, token_id: int) -> bytes:
        """What a token adds to a text."""
        return b"" if token_id in self.silent else self.spelling(token_id)

    def label(self, token_id: int) -> str:
        """A token's name among log-probabilities: its text, or its bytes where they are no whole characters."""
        spelling = self.spelling(token_id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)

    def _spell(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < self.size else None
        if not isinstance(token, str):
            return b""
        if token_id in self.silent:
            return token.encode()
        if "ByteLevel" in self._kinds:
            known = all(symbol in self._byte_of for symbol in token)  # an added token is written as it is
            return bytes(self._byte_of[symbol] for symbol in token) if known else token.encode()
        if not self._anchor:
            match = _FALLBACK.fullmatch(token)
            return bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode()
        return self._behind_anchor(token_id)

    def _behind_anchor(self, token_id: int) -> bytes:
        """Decoders strip the space that a first token brings, so it is decoded as a second one."""
        before = self.tokenizer.encode(self._anchor, add_special_tokens=False)
        head = str(self.tokenizer.decode(before, clean_up_tokenization_spaces=False))
        both = str(self.tokenizer.decode([*before, token_id], clean_up_tokenization_spaces=False))
        return both.removeprefix(head).encode()


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The types of a tokenizer's decoder and of those in it; none for one that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return
    state = json.loads(backend.decoder.__getstate__())
    for part in (state, *state.get("decoders", ())):
        yield part["type"]
