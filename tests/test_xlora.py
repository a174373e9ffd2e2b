"""X-LoRA's two passes: one cache inside the other, PEFT's own implementation beside ours, gradients, clear refusals."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

import molex
from molex import Mixture
from molex.errors import StateError
from tests.models import CAUSAL, STATE_SPACE, VOCABULARY, tiny

HEAD = {"depth": 2, "hidden_size": 16, "layerwise": True, "temperature": 0.2}


def converted(model: PreTrainedModel, **overrides: Any) -> tuple[PreTrainedModel, Mixture]:
    """An X-LoRA mixture of three random experts, whose scalings differ much from token to token and layer to layer."""
    targets = "ssm" if model.config.model_type in STATE_SPACE else "all"
    settings = {"num_experts": 3, "rank": 2, "targets": targets, **HEAD, **overrides}
    mixture = molex.convert(model, molex.preset("xlora", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("molex.router"):
                parameter.normal_(std=0.3)
    return model, mixture


@pytest.fixture
def llama() -> tuple[PreTrainedModel, Mixture]:
    return converted(tiny("llama"))


def ids_for(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def full(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids_BS, use_cache=False).logits


def cache_of(output: Any) -> Cache:
    return output.get("past_key_values") or output.cache_params


def step(model: PreTrainedModel, ids_BS: Tensor, cache: Cache | None) -> Any:
    slot = "cache_params" if model.config.model_type in STATE_SPACE else "past_key_values"
    with torch.no_grad():
        return model(ids_BS, use_cache=True, **{slot: cache})


def logits_in_steps(model: PreTrainedModel, ids_BS: Tensor, cache: Cache | None, *lengths: int) -> Tensor:
    """Logits of a sequence that is fed in pieces of the given lengths, through one cache."""
    logits = []
    for piece in ids_BS.split(lengths, dim=1):
        output = step(model, piece, cache)
        cache = cache_of(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_cached_steps_equal_the_full_forward(architecture: str) -> None:
    """20 tokens: past the sliding window of 16 where there is one."""
    model, _ = converted(tiny(architecture).double())
    ids = ids_for()
    pieces = (17, 1, 1, 1) if architecture in STATE_SPACE else (9, 8, 1, 1, 1)
    torch.testing.assert_close(logits_in_steps(model, ids, None, *pieces), full(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lazy", "dynamic", "static"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_every_kind_of_cache_the_caller_may_bring(architecture: str, kind: str) -> None:
    model, _ = converted(tiny(architecture))
    caches: dict[str, Callable[[], Cache]] = {
        "lazy": DynamicCache,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(model.config, max_cache_len=24),
    }
    ids = ids_for()
    cache = caches[kind]()
    torch.testing.assert_close(logits_in_steps(model, ids, cache, 17, 1, 1, 1), full(model, ids), rtol=0, atol=1e-5)
    assert int(cache.get_seq_length()) == 20


def test_a_decoding_step_costs_two_tokens_of_work(llama: tuple[PreTrainedModel, Mixture]) -> None:
    """Counted in every base linear: one token for the first pass, one for the second, after 4 tokens as after 40."""
    model, mixture = llama
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[name] = counts.get(name, 0) + args[0].shape[:-1].numel()

        return hook

    for name, layer in mixture.layers.items():
        layer.base.register_forward_pre_hook(count(name))
    for length in (4, 40):
        cache = cache_of(step(model, ids_for(1, length), None))
        counts.clear()
        step(model, ids_for(1, 1), cache)
        assert counts == dict.fromkeys(mixture.layers, 2)
    counts.clear()
    model.generate(ids_for(1, 30), max_new_tokens=5, do_sample=False)
    assert counts == dict.fromkeys(mixture.layers, 2 * (30 + 4))


def test_the_cache_holds_its_own_layers_alone_during_a_forward(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, _ = llama
    cache, seen = DynamicCache(), []
    model.model.norm.register_forward_pre_hook(lambda *_: seen.append(len(cache.layers)))
    logits_in_steps(model, ids_for(), cache, 18, 1, 1)
    assert set(seen) <= {0, 2}
    assert seen[-1] == 2
    assert len(cache.layers) == 4


def test_whatever_moves_the_cache_moves_both_passes(llama: tuple[PreTrainedModel, Mixture]) -> None:
    """Beams reorder, assisted decoding crops, batches are repeated and selected, prefixes are copied and reset."""
    model, _ = llama
    ids = ids_for(3, 12)
    order = torch.tensor([2, 0, 0])
    cache = cache_of(step(model, ids[:, :10], None))
    prefix = deepcopy(cache)
    cache.reorder_cache(order)
    torch.testing.assert_close(step(model, ids[order, 10:], cache).logits, full(model, ids[order])[:, 10:])
    cache.crop(-4)
    torch.testing.assert_close(step(model, ids[order, 8:], cache).logits, full(model, ids[order])[:, 8:])
    kept = torch.tensor([0, 2])
    prefix.batch_select_indices(kept)
    prefix.batch_repeat_interleave(2)
    twice = ids[kept].repeat_interleave(2, dim=0)
    torch.testing.assert_close(step(model, twice[:, 10:], prefix).logits, full(model, twice)[:, 10:])
    prefix.reset()
    torch.testing.assert_close(step(model, ids, prefix).logits, full(model, ids))


def test_backbone_and_model_route_alike(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, mixture = llama
    ids = ids_for()
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        alone = {name: decision.routing.weights for name, decision in mixture.state.trace.items()}
        logits = model(ids).logits
    torch.testing.assert_close(model.lm_head(hidden), logits)
    assert [*alone] == [*mixture.layers]
    for name, decision in mixture.state.trace.items():
        torch.testing.assert_close(decision.routing.weights, alone[name])
    assert (alone["model.layers.0.mlp.up_proj"] - alone["model.layers.1.mlp.up_proj"]).abs().max() > 0.1


def test_every_way_to_call_the_model(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, mixture = llama
    ids = ids_for()
    expected = full(model, ids)
    with torch.no_grad(), mixture.record() as steps:
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        labelled = model(ids, labels=ids)
        last = model(ids, logits_to_keep=3)
        in_tuple = model(ids, return_dict=False)
        hidden = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(steps) == 5, "one entry per forward: the first pass records nothing"
    torch.testing.assert_close(embedded, expected)
    torch.testing.assert_close(labelled.logits, expected)
    torch.testing.assert_close(last.logits, expected[:, -3:])
    torch.testing.assert_close(in_tuple[0], expected)
    torch.testing.assert_close(hidden.logits, expected)
    assert len(hidden.hidden_states) == 3
    cache = next(value for value in in_tuple if isinstance(value, Cache))
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    torch.testing.assert_close(step(model, ids[:, :1], cache).logits, full(model, longer)[:, -1:], rtol=0, atol=1e-5)


def test_training_gives_the_head_its_gradients() -> None:
    """Against central differences in float64 (Llama's norms are float32 within), the model and its experts frozen."""
    model, mixture = converted(tiny("gpt2").double(), temperature=1.0)
    model.molex.double()
    ids, head = ids_for(2, 8), dict(model.molex["router"].named_parameters())
    assert {id(p) for p in mixture.trainable_parameters()} == {id(p) for p in head.values()}
    model(ids).logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    for parameter in head.values():
        assert parameter.grad is not None
        direction = torch.randn_like(parameter)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                ends.append(model(ids).logits.logsumexp(-1).sum())
                parameter.sub_(sign * 1e-5 * direction)
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-9)


def test_checkpointing_changes_no_gradient(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, _ = llama
    model.molex["router"].head[2].p = 0.0
    ids, gradients = ids_for(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.molex["router"].parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_modules_trained_whole_keep_their_gradient_under_autocast() -> None:
    """Autocast remembers cast weights; were those of the first pass used again, they would have no gradient."""
    model, _ = converted(tiny("llama"), targets=("q_proj", "v_proj"), also_train=("o_proj",))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids_for(), labels=ids_for()).loss
    loss.backward()
    gradient = model.get_submodule("model.layers.0.self_attn.o_proj").weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_head_dropout_acts_in_training_only() -> None:
    model, _ = converted(tiny("llama").eval(), head_dropout=0.5)
    ids = ids_for()
    assert torch.equal(full(model, ids), full(model, ids))
    model.train()
    assert not torch.equal(full(model, ids), full(model, ids))


def test_plain_targets_stay_out_of_the_head() -> None:
    model, mixture = converted(tiny("llama"), targets=("attention",), plain_targets=("ffn",))
    assert model.molex["router"].num_layers == 8
    assert len(mixture.layers) == 14
    ids = ids_for()
    torch.testing.assert_close(logits_in_steps(model, ids, None, 18, 1, 1), full(model, ids), rtol=0, atol=1e-5)


def test_disabled_reverted_and_copied(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, mixture = llama
    ids, base = ids_for(), tiny("llama")
    mixed = full(model, ids)
    with mixture.disabled():
        assert torch.equal(full(model, ids), full(base, ids))
    twin = deepcopy(model)
    with torch.no_grad():
        for parameter in model.molex.parameters():
            parameter.zero_()
    assert torch.equal(full(twin, ids), mixed)
    assert not torch.equal(full(model, ids), mixed)
    mixture.revert()
    assert torch.equal(logits_in_steps(model, ids, None, 19, 1), logits_in_steps(base, ids, None, 19, 1))


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_prefix_the_first_pass_has_not_seen_is_refused(architecture: str) -> None:
    model, mixture = converted(tiny(architecture))
    ids = ids_for()
    with mixture.disabled():
        cache = cache_of(step(model, ids, None))
    with pytest.raises(StateError, match="start from an empty cache"):
        step(model, ids[:, :1], cache)


def test_tokens_added_behind_the_first_pass_are_refused(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, mixture = llama
    cache = cache_of(step(model, ids_for(), None))
    with mixture.disabled():
        step(model, ids_for(2, 1), cache)
    for _ in range(2):
        with pytest.raises(StateError, match="this cache holds 21 tokens"):
            step(model, ids_for(2, 1), cache)
    assert len(cache.layers) == 4


def test_caches_without_room_are_refused(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, _ = llama
    with pytest.raises(StateError, match="EncoderDecoderCache"):
        step(model, ids_for(), EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(StateError, match="generate_batch"):
        model(ids_for(), cache=object())


def test_a_forward_that_fails_leaves_mixture_and_cache_usable(llama: tuple[PreTrainedModel, Mixture]) -> None:
    model, _ = llama
    ids = ids_for()
    cache = cache_of(step(model, ids[:, :18], None))
    with pytest.raises(IndexError):
        step(model, ids + VOCABULARY, cache)
    assert len(cache.layers) == 4
    torch.testing.assert_close(step(model, ids[:, 18:], cache).logits, full(model, ids)[:, 18:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [16, 48])
def test_opt_whose_hidden_states_leave_at_another_width(width: int) -> None:
    """OPT-350m: layers of 1024, embeddings of 512, post-norm. The head reads what the stack gives."""
    opt = tiny("opt", word_embed_proj_dim=width, do_layer_norm_before=False).double()
    ids = ids_for()
    with torch.no_grad():
        hidden_TD = opt.model(ids).last_hidden_state.flatten(0, 1)
    model, mixture = converted(opt)
    torch.testing.assert_close(logits_in_steps(model, ids, None, 9, 8, 1, 1, 1), full(model, ids), rtol=0, atol=1e-5)
    full(model, ids)
    head = model.molex["router"]
    assert hidden_TD.shape[-1] == head.head[0].in_features == width
    for name, routing in zip(mixture.layers, head.decide(hidden_TD), strict=True):
        torch.testing.assert_close(mixture.state.trace[name].routing.weights, routing.weights)


PEFT_HEADS: dict[str, dict[str, Any]] = {
    "one_linear": {"depth": 1},
    "deep": {"depth": 3, "hidden_size": 12},
    "layerwise": {"depth": 2, "hidden_size": 12, "layerwise": True, "temperature": 0.5},
    "raw": {"softmax": False, "temperature": 3.0},
    "top_k": {"layerwise": True, "top_k": 2, "global_weight": 1.5},
    "top_k_softmax": {"layerwise": True, "top_k": 2, "softmax_top_k": True},
}


@pytest.mark.parametrize("head", PEFT_HEADS.values(), ids=PEFT_HEADS)
def test_the_model_equals_peft_with_the_same_weights(head: dict[str, Any], tmp_path: Path) -> None:
    paths = [save_adapter(tmp_path / str(seed), seed) for seed in range(3)]
    theirs = peft.get_peft_model(tiny("llama", use_cache=False), peft_config(paths, head)).eval()
    model = tiny("llama")
    mixture = molex.convert(model, molex.preset("xlora", num_experts=3, rank=4, alpha=8, targets="all", **head))
    for expert_id, path in enumerate(paths):
        mixture.load_expert(expert_id, path.name, factors_of(path))
    linears = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    ours = [m for m in model.molex["router"].head if isinstance(m, nn.Linear)]
    for own, other in zip(ours, linears, strict=True):
        nn.init.normal_(other.weight, std=0.5)
        own.load_state_dict(other.state_dict())
    ids = ids_for(3, 9)
    with torch.no_grad():
        expected, base = theirs(input_ids=ids).logits, tiny("llama")(ids).logits
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(full(model, ids), expected, rtol=0, atol=2e-6)


def peft_config(paths: list[Path], head: dict[str, Any]) -> peft.XLoraConfig:
    return peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters={str(i): str(path) for i, path in enumerate(paths)},
        xlora_depth=head.get("depth", 1),
        xlora_size=head.get("hidden_size", 2048),
        layerwise_scalings=head.get("layerwise", False),
        softmax_temperature=head.get("temperature", 1.0),
        enable_softmax=head.get("softmax", True),
        top_k_lora=head.get("top_k"),
        enable_softmax_topk=head.get("softmax_top_k", False),
        global_scaling_weight=head.get("global_weight", 1.0),
    )


def save_adapter(path: Path, seed: int) -> Path:
    """A random LoRA on every linear, in PEFT's own format."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    adapted = peft.get_peft_model(tiny("llama"), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(path)
    return path


def factors_of(path: Path) -> dict[str, molex.LoRA]:
    weights = peft.load_peft_weights(str(path), device="cpu")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in weights}
    stem = "base_model.model.{}.lora_{}.weight"
    return {name: molex.LoRA(weights[stem.format(name, "A")], weights[stem.format(name, "B")], 2.0) for name in names}
