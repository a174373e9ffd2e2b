"""How each of OpenAI's two APIs words what was generated: whole choices, and the chunks of a stream."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from molex_serve.http.schemas import (
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    CompletionChoice,
    CompletionLogprobs,
    TokenExpert,
    TopLogprob,
)
from molex_serve.http.text import Piece, Token
from molex_serve.http.vocabulary import Vocabulary

ChoiceT = TypeVar("ChoiceT", CompletionChoice, ChatChoice)
FLOOR = -9999.0  # what OpenAI writes for a token that cannot be; JSON has no infinity


@dataclass(frozen=True)
class Wording(ABC, Generic[ChoiceT]):
    """logprobs, experts: whether they were asked for."""

    vocabulary: Vocabulary
    logprobs: bool
    experts: bool
    whole_object: Literal["text_completion", "chat.completion"]
    chunk_object: Literal["text_completion", "chat.completion.chunk"]

    def opening(self, index: int) -> ChoiceT | None:
        """What a choice's stream begins with, before any token."""
        return None

    @abstractmethod
    def whole(self, index: int, piece: Piece) -> ChoiceT: ...

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> ChoiceT: ...

    def with_experts(self, choice: ChoiceT, piece: Piece) -> ChoiceT:
        if self.experts:
            choice.experts = _experts(piece)
        return choice


class CompletionWording(Wording[CompletionChoice]):
    def whole(self, index: int, piece: Piece) -> CompletionChoice:
        logprobs = _completion_logprobs(self.vocabulary, piece.tokens) if self.logprobs else None
        choice = CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason)
        return self.with_experts(choice, piece)

    def chunk(self, index: int, piece: Piece) -> CompletionChoice:
        return self.whole(index, piece)


class ChatWording(Wording[ChatChoice]):
    def opening(self, index: int) -> ChatChoice:
        delta = ChatMessage(role="assistant", content="")
        return ChatChoice(index=index, delta=delta, logprobs=None, finish_reason=None)

    def whole(self, index: int, piece: Piece) -> ChatChoice:
        message = ChatMessage(role="assistant", content=piece.text)
        logprobs = self._logprobs(piece)
        choice = ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=piece.finish_reason)
        return self.with_experts(choice, piece)

    def chunk(self, index: int, piece: Piece) -> ChatChoice:
        delta = ChatMessage(content=piece.text)
        logprobs = self._logprobs(piece)
        choice = ChatChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=piece.finish_reason)
        return self.with_experts(choice, piece)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        return ChatLogprobs(content=[_chat_logprob(self.vocabulary, token) for token in piece.tokens])


def _experts(piece: Piece) -> list[TokenExpert]:
    """Their texts together are the piece's."""
    named = [
        TokenExpert(
            text=token.text,
            name=None if token.expert is None else token.expert.name,
            share=None if token.expert is None else token.expert.share,
        )
        for token in piece.tokens
    ]
    return [*named, TokenExpert(text=piece.rest, name=None, share=None)] if piece.rest else named


def _completion_logprobs(vocabulary: Vocabulary, tokens: Sequence[Token]) -> CompletionLogprobs:
    """An echoed prompt's first token has none: nothing comes before it."""
    return CompletionLogprobs(
        tokens=[vocabulary.label(token.id) for token in tokens],
        token_logprobs=[None if token.logprob is None else _finite(token.logprob.logprob) for token in tokens],
        top_logprobs=[_alternatives(vocabulary, token) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def _alternatives(vocabulary: Vocabulary, token: Token) -> dict[str, float] | None:
    """The most likely tokens, and the chosen one where it is none of them."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in (*token.logprob.top, (token.id, token.logprob.logprob)):
        found.setdefault(vocabulary.label(token_id), _finite(logprob))
    return found


def _chat_logprob(vocabulary: Vocabulary, token: Token) -> ChatLogprob:
    known = token.logprob
    chosen = _top_logprob(vocabulary, token.id, FLOOR if known is None else known.logprob)
    top = [_top_logprob(vocabulary, *alternative) for alternative in (() if known is None else known.top)]
    return ChatLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)


def _top_logprob(vocabulary: Vocabulary, token_id: int, logprob: float) -> TopLogprob:
    spelling = vocabulary.spelling(token_id)
    return TopLogprob(token=vocabulary.label(token_id), logprob=_finite(logprob), bytes=list(spelling))


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR) if math.isfinite(logprob) else FLOOR
