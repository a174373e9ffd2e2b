"""DeepSeek's latent attention over pages, whose keys and values have widths of their own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedModel

from molex_serve.engine.mla import page_width
from tests.models import tiny
from tests.serve.engine.serving import CHUNKED, CRAMPED, Adapted, mixed, running, serve

WIDTHS = {
    "keys wider": {"qk_nope_head_dim": 12, "v_head_dim": 10},
    "values wider": {"qk_nope_head_dim": 4, "v_head_dim": 24},
}


def deepseek(kind: type[DeepseekV2Config] | type[DeepseekV3Config], **widths: int) -> PreTrainedModel:
    config = kind(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        eos_token_id=None,
        **widths,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", [DeepseekV2Config, DeepseekV3Config])
def test_equals_each_adapter_alone(kind: type[DeepseekV2Config], widths: dict[str, int]) -> None:
    adapted, requests = Adapted(model=deepseek(kind, **widths)), mixed(5)
    with running(adapted.engine(CHUNKED)) as engine:
        found = serve(engine, requests) + serve(engine, requests)
        assert engine.stats().prefix_hits > 0
    assert found == 2 * [adapted.generate(request) for request in requests]


def test_eager_attention_and_preemption() -> None:
    model = deepseek(DeepseekV2Config, qk_nope_head_dim=12, v_head_dim=10)
    model.set_attn_implementation("eager")
    adapted, requests = Adapted(model=model), mixed(6)
    with running(adapted.engine(CRAMPED)) as engine:
        found = serve(engine, requests)
    assert found == [adapted.generate(request) for request in requests]


def test_configuration_is_as_it_was() -> None:
    """Rotary embeddings read it."""
    model = deepseek(DeepseekV2Config, qk_nope_head_dim=12, v_head_dim=10)
    engine = Adapted(model=model).engine(CHUNKED)
    assert model.config.head_dim == 8
    assert page_width(model.config) == 20
    cache = engine.manager.batch_processor.cache
    assert cache.cache_allocators["full_attention"].head_dim == 20
    assert page_width(tiny("llama").config) is None
