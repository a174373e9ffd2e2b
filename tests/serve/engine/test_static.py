"""The engine for models that have no pages."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, PreTrainedModel

from molex_serve.engine.static import StaticEngine
from tests.models import tiny
from tests.serve.engine.serving import ROOMY, Adapted, greedy, mixed, running, serve, tokenizer


def hybrid() -> PreTrainedModel:
    """State-space layers and one of attention."""
    config = BambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=2,
        mamba_chunk_size=8,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "mamba2", "hybrid"])
def test_equals_each_adapter_alone(name: str) -> None:
    adapted = Adapted(model=hybrid() if name == "hybrid" else tiny(name))
    requests = mixed(5, new=6)
    settings = replace(ROOMY, cache_tokens=64, step_requests=3)
    with running(StaticEngine(adapted, tokenizer(), settings)) as engine:
        found = serve(engine, requests)
    assert found == [adapted.generate(request) for request in requests]


def test_tasks_reach_their_tokens() -> None:
    adapted = Adapted("mamba")
    requests = [greedy(str(task), 6, 1, new=5, task=task) for task in (None, 0, 1)]
    with running(StaticEngine(adapted, tokenizer(), ROOMY)) as engine:
        assert serve(engine, requests) == [adapted.generate(request) for request in requests]
