"""Prompts as tokens: of texts, of token ids, and of chats through the tokenizer's template."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from molex_serve.errors import BadRequest
from molex_serve.http.problems import Refused
from molex_serve.http.schemas import MOST_CHOICES, Message
from molex_serve.http.vocabulary import Vocabulary


class TooLong(BadRequest):
    """A prompt and its answer do not fit the model or the cache."""

    code = "context_length_exceeded"


@dataclass(frozen=True)
class Prompt:
    """text: as it was given, or what the ids are."""

    ids: tuple[int, ...]
    text: str


def of_texts(vocabulary: Vocabulary, given: str | list[int] | list[str] | list[list[int]]) -> list[Prompt]:
    """One or several prompts. Raises BadRequest on empty ones and on ids that the tokenizer lacks."""
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    prompts = [_of_text(vocabulary, one) for one in ([given] if single else given)]  # type: ignore[arg-type]
    if len(prompts) > MOST_CHOICES:
        raise Refused(f"{len(prompts)} prompts; send at most {MOST_CHOICES} at once", "prompt")
    if not prompts or not all(prompt.ids for prompt in prompts):
        raise Refused("an empty prompt has no token to go on from; give some text", "prompt")
    return prompts


def _of_text(vocabulary: Vocabulary, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        return Prompt(tuple(vocabulary.tokenizer.encode(given)), given)
    for token_id in given:
        if not 0 <= token_id < vocabulary.size:
            raise Refused(f"token {token_id} is none of this model's 0 to {vocabulary.size - 1}", "prompt")
    text = b"".join(vocabulary.text(token_id) for token_id in given).decode(errors="replace")
    return Prompt(tuple(given), text)


def of_messages(vocabulary: Vocabulary, messages: Sequence[Message]) -> Prompt:
    """A chat, ending where the answer begins. Raises BadRequest where the model's template refuses it."""
    text = _render(vocabulary.tokenizer, [{"role": message.role, "content": message.content} for message in messages])
    ids = tuple(vocabulary.tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise Refused("the messages are empty", "messages")
    return Prompt(ids, text)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    if not tokenizer.chat_template:
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return f"{tokenizer.bos_token or ''}{turns}assistant:"
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # templates refuse roles and their order with it
        raise Refused(f"this model's chat template refuses these messages: {error}", "messages") from error
    return str(text)


def check_length(prompt: Prompt, max_tokens: int | None, default: int, longest: int) -> int:
    """How many tokens the answer may have: what was asked for, or the default as far as there is room."""
    room = longest - len(prompt.ids)
    if room < (1 if max_tokens is None else max_tokens):
        asked = "an answer" if max_tokens is None else f"max_tokens={max_tokens}"
        raise TooLong(
            f"the prompt has {len(prompt.ids)} tokens, which leaves no room for {asked}: both together are at most "
            f"{longest}; shorten the prompt or ask for fewer"
        )
    return min(default, room) if max_tokens is None else max_tokens
