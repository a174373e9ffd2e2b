"""The rules that PEFT has too, against its add_weighted_adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from molex.experts import LoRA
from molex.merging import make_rule, sparsity
from tests.merging.loras import dense

NAMES, WEIGHTS = ["first", "second", "third"], [0.6, -0.3, 1.1]


def adapters(ranks: tuple[int, int, int] = (3, 3, 3), rslora: bool = False) -> tuple[PeftModel, list[LoRA]]:
    """One linear under three PEFT adapters, and the same as LoRAs."""
    torch.manual_seed(0)
    settings = [LoraConfig(r=rank, lora_alpha=4 + rank, target_modules=["linear"], use_rslora=rslora) for rank in ranks]
    model = _wrapped(settings)
    layer = model.base_model.model.linear
    loras = []
    for name in NAMES:
        nn.init.normal_(layer.lora_B[name].weight)
        loras.append(LoRA(layer.lora_A[name].weight.data, layer.lora_B[name].weight.data, layer.scaling[name]))
    return model, loras


def _wrapped(settings: list[LoraConfig]) -> PeftModel:
    base = nn.Module()
    base.linear = nn.Linear(10, 8)
    model = get_peft_model(base, settings[0], adapter_name=NAMES[0])  # type: ignore[arg-type]
    for name, config in zip(NAMES[1:], settings[1:], strict=True):
        model.add_adapter(name, config)
    return model  # type: ignore[return-value]


def by_peft(model: PeftModel, kind: str, **options: object) -> Tensor:
    model.base_model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type=kind, **options)
    return model.base_model.model.linear.get_delta_weight("merged").detach().double()


@pytest.fixture
def alternating(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws with the global generator, ours with one of the layer's: here both drop every third entry."""

    def every_third(probabilities: Tensor, **_: object) -> Tensor:
        kept = torch.arange(probabilities[0].numel() if probabilities.dim() > 2 else probabilities.numel()) % 3 > 0
        shape = probabilities.shape[1:] if probabilities.dim() > 2 else probabilities.shape
        return kept.view(shape).to(probabilities).expand(probabilities.shape)

    monkeypatch.setattr(torch, "bernoulli", every_third)


@pytest.mark.parametrize(
    ("kind", "rule", "parameters", "options"),
    [
        ("cat", "cat", {}, {}),
        ("svd", "svd", {}, {}),
        ("svd", "svd", {"rank": 2}, {"svd_rank": 2}),
        ("linear", "linear", {"space": "factors"}, {}),
        ("ties", "ties", {"space": "factors", "density": 0.4}, {"density": 0.4}),
        (
            "ties",
            "ties",
            {"space": "factors", "density": 0.7, "majority": "frequency"},
            {"density": 0.7, "majority_sign_method": "frequency"},
        ),
        ("magnitude_prune", "magnitude", {"space": "factors", "density": 0.4}, {"density": 0.4}),
        ("dare_linear", "dare", {"space": "factors", "density": 0.6}, {"density": 0.6}),
        ("dare_ties", "dare_ties", {"space": "factors", "density": 0.6}, {"density": 0.6}),
    ],
)
@pytest.mark.usefixtures("alternating")
def test_equals_peft(kind: str, rule: str, parameters: dict, options: dict) -> None:
    model, loras = adapters()
    merged = make_rule(rule, parameters).merge(loras, WEIGHTS, "linear")
    torch.testing.assert_close(dense(merged), by_peft(model, kind, **options), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_unequal_ranks_equal_peft(kind: str) -> None:
    model, loras = adapters((2, 4, 3))
    merged = make_rule(kind).merge(loras, WEIGHTS)
    torch.testing.assert_close(dense(merged), by_peft(model, kind), rtol=1e-4, atol=2e-5)


def test_peft_scales_merged_rslora_wrongly_and_we_do_not() -> None:
    """PEFT's merged configuration keeps use_rslora, so that its result comes out √(new rank) too large."""
    model, loras = adapters(rslora=True)
    merged = make_rule("cat").merge(loras, WEIGHTS)
    total = sum(w * dense(lora) for w, lora in zip(WEIGHTS, loras, strict=True))
    torch.testing.assert_close(dense(merged), total, rtol=1e-4, atol=2e-5)
    ratio = by_peft(model, "cat").norm() / total.norm()
    assert float(ratio) == pytest.approx(9**0.5, rel=1e-3), "PEFT has mended it: drop this test"


def test_averaging_factors_has_cross_terms() -> None:
    _, loras = adapters()
    merged = make_rule("linear", {"space": "factors"}).merge(loras, WEIGHTS)
    total = sum(w * dense(lora) for w, lora in zip(WEIGHTS, loras, strict=True))
    assert (dense(merged) - total).norm() / total.norm() > 0.5


def test_trim_keeps_as_many_as_peft() -> None:
    x_NK = torch.randn(2, 5, 7)
    for density in (0.0, 0.13, 0.5, 1.0):
        kept = (sparsity.trim(x_NK, density) != 0).flatten(1).sum(1)
        assert kept.tolist() == [int(density * 35)] * 2
        assert sparsity.cutoff([x_NK[0]], density, 1) <= x_NK[0].abs().max()
