"""Every architecture of tests/models.py becomes a mixture, trains, generates and comes back as it was."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import molex
from molex.architectures import ROLES
from molex.errors import TargetError
from molex.mixture import Mixture
from tests.models import ARCHITECTURES, CAUSAL, ENCODER_DECODER, STATE_SPACE, WITH_FFN, batch_for, tiny, wake_experts

LINEAR = {"targets": "all", "num_experts": 4, "top_k": 2, "rank": 4, "dropout": 0.0}
CASES = [(name, "mola") for name in ARCHITECTURES] + [(name, "mixlora") for name in WITH_FFN]


def converted(model: nn.Module, method: str) -> Mixture:
    """Linear scope on all linears, or MixLoRA's feed-forward scope with its LoRAs on attention."""
    if method == "mola":
        return molex.convert(model, molex.preset("mola", **LINEAR))
    return molex.convert(model, molex.preset("mixlora", num_experts=4, rank=4, dropout=0.0))


def fingerprint(model: nn.Module) -> dict[str, object]:
    """All that surgery could leave behind: modules, parameters and hooks by identity, flags, attributes."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        seen[name] = id(module), module.training, sorted(vars(module))
        for kind, values in vars(module).items():
            if "hooks" in kind and isinstance(values, dict):
                seen[f"{name} {kind}"] = [id(hook) for hook in values.values()]
    return seen | {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_starts_as_the_base_bit_for_bit(name: str, method: str) -> None:
    model = tiny(name).requires_grad_(False)  # a product picks another kernel for a weight that wants a gradient
    batch = batch_for(model)
    with torch.no_grad():
        before = model(**batch).logits
        converted(model, method)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_trains_all_of_it(name: str, method: str) -> None:
    model = tiny(name).train()
    batch = batch_for(model)
    mixture = converted(model, method)
    wake_experts(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(mixture.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        (loss + mixture.aux_loss()).backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert losses or not idle
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_reverts_to_the_identical_model(name: str, method: str) -> None:
    model = tiny(name)
    next(model.parameters()).requires_grad_(False)
    batch = batch_for(model)
    before, keys = fingerprint(model), list(model.state_dict())
    with torch.no_grad():
        logits = model(**batch).logits
    mixture = converted(model, method)
    wake_experts(model)
    mixture.aux_loss() if mixture.state.trace else model(**batch).loss.backward()
    assert mixture.revert() is model
    assert fingerprint(model) == before
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize(("name", "method"), [case for case in CASES if case[0] in CAUSAL + ENCODER_DECODER])
def test_generates_what_the_full_forward_says(name: str, method: str) -> None:
    model = tiny(name)
    ids_BS = batch_for(model)["input_ids"]
    converted(model, method)
    wake_experts(model)
    cached = model.generate(ids_BS, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(ids_BS, max_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.parametrize("name", STATE_SPACE)
def test_lora_mixer_on_state_space_projections(name: str) -> None:
    model = tiny(name).train()
    batch = batch_for(model)
    mixture = molex.convert(model, molex.preset("lora-mixer", targets="ssm", num_experts=4, rank=4))
    wake_experts(model)
    (model(**batch).loss + mixture.aux_loss()).backward()
    assert {n.split(".")[-1] for n in mixture.layers} >= {"in_proj", "out_proj"}
    assert all(p.grad is not None and p.grad.any() for p in mixture.trainable_parameters())


@pytest.mark.parametrize(
    ("name", "module", "fused"),
    [
        ("mamba", "transformers.models.mamba.modeling_mamba", "mamba_inner_fn"),
        ("mamba2", "transformers.models.mamba2.modeling_mamba2", "mamba2_split_conv1d_scan_combined"),
    ],
)
def test_a_mixer_never_reaches_its_fused_path(
    name: str, module: str, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernels read the projections' weights and would skip their experts."""

    def reached(*args: object, **kwargs: object) -> None:
        raise RuntimeError("fused path")

    monkeypatch.setattr(f"{module}.{fused}", reached)
    model = tiny(name).train()
    batch = batch_for(model)
    with pytest.raises(RuntimeError, match="fused path"):
        model(**batch)
    mixture = molex.convert(model, molex.preset("lora", targets="ssm"))
    model(**batch).loss.backward()
    assert all(module.training for module in model.modules())
    mixture.revert()
    with pytest.raises(RuntimeError, match="fused path"):
        model(**batch)


def test_dt_proj_is_refused() -> None:
    with pytest.raises(TargetError, match="dt_proj is read by Mamba as a weight"):
        molex.convert(tiny("mamba"), molex.preset("lora", targets="dt_proj"))


@pytest.mark.parametrize("kind", sorted(ROLES))
def test_every_row_of_the_table_names_linears_of_its_architecture(kind: str) -> None:
    """The real architectures at their default sizes, on the meta device."""
    config = AutoConfig.for_model(kind, num_hidden_layers=2, **({"head_dim": 64} if kind == "ministral" else {}))
    encoders = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
    with torch.device("meta"):
        model = encoders.get(kind, AutoModelForCausalLM).from_config(config)
    roles = ROLES[kind]
    for role in roles._fields:
        if getattr(roles, role):
            mixture = molex.convert(model, molex.preset("lora", targets=role))
            assert all(p.is_meta for p in mixture.trainable_parameters())
            mixture.revert()


class Unknown(nn.Module):
    """An architecture of no table: a stack of linears and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_an_unknown_architecture_goes_by_shape() -> None:
    model = Unknown()
    mixture = molex.convert(model, molex.preset("mola", **LINEAR))
    assert list(mixture.layers) == [f"blocks.{i}.{j}" for i in range(3) for j in (0, 2)]
    assert model(torch.randn(5, 6)).shape == (5, 2)
    assert model(torch.randn(2, 5, 6)).shape == (2, 5, 2)


def test_an_unknown_architecture_has_no_roles() -> None:
    with pytest.raises(TargetError, match="no 'ffn' linears in Unknown: molex does not know this architecture"):
        molex.convert(Unknown(), molex.preset("loramoe", localized_coefficient=0))


def test_an_unknown_architecture_takes_names_also_in_ffn_scope() -> None:
    model, x = Unknown(), torch.randn(2, 5, 6)
    before = model(x)
    config = molex.preset("mixlora", targets=("blocks.*.0", "blocks.*.2"), plain_targets=(), num_experts=3, rank=2)
    mixture = molex.convert(model.eval(), config)
    assert torch.equal(model(x), before)
    wake_experts(model)
    assert not torch.allclose(model(x), before)
    (model(x).sum() + mixture.aux_loss()).backward()
    assert all(p.grad.any() for p in mixture.trainable_parameters())


@pytest.mark.parametrize("kind", ["falcon", "starcoder2", "qwen2_moe"])
def test_architectures_out_of_the_table(kind: str) -> None:
    """Role "all" works by shape and leaves the head alone; "ffn" asks for names."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = AutoConfig.for_model(kind, **sizes, **({} if kind == "falcon" else {"num_key_value_heads": 2}))
    model = AutoModelForCausalLM.from_config(config).eval()
    ids_BS = torch.arange(3, 10)[None]
    with torch.no_grad():
        before = model(ids_BS).logits
        mixture = molex.convert(model, molex.preset("mola", **LINEAR))
        assert "lm_head" not in mixture.layers
        assert torch.equal(model(ids_BS).logits, before)
    mixture.revert()
    with pytest.raises(TargetError, match=f"no 'ffn' linears in {kind}"):
        molex.convert(model, molex.preset("loramoe", localized_coefficient=0))


def test_the_text_part_of_a_model_of_text_and_images() -> None:
    text = {**ARCHITECTURES["gemma3_text"][1], "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config).eval()
    mixture = molex.convert(model, molex.preset("mola", **LINEAR))
    assert mixture.layers
    assert not [name for name in mixture.layers if "vision" in name]
    assert model(torch.arange(3, 10)[None]).logits.shape[:2] == (1, 7)
