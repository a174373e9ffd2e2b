"""A generated text and what the routers did at each of its tokens.

Generation reads the prompt in one forward and then each new token in one of its own, so the recorded steps, put one
after the other, are the routing of the whole text. The last token is written and never read: it has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex.errors import ConfigError, TargetError
from molex.evaluation.gates import routed_layers
from molex.mixture import Mixture
from molex.modes import evaluating
from molex.stats import expert_gates

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet


@dataclass(frozen=True)
class RoutedText:
    """ids and tokens: all of the text, the prompt first; `tokens` joined are the decoded text. num_prompt: how many are
    the prompt's. weights (L, N, E), float32: each expert's weight at each token read, N = len(ids) - 1; zero where a
    layer has fewer experts."""

    ids: list[int]
    tokens: list[str]
    num_prompt: int
    layers: tuple[str, ...]
    experts: tuple[str, ...]
    weights: Tensor


def generate_routed(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 64
) -> RoutedText:
    """Greedy continuation of a prompt, recorded; special tokens show in the text.

    Raises ConfigError on an empty prompt, and where nothing is routed; StateError where the experts are off;
    TargetError on a model that does not continue texts.
    """
    model = mixture.model
    _check_continues(model)
    layers = {name: layer for name, layer in routed_layers(mixture).items() if layer.stack == "model"}
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(next(model.parameters()).device)
    num_prompt = inputs["input_ids"].shape[1]
    if num_prompt == 0 or max_new_tokens < 1:
        raise ConfigError(f"prompt={prompt!r}, max_new_tokens={max_new_tokens}: give at least one token of each")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with evaluating(model), mixture.record() as steps:
        output_1S = cast(Any, model).generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad
        )
    ids = output_1S[0].tolist()
    width = len(mixture.experts)
    rows = {}
    for name, layer in layers.items():
        if name in steps[0]:
            gates_TE = torch.cat([expert_gates(step[name], layer.experts.num_experts).float().cpu() for step in steps])
            rows[name] = torch.nn.functional.pad(gates_TE, (0, width - gates_TE.shape[1]))
    weights_LTE = torch.stack(list(rows.values()))
    assert weights_LTE.shape[1] == len(ids) - 1, "generation read each token once, but for the last"
    tokens = token_texts(tokenizer, ids)
    return RoutedText(ids, tokens, num_prompt, tuple(rows), tuple(mixture.experts), weights_LTE)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text. Of a character that several tokens make, the last one has it, the others "".

    A token is decoded behind the one before it: alone, a SentencePiece token would lose the space that begins it.
    """
    texts: list[str] = []
    start, middle, before = 0, 0, ""  # the last whole piece is ids[start:middle], which alone decodes to `before`
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[start:end])
        if text.endswith(_UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, middle, before = middle, end, _decode(tokenizer, ids[middle:end])
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_continues(model: torch.nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TargetError(f"{type(model).__name__} does not generate; routing is shown for models that continue texts")
    if model.config.is_encoder_decoder:
        raise TargetError("an encoder-decoder's prompt and answer are two texts; routing is shown for decoders")
