"""Tokens become text as they come: never half a character, and never the beginning of a stop string.

The same code serves answers that stream and answers that do not, so both say the same.
"""

import codecs
from dataclasses import dataclass, field
from typing import Literal

from molex_serve.engine.base import Event, ExpertShare, TokenLogprob
from molex_serve.http.vocabulary import Vocabulary

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """One token of an answer or an echoed prompt. text: what it released; all of them together are the text.
    offset: how many characters of the text come before it."""

    id: int
    text: str
    offset: int
    logprob: TokenLogprob | None = None
    expert: ExpertShare | None = None


@dataclass(frozen=True)
class Piece:
    """What came at once of one choice."""

    tokens: tuple[Token, ...] = ()
    finish_reason: Finish | None = None
    rest: str = ""  # text that was held back and is released by the end

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.rest


def joined(pieces: list[Piece]) -> Piece:
    """A whole choice."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece(tokens, pieces[-1].finish_reason, pieces[-1].rest)


class StopFinder:
    """Finds the first of some strings in a text that comes in parts, and holds back what may become one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops = stops
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether it ends here because a stop string follows."""
        self.held += text
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            return self._release(min(found)), True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        return self._release(len(self.held) - keep), False

    def _release(self, length: int) -> str:
        text, self.held = self.held[:length], self.held[length:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How much of a stop string's beginning the text ends in."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


@dataclass
class ChoiceText:
    """One choice while it grows. silent: further tokens that are no text, such as a request's stop tokens."""

    vocabulary: Vocabulary
    stops: tuple[str, ...] = ()
    silent: frozenset[int] = frozenset()
    offset: int = 0
    finder: StopFinder = field(init=False)
    decoder: codecs.IncrementalDecoder = field(init=False)

    def __post_init__(self) -> None:
        self.finder = StopFinder(self.stops)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, event: Event) -> Piece:
        """An event's tokens, up to the one that completes a stop string: then the piece says that it is the last."""
        tokens = []
        for place, token_id in enumerate(event.token_ids):
            offset = self.offset
            text, stopped = self._write(b"" if token_id in self.silent else self.vocabulary.text(token_id))
            logprob = event.logprobs[place] if event.logprobs else None
            expert = event.experts[place] if event.experts else None
            tokens.append(Token(token_id, text, offset, logprob, expert))
            if stopped:
                return Piece(tuple(tokens), "stop")
        if event.finish_reason is None:
            return Piece(tuple(tokens))
        rest, stopped = self._write(b"", final=True)
        finish = "length" if event.finish_reason == "length" and not stopped else "stop"
        return Piece(tuple(tokens), finish, rest if stopped else rest + self.finder.held)

    def _write(self, spelling: bytes, final: bool = False) -> tuple[str, bool]:
        text = self.decoder.decode(spelling, final)
        self.offset += len(text)
        return self.finder.feed(text)


def echo(vocabulary: Vocabulary, ids: tuple[int, ...], text: str, logprobs: list[TokenLogprob]) -> Piece:
    """A prompt as the first piece of its choices. logprobs: of its tokens from the second on, or none at all."""
    known = [None, *logprobs] if logprobs else [None] * len(ids)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens, offset = [], 0
    for token_id, logprob in zip(ids, known, strict=True):
        tokens.append(Token(token_id, "" if tokens else text, min(offset, len(text)), logprob))
        offset += len(decoder.decode(vocabulary.text(token_id)))
    return Piece(tuple(tokens))
