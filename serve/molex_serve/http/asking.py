"""From the fields of a body to what the engine is asked: whose adapter, which tokens, how they are drawn."""

import json

from molex_serve.engine.base import Sampling
from molex_serve.http.problems import Refused
from molex_serve.http.schemas import MOST_CHOICES, Asked, ResponseFormat
from molex_serve.http.vocabulary import Vocabulary

_ANY_OBJECT = {"type": "object"}


def alias_of(asked: Asked, base: str) -> str | None:
    """The adapter that a body names, None = the base by its own name, which alone means it. Whether there is such an
    adapter is seen when it is taken. Raises Refused where nothing is named, or two."""
    if asked.model is None and asked.adapter is None:
        raise Refused(f"name a model: {base!r}, an adapter's alias, or {base + ':ALIAS'!r}", "model")
    named = None if asked.model in (None, base) else str(asked.model).removeprefix(f"{base}:")
    if asked.adapter is not None and named not in (None, asked.adapter):
        raise Refused(f"model names {named!r} and adapter {asked.adapter!r}; name one", "adapter")
    return named if asked.adapter is None else asked.adapter


def sampling_of(asked: Asked, max_tokens: int, logprobs: int | None, vocabulary: Vocabulary) -> Sampling:
    """Raises BadRequest on values out of range; a token that the model lacks would fail in the middle of a step."""
    for token_id in asked.stop_token_ids:
        _check_token(token_id, vocabulary, "stop_token_ids")
    return Sampling(
        max_tokens=max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        logprobs=logprobs,
        stop_token_ids=tuple(asked.stop_token_ids),
        ignore_eos=asked.ignore_eos,
        logit_bias=_biases(asked, vocabulary),
        json_schema=None if asked.response_format is None else _schema(asked.response_format),
    )


def check_choices(num_prompts: int, n: int) -> None:
    if num_prompts * n > MOST_CHOICES:
        raise Refused(f"{num_prompts} prompts with n={n} are {num_prompts * n}; ask for at most {MOST_CHOICES}", "n")


def _biases(asked: Asked, vocabulary: Vocabulary) -> dict[int, float]:
    biases = {}
    for key, bias in asked.logit_bias.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise Refused(f"{key!r} is no token's number", "logit_bias")
        if not -100 <= bias <= 100:
            raise Refused(f"a bias is {bias}; give a number from -100 to 100", "logit_bias")
        _check_token(int(key), vocabulary, "logit_bias")
        biases[int(key)] = bias
    return biases


def _check_token(token_id: int, vocabulary: Vocabulary, param: str) -> None:
    if not 0 <= token_id < vocabulary.size:
        raise Refused(f"token {token_id} is none of this model's 0 to {vocabulary.size - 1}", param)


def _schema(wanted: ResponseFormat) -> str | None:
    if wanted.type == "text":
        return None
    return json.dumps(_ANY_OBJECT if wanted.json_schema is None else wanted.json_schema.schema_of)
