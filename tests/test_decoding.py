"""One decoding step: torch.compile takes it whole and gives eager's tokens; nothing in it waits for the device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel, StaticCache

from benchmarks.launches import Calls
from tests.models import mixture_of
from tests.test_generation import BY_TASK
from tests.test_generation import METHODS as ALL
from tests.test_generation import converted as preset_of

METHODS = ("mola", "mixlora", "flylora", "smora", "hydralora")
SMALL: dict[str, dict[str, Any]] = {"flylora": {"num_experts": 12, "rank": 1}, "smora": {"num_experts": 12, "rank": 1}}
WAITING = {
    **dict.fromkeys(BY_TASK, "task ids are checked in every layer"),
    "xlora": "it compares how many tokens its two caches hold",
}
PROMPT, NEW_TOKENS = [[3, 14, 15, 9], [26, 5, 35, 27]], 5


def converted(method: str, backend: str) -> PreTrainedModel:
    model = mixture_of("llama", method, **SMALL.get(method, {}), backend=backend).model
    assert isinstance(model, PreTrainedModel)
    return model


def static_cache(model: PreTrainedModel) -> StaticCache:
    return StaticCache(model.config, max_cache_len=len(PROMPT[0]) + NEW_TOKENS)


@torch.no_grad()
def continued(model: PreTrainedModel, step: nn.Module) -> Tensor:
    """Greedy tokens: the prompt by the model, every further token by `step`."""
    cache = static_cache(model)
    tokens = [model(torch.tensor(PROMPT), past_key_values=cache).logits[:, -1:].argmax(-1)]
    for _ in range(NEW_TOKENS - 1):
        tokens.append(step(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("backend", ["dense", "preload"])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_gives_the_tokens_of_eager(method: str, backend: str) -> None:
    model = converted(method, backend)
    expected = continued(model, model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    got = continued(model, torch.compile(model, fullgraph=True, backend=counter))
    assert got.tolist() == expected.tolist()
    assert counter.frame_count == 1, "a step was compiled anew"
    assert len({tuple(row) for row in expected.T.tolist()}) > 1, "every token is the same"


def step_calls(model: PreTrainedModel) -> Calls:
    """What a decoding step with a cache of fixed length dispatches, after another one."""
    cache = static_cache(model)
    token = torch.tensor([[1], [2]])
    with torch.no_grad():
        for ids in (torch.tensor(PROMPT), token):
            model(ids, past_key_values=cache)
        with Calls() as calls:
            model(token, past_key_values=cache)
    return calls


@pytest.mark.parametrize("method", ALL)
def test_a_step_asks_the_device_for_nothing(method: str) -> None:
    """Each question would stall a GPU, and no CUDA graph could be captured over it."""
    model, mixture = preset_of(method)
    waits = step_calls(model).waits
    with mixture.disabled():
        waits -= step_calls(model).waits
    assert bool(waits) == (method in WAITING), waits
