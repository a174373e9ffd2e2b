"""What may enter an engine. Whatever gets past this runs to its end: nothing in a request can stop the others."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex_serve.engine.base import Request
from molex_serve.errors import BadRequest


@dataclass(frozen=True)
class Bounds:
    """longest: tokens of a prompt and its answer together. num_tokens: the model's vocabulary."""

    longest: int
    num_tokens: int

    def check(self, request: Request) -> None:
        """Raises BadRequest."""
        sampling = request.sampling
        self.check_prompt(request.prompt_ids, sampling.max_tokens)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", sampling.logit_bias)
        if not all(math.isfinite(bias) for bias in sampling.logit_bias.values()):
            raise BadRequest("logit_bias has a value that is no finite number; give -100 to keep a token out")

    def check_prompt(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """Raises BadRequest."""
        if not prompt_ids:
            raise BadRequest("the prompt has no token")
        self._check_ids("the prompt", prompt_ids)
        if len(prompt_ids) + max_tokens > self.longest:
            raise BadRequest(
                f"the prompt has {len(prompt_ids)} tokens and max_tokens={max_tokens}, at most {self.longest} together "
                "are possible: shorten the prompt or lower max_tokens"
            )

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        wrong = [token_id for token_id in ids if not 0 <= token_id < self.num_tokens]
        if wrong:
            raise BadRequest(f"{name} has token {wrong[0]}; this model's are 0 to {self.num_tokens - 1}")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Of what a prompt may hold and of what comes out."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return min(embeddings.shape[0], int(model.config.get_text_config().vocab_size))


def longest_sequence(model: PreTrainedModel, cache_tokens: int) -> int:
    """What fits both the cache and the positions that the model knows."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(cache_tokens, positions or cache_tokens)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """By which a model says that it is done."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None and tokenizer is not None:
        configured = tokenizer.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int) and token_id >= 0)
