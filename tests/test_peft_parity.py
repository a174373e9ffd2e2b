"""PEFT's own LoRA, DoRA, X-LoRA, Poly, MHR and Arrow beside ours, with the same weights: logits and gradients."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor
from transformers import PreTrainedModel

import molex
from molex.mixture import Mixture
from tests.models import batch_for, tiny

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
NEAR = {"rtol": 1e-9, "atol": 1e-9}


def base() -> PreTrainedModel:
    return tiny("llama").double()


def inputs() -> dict[str, Tensor]:
    batch = batch_for(tiny("llama"))
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :2] = 0
    return {"input_ids": batch["input_ids"], "attention_mask": mask}


def random_weights(model: torch.nn.Module, part: str) -> dict[str, torch.nn.Parameter]:
    """Fills the parameters whose name has `part`; returns them."""
    found = {n: p for n, p in model.named_parameters() if part in n}
    for parameter in found.values():
        parameter.data = 0.3 * torch.randn_like(parameter)
    assert found
    return found


def bare(name: str) -> str:
    """A PEFT module name as the base model knows it."""
    return name.removeprefix("base_model.model.")


def wrapped(model: Any, kind: type) -> dict[str, Any]:
    return {bare(n): m for n, m in model.named_modules() if isinstance(m, kind)}


def in_double(mixture: Mixture) -> Mixture:
    mixture.model.double().eval()
    return mixture


def factors_of(layers: Mapping[str, Any], adapter: str) -> dict[str, molex.LoRA]:
    return {n: molex.LoRA(m.lora_A[adapter].weight, m.lora_B[adapter].weight, 5 / 3) for n, m in layers.items()}


def assert_same_training(
    model: Any, mixture: Mixture, pairs: dict[str, tuple[Tensor, Tensor]], **peft_inputs: Any
) -> None:
    """Same logits of real tokens, and the same gradient on every pair (PEFT's parameter, ours)."""
    real = inputs()["attention_mask"].bool()  # padding has no task here, in PEFT it has its row's
    ours, theirs = mixture.model(**inputs()).logits[real], model(**inputs(), **peft_inputs).logits[real]
    torch.testing.assert_close(ours, theirs, **NEAR)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, [mine for _, mine in pairs.values()], upstream)
    wanted = torch.autograd.grad(theirs, [theirs_p for theirs_p, _ in pairs.values()], upstream)
    for name, mine, other in zip(pairs, got, wanted, strict=True):
        torch.testing.assert_close(
            mine.reshape(-1), _arranged(name, other).reshape(-1), **NEAR, msg=lambda m, n=name: f"{n}: {m}"
        )


def _arranged(name: str, gradient: Tensor) -> Tensor:
    """PEFT's Poly keeps A and B transposed: (splits, skills, D, R) and (splits, skills, R, O)."""
    return gradient.transpose(-1, -2) if "poly_lora" in name else gradient


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora(rslora: bool, dora: bool) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, use_dora=dora, use_rslora=rslora)
    model = peft.get_peft_model(base(), config).eval()
    random_weights(model, "lora_A")
    random_weights(model, "lora_B")
    scaling = "alpha/sqrt(rank)" if rslora else "alpha/rank"
    kind = "dora" if dora else "lora"
    settings = molex.preset("lora", rank=3, alpha=7, dropout=0, targets=TARGETS, scaling=scaling, experts=kind)
    mixture = in_double(molex.convert(base(), settings))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, theirs in wrapped(model, peft.tuners.lora.LoraLayer).items():
        bank: Any = mixture.layers[name].experts
        for side in ("lora_A", "lora_B"):
            parameter = getattr(theirs, side)["default"].weight
            getattr(bank, side).data.copy_(parameter)
            pairs[f"{name}.{side}"] = (parameter, getattr(bank, side))
        if dora:
            magnitude = theirs.lora_magnitude_vector["default"].weight
            magnitude.data *= 1 + 0.2 * torch.rand_like(magnitude)
            bank.magnitude.data.copy_(magnitude[None])
            pairs[f"{name}.magnitude"] = (magnitude, bank.magnitude)
    assert len(pairs) == 8 * (3 if dora else 2)
    assert_same_training(model, mixture, pairs)


@pytest.mark.parametrize("n_splits", [1, 4])
def test_poly_and_mhr(n_splits: int) -> None:
    config = peft.PolyConfig(
        task_type="CAUSAL_LM", r=3, n_tasks=2, n_skills=3, n_splits=n_splits, target_modules=TARGETS, init_weights=False
    )
    model = peft.get_peft_model(base(), config).double().eval()
    random_weights(model, "module_logits")
    settings = molex.preset("mhr", rank=3, num_tasks=2, num_experts=3, num_heads=n_splits, targets=TARGETS)
    mixture = in_double(molex.convert(base(), settings))
    task_ids = torch.tensor([1, 0])
    mixture.set_tasks(task_ids)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, theirs in wrapped(model, peft.tuners.poly.layer.PolyLayer).items():
        layer: Any = mixture.layers[name]
        for ours, parameter in (
            (layer.experts.lora_A, theirs.poly_lora_A["default"]),
            (layer.experts.lora_B, theirs.poly_lora_B["default"]),
        ):
            ours.data.copy_(parameter.transpose(-1, -2))
            pairs[f"{name}.poly_lora.{len(pairs)}"] = (parameter, ours)
        logits = theirs.poly_router["default"].module_logits
        layer.router.task_logits.data.copy_(logits)
        pairs[f"{name}.logits"] = (logits, layer.router.task_logits)
    assert len(pairs) == 8 * 3
    assert_same_training(model, mixture, pairs, task_ids=task_ids)


def saved_adapters(folder: Path, count: int) -> list[str]:
    """LoRA adapters with random weights, on disk, as PEFT's methods over adapters want them."""
    paths = []
    for index in range(count):
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, lora_dropout=0.0)
        model = peft.get_peft_model(base(), config)
        random_weights(model, "lora_A")
        random_weights(model, "lora_B")
        paths.append(str(folder / str(index)))
        model.save_pretrained(paths[-1])
    return paths


def load_experts(mixture: Mixture, layers: Mapping[str, Any], adapters: list[str]) -> None:
    for index, adapter in enumerate(adapters):
        mixture.load_expert(index, adapter, factors_of(layers, adapter))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        (
            {"layerwise_scalings": True, "xlora_depth": 3, "softmax_temperature": 0.7},
            {"layerwise": True, "depth": 3, "temperature": 0.7},
        ),
        ({"top_k_lora": 2, "global_scaling_weight": 0.6}, {"top_k": 2, "global_weight": 0.6}),
        ({"top_k_lora": 2, "enable_softmax_topk": True}, {"top_k": 2, "softmax_top_k": True}),
        ({"enable_softmax_topk": True}, {"softmax_top_k": True}),
        ({"enable_softmax": False}, {"softmax": False}),
    ],
)
def test_xlora(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    paths = saved_adapters(tmp_path, 3)
    adapters = {str(index): path for index, path in enumerate(paths)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_size=6, adapters=adapters, **theirs)
    base_model = base()
    base_model.config.use_cache = False
    model: Any = peft.get_peft_model(base_model, config).double().eval()
    classifier = random_weights(model, "internal_xlora_classifier")
    settings = molex.preset("xlora", num_experts=3, rank=3, alpha=5, targets=TARGETS, hidden_size=6, **ours)
    mixture = in_double(molex.convert(base(), settings))
    layers = {n.removeprefix("lora_model.model."): m for n, m in wrapped(model, peft.tuners.lora.LoraLayer).items()}
    layers = {n[n.index("model.layers") :]: m for n, m in layers.items()}
    assert list(layers) == list(mixture.layers), "scalings are numbered in the order of the layers"
    load_experts(mixture, layers, ["0", "1", "2"])
    head: Any = mixture.model.molex["router"].head  # type: ignore[index]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for (name, parameter), mine in zip(classifier.items(), head.parameters(), strict=True):
        mine.data.copy_(parameter)
        pairs[name] = (parameter, mine)
    assert_same_training(model, mixture, pairs)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_arrow(tmp_path: Path, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs (and so coefficients) and prototypes. PEFT's 15 power iterations, from a random start in float32, stop
    short of the singular vector: run to the end they give ours, as they are they point roughly the same way."""
    short_run = ArrowLoraLinearLayer.top_right_singular_vec_from_BA

    def to_the_end(self: Any, A: Tensor, B: Tensor, iters: int = 15, eps: float = 1e-8) -> Tensor:
        return torch.linalg.svd(B @ A).Vh[0]

    monkeypatch.setattr(ArrowLoraLinearLayer, "top_right_singular_vec_from_BA", to_the_end)
    arrow = peft.ArrowConfig(top_k=top_k, router_temperature=0.5, rng_seed=0)
    model: Any = peft.create_arrow_model(base(), saved_adapters(tmp_path, 4), arrow).double().eval()
    shape = {"num_experts": 4, "rank": 3, "alpha": 5, "targets": TARGETS}
    settings = molex.preset("arrow", top_k=top_k, temperature=0.5, **shape)
    mixture = in_double(molex.convert(base(), settings))
    layers = wrapped(model, peft.tuners.lora.LoraLayer)
    adapters = [f"task_{index}" for index in range(4)]
    for name in mixture.layers:
        mixture.layers[name].router.double()  # type: ignore[union-attr]
    load_experts(mixture, layers, adapters)
    theirs = model(**inputs()).logits
    torch.testing.assert_close(mixture.model(**inputs()).logits, theirs, **NEAR)
    for name, layer in layers.items():
        prototypes_ED = layer.lora_arrow["arrow_router"].prototypes
        ours: Any = mixture.layers[name].router
        torch.testing.assert_close((ours.prototypes * prototypes_ED).sum(1).abs(), torch.ones(4).double(), **NEAR)
        A_RD, B_OR, _ = factors_of(layers, "task_0")[name]
        roughly_D = short_run(layer.lora_arrow["arrow_router"], A_RD, B_OR).double()
        assert 0.7 < float((roughly_D @ ours.prototypes[0]).abs()) <= 1 + 1e-6
