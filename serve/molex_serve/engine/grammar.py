"""JSON schemas as masks over the next token, by llguidance, for any fast tokenizer.

What is written has no white space between its parts: a small model that may write any amount of it writes nothing else.
"""

import threading
from collections.abc import Collection, Sequence

import llguidance
import llguidance.hf
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from molex_serve.errors import BadRequest

LONGEST_SCHEMA = 120_000  # characters, as in OpenAI's API: masks of larger ones would keep all others waiting


class Matcher:
    """Follows one answer through its grammar. error: why it cannot any longer; from then on everything is allowed."""

    def __init__(self, parser: llguidance.LLMatcher, ends: Collection[int]):
        self._parser, self._ends = parser, ends
        self._followed: list[int] = []

    @property
    def error(self) -> str:
        return self._parser.get_error().partition("\n")[0]

    def allowed(self, answer: Sequence[int], num_tokens: int) -> Tensor:
        """(V,) which tokens may come after these. A token that was dropped and drawn anew is no matter, nor is an end:
        a step may be in flight when one is drawn."""
        self._follow([*answer[:-1], *(token for token in answer[-1:] if token not in self._ends)])
        if self._parser.is_error():
            return torch.ones(num_tokens, dtype=torch.bool)
        bytes_ = torch.frombuffer(bytearray(self._parser.compute_bitmask()), dtype=torch.uint8)
        bits_V = (bytes_.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        return bits_V[:num_tokens]

    def _follow(self, answer: list[int]) -> None:
        known = self._followed
        same = len(known)
        if answer[:same] != known:
            same = next(i for i, token in enumerate(known) if i >= len(answer) or answer[i] != token)
            self._parser.rollback(len(known) - same)
        self._parser.consume_tokens(answer[same:])
        self._followed = answer


class Grammars:
    """Compiles schemas for one tokenizer. ends: the tokens by which an answer ends; num_tokens: of the model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], num_tokens: int):
        self.tokenizer, self.ends, self.num_tokens = tokenizer, sorted(ends), num_tokens
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def matcher(self, schema: str) -> Matcher:
        """Raises BadRequest where llguidance cannot follow it, or this tokenizer."""
        if len(schema) > LONGEST_SCHEMA:
            raise BadRequest(f"json_schema has {len(schema)} characters, at most {LONGEST_SCHEMA} are followed")
        vocabulary = self._opened()
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise BadRequest(f"json_schema is no JSON object: {error}") from error
        reason = llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
        if reason:
            raise BadRequest(f"json_schema cannot be followed: {reason}")
        matcher = Matcher(llguidance.LLMatcher(vocabulary, grammar), self.ends)
        matcher.allowed((), self.num_tokens)
        if matcher.error:  # such as of what is defined by itself alone
            raise BadRequest(f"json_schema cannot be followed: {matcher.error}")
        return matcher

    def _opened(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._open()
            return self._vocabulary

    def _open(self) -> llguidance.LLTokenizer:
        if not self.ends or not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            lacks = "a fast tokenizer" if self.ends else "an end-of-sequence token"
            raise BadRequest(f"json_schema needs {lacks}, which this model does not have")
        try:
            return llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=self.num_tokens, eos_token=self.ends)
        except ValueError as error:
            raise BadRequest(f"json_schema cannot be followed with this tokenizer: {error}") from error
