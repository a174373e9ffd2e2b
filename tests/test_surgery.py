"""What surgery refuses, how, and that a refused model is as it was; offloaded, meta and 16-bit bases."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

import molex
from molex.errors import ConfigError, MolexError, StateError, TargetError
from tests.models import batch_for, tiny, wake_experts
from tests.test_architectures import fingerprint

REFUSED: dict[str, tuple[str, str, dict, type[MolexError], str]] = {
    "a pattern that matches nothing": ("llama", "lora", {"targets": "q_pro"}, TargetError, "known names: q_proj"),
    "a pattern of modules": ("llama", "lora", {"targets": "self_attn"}, TargetError, "none of them is a linear"),
    "embeddings": ("llama", "lora", {"targets": "embed_tokens"}, TargetError, "none of them is a linear"),
    "a head": ("llama", "lora", {"targets": "lm_head"}, TargetError, r"also_train=\('lm_head',\)"),
    "a pooler": ("bert_classifier", "lora", {"targets": "pooler.dense"}, TargetError, "outside the model's blocks"),
    "a classifier": ("bert_classifier", "lora", {"targets": "classifier"}, TargetError, "outside the model's blocks"),
    "no target": ("llama", "lora", {"targets": ()}, TargetError, "nothing to convert"),
    "a role it lacks": ("mamba", "loramoe", {}, TargetError, "no 'ffn' linears in mamba: it has none"),
    "two of an FFN": (
        "llama", "mixlora", {"targets": ("gate_proj", "up_proj")}, TargetError, "not one feed-forward block"
    ),
    "attention as an FFN": (
        "llama", "mixlora", {"targets": "attention", "plain_targets": ()}, TargetError, "not one feed-forward block"
    ),
    "a target twice": ("llama", "mixlora", {"plain_targets": "up_proj"}, TargetError, "both in targets and"),
    "a target in a module trained whole": ("llama", "lora", {"also_train": "mlp"}, TargetError, "holds the target"),
    "a module trained whole that is not there": ("llama", "lora", {"also_train": "scores"}, TargetError, "'scores'"),
    "top_k above E": ("llama", "mola", {"num_experts": 2, "top_k": 3}, ConfigError, r"layers\.0.*top_k=3 of 2 experts"),
    "top_k above E in one layer": (
        "llama", "mola", {"allocation": (4, 1)}, ConfigError, r"layers\.1\.\S*: top_k=2 of 1 experts"
    ),
    "an allocation of another length": ("llama", "mola", {"allocation": (4, 4, 4)}, ConfigError, "3 entries"),
    "an allocation of another name": ("llama", "mola", {"allocation": "pyramid"}, ConfigError, "shapes: rectangle"),
    "ranks of another number": ("llama", "mola", {"num_experts": 4, "rank": (2, 2)}, ConfigError, "2 entries for 4"),
    "an unknown backend": ("llama", "lora", {"backend": "fast"}, ConfigError, "fast"),
    "xlora on an encoder-decoder": ("t5", "xlora", {}, TargetError, "encoder-decoders are not supported"),
    "xlora by layer": ("llama", "xlora", {"allocation": (2, 3)}, ConfigError, "same number of experts"),
    "MoS by layer": ("llama", "mos", {"allocation": (1, 2)}, ConfigError, "one update per layer"),
    "a router on A x over experts that give none": (
        "llama", "flylora", {"experts": "dora"}, ConfigError, r"layers\.0\S*: this router decides on A x"
    ),
    "a router on A x over blocks of ranks": (
        "llama", "mola", {"router": "implicit", "top_k": 2}, ConfigError, r"layers\.0\S*: .*single ranks"
    ),
    "heads of the router alone": (
        "llama", "mola", {"router": {"kind": "polytropon", "num_heads": 2}}, ConfigError, "the experts have 1"
    ),
    "heads of the experts alone": (
        "llama", "poly", {"experts": {"kind": "averaged", "num_heads": 2}}, ConfigError, "1 heads and the experts"
    ),
    "a list of ranks for a plain LoRA": (
        "llama", "mixlora", {"num_experts": 2, "rank": (2, 4)}, ConfigError, r"q_proj: rank is a list.*plain_targets"
    ),
    "an FFN of shards": ("llama", "mixlora", {"experts": "shards"}, ConfigError, "needs experts 'lora' or 'dora'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_model_is_untouched(case: str) -> None:
    name, method, overrides, kind, message = REFUSED[case]
    model = tiny(name)
    next(model.parameters()).requires_grad_(False)
    before, keys = fingerprint(model), list(model.state_dict())
    with pytest.raises(kind, match=message):
        molex.convert(model, molex.preset(method, **overrides))
    assert fingerprint(model) == before
    assert list(model.state_dict()) == keys


def test_a_linear_in_two_places_is_refused() -> None:
    """It would get experts in one of them; a block that runs twice would forget its first routing."""
    model = tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(TargetError, match=r"layers\.0\.\S+ and model\.layers\.1\.\S+ are one module"):
        molex.convert(model, molex.preset("lora"))


def test_a_model_with_a_part_called_molex_is_refused() -> None:
    model = tiny("llama")
    model.add_module("molex", nn.Identity())
    with pytest.raises(TargetError, match="has a 'molex' of its own"):
        molex.convert(model, molex.preset("lora"))


def test_what_is_no_model_or_no_configuration() -> None:
    with pytest.raises(TargetError, match="'gpt2' is no model"):
        molex.convert("gpt2", molex.preset("lora"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'lora' is no MixtureConfig; give molex\.preset"):
        molex.convert(tiny("llama"), "lora")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"targets=\('all',\) names no linear inside this model"):
        molex.convert(nn.Linear(3, 3), molex.preset("lora"))


def test_errors_are_the_standard_kinds_too() -> None:
    assert issubclass(TargetError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(StateError, RuntimeError)


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model, lambda model: model.model.layers[0]])
def test_a_second_conversion_is_refused(part: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny("llama")
    mixture = molex.convert(model, molex.preset("lora"))
    before = fingerprint(model)
    with pytest.raises(StateError, match="a mixture already"):
        molex.convert(part(model), molex.preset("lora"))
    assert fingerprint(model) == before
    mixture.revert()
    with pytest.raises(StateError, match="reverted already"):
        mixture.revert()
    molex.convert(model, molex.preset("lora")).revert()


def test_the_handle_is_found_on_the_model() -> None:
    model = tiny("llama")
    with pytest.raises(StateError, match="not converted"):
        molex.Mixture.of(model)
    assert molex.convert(model, molex.preset("lora")) is molex.Mixture.of(model)


class ReadsItsWeight(nn.Module):
    """One linear is called, of the other only the weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) @ self.layers[1].weight


def test_a_layer_that_is_never_called_is_named() -> None:
    model = ReadsItsWeight()
    molex.convert(model, molex.preset("lora", targets="layers.*"))
    for _ in range(2):
        with pytest.raises(TargetError, match=r"1 converted layers were never called .* layers\.1\."):
            model(torch.randn(2, 3, 4))


def test_torch_attention_reads_its_output_weight() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).train()
    molex.convert(model, molex.preset("lora", targets="all"))
    with pytest.raises(TargetError, match=r"never called.*layers\.0\.self_attn\.out_proj"):
        model(torch.randn(2, 3, 8))


def test_layers_dropped_at_random_are_no_false_alarm() -> None:
    model = tiny("opt", layerdrop=1.0).train()
    molex.convert(model, molex.preset("lora"))
    model(torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_an_encoder_decoder_raises_no_false_alarm(name: str) -> None:
    """Its stacks are called apart: by generate, with encoder states computed before, or the encoder alone."""
    model = tiny(name)
    ids_BS = batch_for(model)["input_ids"]
    for calls in range(3):
        twin = deepcopy(model)
        molex.convert(twin, molex.preset("mola", num_experts=3))
        with torch.no_grad():
            if calls == 0:
                twin.generate(ids_BS, max_new_tokens=3, num_beams=2)
            states = twin.get_encoder()(ids_BS)
            if calls == 1:
                twin(encoder_outputs=states, decoder_input_ids=ids_BS)


def test_gate_and_down_alone_are_a_whole_ffn_of_their_own() -> None:
    """up_proj stays the base's: h_e = act(W_gate x + Δ_e x) ⊙ (W_up x), against a loop over experts."""
    model = tiny("llama", num_hidden_layers=1).double()
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 32, dtype=torch.float64)
    targets = ("gate_proj", "down_proj")
    config = molex.preset("mixlora", targets=targets, plain_targets=(), num_experts=3, rank=2, dropout=0.0)
    molex.convert(model, config)
    wake_experts(model)
    y = mlp(x[None])[0]
    gate, down = mlp.gate_proj, mlp.down_proj
    weights, chosen = gate.router.gate(x).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    for t in range(5):
        expected = torch.zeros(32, dtype=torch.float64)
        for w, e in zip(weights[t], chosen[t].tolist(), strict=True):
            h = nn.functional.silu(gate.base(x[t]) + gate.experts.materialize(e) @ x[t]) * mlp.up_proj(x[t])
            expected = expected + w * (down.base(h) + down.experts.materialize(e) @ h)
        torch.testing.assert_close(y[t], expected, rtol=1e-10, atol=1e-12)


class NormBetween(nn.Module):
    """A feed-forward block with a norm between its halves (sub-LN), or with something that mixes tokens."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 6))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def test_a_norm_between_the_halves_is_fine() -> None:
    model = NormBetween(nn.LayerNorm(8))
    molex.convert(model, molex.preset("mixlora", targets="layers.*.*", plain_targets=(), num_experts=2, rank=2))
    assert model(torch.randn(2, 3, 6)).shape == (2, 3, 6)


def test_what_reshapes_between_the_halves_is_an_error() -> None:
    model = NormBetween(nn.Flatten(0, 1))
    molex.convert(model, molex.preset("mixlora", targets="layers.*.*", plain_targets=(), num_experts=2, rank=2))
    with pytest.raises(StateError, match=r"not elementwise; use scope='linear'"):
        model(torch.randn(2, 3, 6))


def test_also_train_frees_the_modules_it_names() -> None:
    model = tiny("bert_classifier").train()
    mixture = molex.convert(model, molex.preset("lora", also_train="classifier"))
    assert mixture.also_trained == ["classifier"]
    model(**batch_for(model)).loss.backward()
    assert model.classifier.weight.grad.any()
    assert {"classifier.weight", "classifier.bias"} <= set(mixture.state_dict())
    assert not any(name.startswith("bert.pooler") for name in mixture.state_dict())


def test_ownership_where_the_base_has_experts_and_routers_of_its_own() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"router": nn.Linear(4, 4)})])})
    model.forward = lambda x: x  # type: ignore[method-assign]
    mixture = molex.convert(model, molex.preset("mola", targets="experts.0.router", num_experts=2, rank=2))
    assert mixture.owns("experts.0.router.experts.lora_A")
    assert mixture.owns("experts.0.router.router.gate.weight")
    assert not mixture.owns("experts.0.router.base.weight")


@pytest.mark.parametrize("method", ["lora", "mola", "mixlora", "mos", "hydralora"])
def test_a_base_on_the_meta_device_converts(method: str) -> None:
    model = tiny("llama", num_hidden_layers=8).to("meta")
    mixture = molex.convert(model, molex.preset(method))
    assert all(p.is_meta for p in model.parameters())
    counts = mixture.num_parameters()
    mixture.revert()
    assert counts == molex.convert(tiny("llama", num_hidden_layers=8), molex.preset(method)).num_parameters()


def offload_to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatch(model: nn.Module, folder: Path) -> nn.Module:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora"])
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, dispatch])
def test_an_offloaded_base(offload: Callable[[nn.Module, Path], nn.Module], method: str, tmp_path: Path) -> None:
    """Experts live where the base computes; forward and gradients are those of the model in memory."""
    config = molex.preset(method, num_experts=3, rank=4, dropout=0.0)
    resident, model = tiny("llama"), offload(tiny("llama"), tmp_path)
    batch = batch_for(resident)
    assert any(p.is_meta for p in model.parameters())
    mixtures = [molex.convert(resident, config), molex.convert(model, config)]
    assert not any(p.is_meta for p in mixtures[1].trainable_parameters())
    wake_experts(resident)
    model.load_state_dict(mixtures[0].state_dict(), strict=False)
    losses = [mixture.model(**batch).loss for mixture in mixtures]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(*(mixture.trainable_parameters() for mixture in mixtures), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad)
    with torch.no_grad():
        mixtures[1].revert()
        model(**batch)


def test_dora_needs_the_base_weight_at_hand() -> None:
    model = offload_to_cpu(tiny("llama"), Path())
    with pytest.raises(TargetError, match="DoRA experts read the base weight: it is offloaded"):
        molex.convert(model, molex.preset("mixlora", experts="dora"))


@pytest.mark.parametrize("method", ["mola", "mixlora", "smora", "meteora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_master_weights_over_any_base(method: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype).train()
    batch = batch_for(model)
    with torch.no_grad():
        before = model(**batch).logits
        overrides = {} if method == "smora" else {"rank": 4, "num_experts": 3, "dropout": 0.0}
        mixture = molex.convert(model, molex.preset(method, losses=(), train_experts=True, **overrides))
        assert torch.equal(model(**batch).logits, before)
    assert {p.dtype for p in mixture.trainable_parameters()} <= {torch.float32, dtype} - {torch.bfloat16, torch.float16}
    wake_experts(model)
    output = model(**batch)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixture.trainable_parameters())


@pytest.mark.parametrize("method", ["mola", "mixlora", "dynmole", "xlora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float64, 1e-5)])
def test_a_converted_model_moves_to_another_dtype(method: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    mixture = molex.convert(model, molex.preset(method, num_experts=3, rank=4))
    wake_experts(model)
    with torch.no_grad():
        before = model(**batch).logits
        model.to(dtype)
        after = model(**batch).logits
    assert after.dtype == dtype
    # near ties may choose another expert: most tokens must agree, not all
    close_BS = ((after.float() - before).norm(dim=-1) / before.norm(dim=-1)) < tolerance
    assert close_BS.float().mean() > 0.8
    model.train()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in mixture.trainable_parameters())
