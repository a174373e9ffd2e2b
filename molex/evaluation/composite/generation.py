"""Greedy answers to many prompts, and which experts were at work at every token of them.

Token t of an answer comes out of forward t of `generate` (0 is the whole prompt, then one token each), at its last
position: that position's gates are what made the token. Prompts are padded on the left, so it is last in every row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molex.errors import ConfigError, StateError
from molex.evaluation.composite.parsing import cut_at
from molex.mixture import Mixture
from molex.modes import evaluating
from molex.routing import Decision, Trace
from molex.stats import expert_gates


@dataclass(frozen=True)
class Generation:
    """text: without special tokens. ids: its tokens, up to the end of sequence. gates: (tokens, E), the weight of each
    expert at each token, averaged over routed layers; None where nothing was recorded."""

    text: str
    ids: tuple[int, ...]
    gates: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Asks models, always in the same way. ends: strings at which an answer is cut."""

    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    ends: tuple[str, ...] = ()

    def ask(
        self, model: nn.Module, prompts: Sequence[str], max_new_tokens: int, mixture: Mixture | None = None
    ) -> list[Generation]:
        """Greedy continuations. mixture: whose routing to keep beside them.

        Raises ConfigError where the model is no causal language model, its context too short or the tokenizer unable.
        """
        self._check(model, prompts, max_new_tokens)
        done: list[Generation] = []
        with evaluating(model):
            for start in range(0, len(prompts), self.batch_size):
                done += self._batch(model, prompts[start : start + self.batch_size], max_new_tokens, mixture)
        return done

    def num_tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])  # type: ignore[arg-type]

    def _batch(
        self, model: nn.Module, prompts: Sequence[str], max_new_tokens: int, mixture: Mixture | None
    ) -> list[Generation]:
        device = next(model.parameters()).device
        batch = self.tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(device)
        arguments = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self._ends_of_sequence(model),
        }
        if mixture is None:
            ids_BS, gates_BSE = cast(Any, model).generate(**batch, **arguments), None
        else:
            with mixture.record() as steps:
                ids_BS = cast(Any, model).generate(**batch, **arguments)
            gates_BSE = gates_of_steps(mixture, steps, len(prompts))
        new_BS = ids_BS[:, batch["input_ids"].shape[1] :]
        if gates_BSE is not None and gates_BSE.shape[1] != new_BS.shape[1]:
            raise StateError(
                f"{new_BS.shape[1]} tokens came out of {gates_BSE.shape[1]} forwards, so that it is not known which "
                "made which; take prefill_chunk_size and assistants out of the model's generation_config"
            )
        rows = range(len(prompts))
        return [self._row(model, new_BS[r], None if gates_BSE is None else gates_BSE[r]) for r in rows]

    def _row(self, model: nn.Module, ids_S: Tensor, gates_SE: Tensor | None) -> Generation:
        """One row up to its end; what a row that ended early generates beyond it is padding."""
        ids, ends = ids_S.tolist(), set(self._ends_of_sequence(model))
        length = next((position for position, token in enumerate(ids) if token in ends), len(ids))
        text = cut_at(decode(self.tokenizer, ids[:length]), self.ends)
        return Generation(text, tuple(ids[:length]), None if gates_SE is None else gates_SE[:length])

    def _ends_of_sequence(self, model: nn.Module) -> list[int]:
        given: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        given = self.tokenizer.eos_token_id if given is None else given
        return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]

    def _check(self, model: nn.Module, prompts: Sequence[str], max_new_tokens: int) -> None:
        config = getattr(model, "config", None)
        if not hasattr(model, "generate") or getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"a {type(model).__name__} is no causal language model that generates")
        if self.tokenizer.pad_token_id is None:
            raise ConfigError("this tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token")
        room = getattr(config, "max_position_embeddings", None)
        longest = max(map(self.num_tokens, prompts))
        if room is not None and longest + max_new_tokens > room:
            raise ConfigError(
                f"a prompt of {longest} tokens and {max_new_tokens} for answers do not fit the model's context of "
                f"{room}; ask fewer questions at once, show fewer examples or lower max_new_tokens"
            )


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, exactly: no clean-up, which would make a prefix's text no prefix of the text."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@torch.no_grad()
def gates_of_steps(mixture: Mixture, steps: Sequence[Trace], num_rows: int) -> Tensor | None:
    """(rows, steps, E): the weights of each forward's last position, averaged over the layers that route text; a
    block that routes once counts once, and an expert that a layer lacks has no weight there. None without any."""
    gates_BSE = [_last_gates(mixture, trace, num_rows) for trace in steps]
    known = [gates_BE for gates_BE in gates_BSE if gates_BE is not None]
    return torch.stack(known, dim=1) if known else None


def _last_gates(mixture: Mixture, trace: Trace, num_rows: int) -> Tensor | None:
    total_BE, count = torch.zeros(num_rows, len(mixture.experts)), 0
    for name, (routing, context) in trace.items():
        layer = mixture.layers[name]
        num_experts = layer.experts.num_experts
        if layer.plain or layer.stack != "model" or num_experts == 1:
            continue
        last_B = torch.arange(1, num_rows + 1, device=routing.weights.device) * context.shape[1] - 1
        last = routing._replace(expert_ids=routing.expert_ids[last_B], weights=routing.weights[last_B])
        total_BE[:, :num_experts] += expert_gates(Decision(last, context), num_experts).float().cpu()
        count += 1
    return total_BE / count if count else None
