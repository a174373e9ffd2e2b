"""DeepSeek's latent attention over pages, whose keys and values have widths of their own."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedModel

import molex
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.engine.mla import page_width
from molex_serve.engine.static import StaticEngine
from molex_serve.model.served import ServedModel
from tests.models import tiny, wake_experts
from tests.serve.adapters_of import fill
from tests.serve.engine.serving import (
    CHUNKED,
    CRAMPED,
    ROOMY,
    Adapted,
    greedy,
    mixed,
    running,
    serve,
    submit,
    tokenizer,
)

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


@pytest.mark.parametrize("kind", [ContinuousEngine, StaticEngine])
def test_adapters_of_what_is_expanded_at_every_step(
    kind: type[ContinuousEngine] | type[StaticEngine], tmp_path: Path
) -> None:
    """Off pages, transformers gives all cached tokens to kv_b_proj again, at each new one."""

    def base() -> PreTrainedModel:
        return deepseek(DeepseekV2Config, **WIDTHS["keys wider"])

    lora = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"]))
    fill(lora, "lora_B", "law")
    lora.save_pretrained(str(tmp_path / "law"))
    mixture = molex.convert(base(), molex.preset("mola", num_experts=2, top_k=1, rank=2, targets=["kv_b_proj"]))
    wake_experts(mixture.model)
    mixture.save(tmp_path / "routed")
    served = ServedModel(base())
    law, routed = [served.attach(served.read(str(tmp_path / name))) for name in ("law", "routed")]
    requests = [greedy("a", 5, law), greedy("b", 9), greedy("c", 7, law)]
    with running(kind(served, tokenizer(), ROOMY)) as engine:
        failing = submit(engine, [greedy("d", 6, routed)])[0]
        found = serve(engine, requests)
        failing.wait()
    if kind is StaticEngine:
        assert (failing.reason, len(failing.tokens)) == ("error", 1)
        assert "kv_b_proj is computed over cached tokens again" in str(failing.events[-1].error)
    merged = peft.PeftModel.from_pretrained(base(), str(tmp_path / "law")).merge_and_unload()
    alone = {law: merged, 0: base()}
    for request, tokens in zip(requests, found, strict=True):
        ids = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            whole = alone[request.handle].eval().generate(ids, max_new_tokens=10, do_sample=False)  # type: ignore[operator]
        assert tokens == whole[0, ids.shape[1] :].tolist(), request.id
    assert found[0] != found[2] != found[1]
