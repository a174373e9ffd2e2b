"""X-LoRA folders against PEFT's own living models: logits, the order of linears and experts, what PEFT loses."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import molex
from molex.errors import MolexError
from molex.io.inspect import describe
from molex.io.peft import read_adapter
from molex.io.peft_xlora import from_peft_xlora
from tests.io.peft_folders import write_peft
from tests.models import VOCABULARY, tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.internal_xlora_classifier.layers."
TARGETS = (["q_proj", "down_proj"], ["v_proj", "up_proj", "down_proj"], ["q_proj", "o_proj"])
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapters_in(folder: Path, architecture: str = "llama", count: int = 3) -> dict[str, str]:
    """Distinct adapters of unlike ranks, scales and targets, under the names that PEFT's X-LoRA asks for."""
    paths = {}
    for i in range(count):
        settings = {"r": 2 + i % 3, "lora_alpha": 6 + i, "target_modules": TARGETS[i % 3]}
        paths[str(i)] = str(write_peft(folder / f"expert{i}", tiny(architecture), seed=i, **settings))
    return paths


def living(adapters: dict[str, str], architecture: str = "llama", std: float = 0.5, **settings: Any) -> peft.PeftModel:
    """PEFT's X-LoRA with a classifier that tells tokens, linears and experts apart."""
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_size=12, adapters=dict(adapters), **settings)
    model = peft.get_peft_model(tiny(architecture, use_cache=False), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.base_model.internal_xlora_classifier.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def write_xlora(folder: Path, model: peft.PeftModel) -> Path:
    """Saves with PEFT, then puts the classifier in as PEFT 0.19.1 writes it (0.21.2 loses some or all of it)."""
    model.save_pretrained(folder)
    whole = {name: t for name, t in model.state_dict().items() if "internal_xlora_classifier" in name}
    lost = load_file(folder / TENSORS)
    assert lost.keys() < whole.keys(), "PEFT no longer loses classifier layers: say so in peft_xlora"
    save_file(whole, folder / TENSORS)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return adapters_in(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, experts: dict[str, str]) -> Path:
    """A folder to damage copies of."""
    model = living(experts, xlora_depth=2, layerwise_scalings=True)
    return write_xlora(tmp_path_factory.mktemp("xlora") / "x", model)


def copied(
    folder: Path,
    into: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Path:
    """A copy with other settings or other tensors."""
    (into / "copy").mkdir()
    settings = json.loads((folder / CONFIG).read_text()) | (config or {})
    (into / "copy" / CONFIG).write_text(json.dumps(settings))
    save_file(tensors(load_file(folder / TENSORS)), into / "copy" / TENSORS)
    return into / "copy"


def refused(model: PreTrainedModel, *arguments: Any, match: str, **named: Any) -> None:
    """A clear error, after which the model is what it was."""
    before = deepcopy(model.state_dict())
    attributes, hooks = {*vars(model)}, sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(MolexError, match=match):
        from_peft_xlora(model, *arguments, **named)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {*vars(model)} == attributes
    assert not hasattr(model, "molex")
    assert not hasattr(model, "molex_mixture")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


HEADS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "one layer, layerwise": {"layerwise_scalings": True, "softmax_temperature": 0.5},
    "two layers": {"xlora_depth": 2, "global_scaling_weight": 1.5},
    "two layers, layerwise": {"xlora_depth": 2, "layerwise_scalings": True},
    "three layers without dropout": {"xlora_depth": 3, "xlora_dropout_p": 0.0},
    "raw": {"enable_softmax": False},
    "top 2": {"top_k_lora": 2, "layerwise_scalings": True},
    "top 2, softmax after": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "softmax twice": {"top_k_lora": 2, "enable_softmax_topk": True},
    "softmax twice, the first so sharp that it gives zeros": {"enable_softmax_topk": True, "softmax_temperature": 0.01},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_it_equals_peft(head: dict[str, Any], experts: dict[str, str], tmp_path: Path) -> None:
    theirs = living(experts, **head)
    model = tiny("llama")
    mixture = from_peft_xlora(model, write_xlora(tmp_path / "x", theirs))
    expected = logits(theirs)
    assert (expected - logits(tiny("llama"))).abs().max() > 0.05
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert mixture.experts == ["0", "1", "2"]
    assert mixture.config.method == "xlora"


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma2", "olmo2"])
def test_linears_have_one_order_in_peft_and_here(architecture: str, tmp_path: Path) -> None:
    theirs = living(adapters_in(tmp_path, architecture), architecture, layerwise_scalings=True)
    model = tiny(architecture)
    mixture = from_peft_xlora(model, write_xlora(tmp_path / "x", theirs))
    wrapped = [name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert [name.partition("lora_model.model.")[2] for name in wrapped] == [*mixture.layers]
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)


def test_twelve_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """PEFT sorts their names when it saves: "10" and "11" come before "2"."""
    theirs = living(adapters_in(tmp_path, count=12))
    folder = write_xlora(tmp_path / "x", theirs)
    assert [*json.loads((folder / CONFIG).read_text())["adapters"]][2] == "10"
    model = tiny("llama")
    assert from_peft_xlora(model, folder).experts == [str(i) for i in range(12)]
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)


def test_a_16_bit_classifier_keeps_its_values(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path, tensors=lambda t: {name: tensor.bfloat16() for name, tensor in t.items()})
    head = from_peft_xlora(tiny("llama"), folder).head
    own = list(head.parameters())  # type: ignore[union-attr]
    wanted = [load_file(folder / TENSORS)[f"{PREFIX}{i}.{end}"] for i in (0, 3) for end in ("weight", "bias")]
    assert all(torch.equal(a, b.float()) for a, b in zip(own, wanted, strict=True))


def test_experts_from_elsewhere_under_other_names(saved: Path, experts: dict[str, str], tmp_path: Path) -> None:
    reference, model = tiny("llama"), tiny("llama")
    from_peft_xlora(reference, saved)
    folder = copied(saved, tmp_path, config={"adapters": dict.fromkeys(experts, "/gone")})
    named = {"law": experts["0"], "code": read_adapter(experts["1"]), "maths": Path(experts["2"])}
    mixture = from_peft_xlora(model, folder, named)
    assert mixture.experts == ["law", "code", "maths"]
    assert torch.equal(logits(model), logits(reference))


def test_a_classifier_that_peft_lost_comes_from_the_living_model(experts: dict[str, str], tmp_path: Path) -> None:
    theirs, model = living(experts, xlora_depth=2), tiny("llama")
    theirs.save_pretrained(tmp_path / "x")
    refused(model, tmp_path / "x", match=r"layers\.0\.weight.*PEFT 0\.20\.0 to 0\.21\.2 lose.*PEFT 0\.19\.1")
    from_peft_xlora(model, tmp_path / "x", state_dict=theirs.state_dict())
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)


def test_it_saves_and_loads_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    model, again, fresh = tiny("llama"), tiny("llama"), tiny("llama")
    mixture = from_peft_xlora(model, saved)
    with torch.no_grad():
        for parameter in mixture.head.parameters():  # type: ignore[union-attr]
            parameter.add_(0.5 * torch.randn_like(parameter))
    mixture.save(tmp_path / "own")
    loaded = molex.load(again, tmp_path / "own")
    assert torch.equal(logits(again), logits(model))
    assert loaded.experts == mixture.experts
    assert all(torch.equal(tensor, mixture.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    from_peft_xlora(fresh, saved)
    assert not torch.equal(logits(fresh), logits(model)), "the changed head and the imported one must differ"


def test_trained_experts_must_be_given(saved: Path, experts: dict[str, str], tmp_path: Path) -> None:
    folder = copied(saved, tmp_path, config={"use_trainable_adapters": True})
    refused(tiny("llama"), folder, match="use_trainable_adapters: its experts were trained on")
    assert from_peft_xlora(tiny("llama"), folder, experts).experts == ["0", "1", "2"]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_original_package_means_the_same(depth: int, biased: bool, experts: dict[str, str], tmp_path: Path) -> None:
    """Against PEFT's port, which its author made of it: inner.<i> and last are its layers."""
    theirs, model = living(experts, xlora_depth=depth, layerwise_scalings=True), tiny("llama")
    layers = theirs.base_model.internal_xlora_classifier.layers
    if not biased:
        for linear in layers:
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.bias)
    settings = {"xlora_depth": depth, "layerwise_scalings": True, "use_bias": biased}
    from_peft_xlora(model, write_original(tmp_path / "x", experts, layers, **settings))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)


def write_original(folder: Path, experts: dict[str, str], layers: nn.Sequential, **settings: Any) -> Path:
    """What the xlora package's save_pretrained leaves: adapters inside, the classifier as `inner` and `last`."""
    names = {name: f"adapter_{int(name) + 1}" for name in experts}
    for name, path in experts.items():
        shutil.copytree(path, folder / names[name])
    tensors = {}
    for key, tensor in layers.state_dict().items():
        index, end = key.split(".")
        place = "last" if int(index) == len(layers) - 1 else f"inner.{index}"
        if end == "weight" or settings.get("use_bias", True):
            tensors[f"{place}.{end}"] = tensor
    save_file(tensors, folder / "xlora_classifier.safetensors")
    config = {"hidden_size": 32, "base_model_id": "tiny", "adapters": [*names.values()], "xlora_size": 12, **settings}
    (folder / "xlora_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"enable_relu_and_dropout": False, "xlora_depth": 2}, "enable_relu_and_dropout=false"),
        ({"enable_softmax_topk": True, "top_k_lora": 2}, "one softmax over all tokens of a batch"),
        ({"adapters": None}, "must be a list of names"),
    ],
)
def test_what_the_original_package_does_otherwise(
    settings: dict[str, Any], reason: str, experts: dict[str, str], tmp_path: Path
) -> None:
    layers = living(experts).base_model.internal_xlora_classifier.layers
    refused(tiny("llama"), write_original(tmp_path / "x", experts, layers, **settings), match=reason)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "first pass with experts": ({"scaling_pass_value": 0.1}, "its first pass runs with the experts on"),
    "no X-LoRA": ({"peft_type": "LORA"}, r"type 'LORA', no X-LoRA; molex\.from_peft"),
    "adapters gone": ({"adapters": {"0": "/gone/a", "1": "/gone/b", "2": "/gone/c"}}, r"pass adapters=\{name: folder"),
    "no adapters": ({"adapters": {}}, "names no adapters"),
    "adapters of no kind": ({"adapters": ["a", "b", "c"]}, "must be paths by number"),
    "fewer adapters": ({"adapters": {"0": "/gone/a"}}, "pass adapters="),
    "depth": ({"xlora_depth": 0}, "depth=0"),
    "depth of another kind": ({"xlora_depth": "2"}, "depth='2'"),
    "deeper than it is": ({"xlora_depth": 3}, r"lacks layers\.6\.weight"),
    "less deep than it is": ({"xlora_depth": 1}, r"has layers\.3\.bias, layers\.3\.weight, no part"),
    "top-k": ({"top_k_lora": 4}, "top_k=4 of 3 experts"),
    "width": ({"xlora_size": 13}, r"layers\.0 is \(12, 32\).*must be \(13, 32\)"),
    "not layerwise": ({"layerwise_scalings": False}, r"layers\.3 is \(30, 12\).*must be \(3, 12\)"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(case: str, saved: Path, tmp_path: Path) -> None:
    settings, reason = SETTINGS[case]
    refused(tiny("llama"), copied(saved, tmp_path, config=settings), match=reason)


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "one bias missing": (without(f"{PREFIX}0.bias"), r"lacks layers\.0\.bias of the classifier"),
    "all missing": (lambda tensors: {}, r"lacks layers\.0\.weight, layers\.0\.bias, layers\.3\.weight and 1 more"),
    "one too many": (lambda tensors: {**tensors, "lora_A.weight": torch.ones(2)}, r"has lora_A\.weight, no part"),
    "not finite": (lambda tensors: {n: t / 0 for n, t in tensors.items()}, "is not finite"),
    "another shape": (lambda tensors: {n: t[:-1].clone() for n, t in tensors.items()}, r"layers\.0 is \(11, 32\)"),
    "a number": (lambda tensors: {n: torch.ones(()) for n in tensors}, r"layers\.0 is \(\)"),
    "float64": (lambda tensors: {n: t.double() for n, t in tensors.items()}, "which a float32 head would round"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_classifiers_are_refused(case: str, saved: Path, tmp_path: Path) -> None:
    damage, reason = DAMAGE[case]
    refused(tiny("llama"), copied(saved, tmp_path, tensors=damage), match=reason)


def test_models_and_adapters_it_was_not_made_for(saved: Path, experts: dict[str, str], tmp_path: Path) -> None:
    refused(tiny("llama", hidden_size=64), saved, match="another base")
    refused(tiny("gpt2"), saved, match="not in this model")
    refused(tiny("llama", num_hidden_layers=3), saved, experts | {"2": write_deeper(tmp_path)}, match="other experts")
    refused(tiny("llama"), saved, {"law": experts["0"]}, match="give a mapping of 3, for 0, 1, 2")
    refused(tiny("llama"), saved, [*experts.values()], match="give a mapping of 3")
    refused(tiny("llama"), saved / "nowhere", match="no folder")
    refused(tiny("llama"), Path(experts["0"]), match="type 'LORA'")


def write_deeper(folder: Path) -> Path:
    """An expert of a model with one layer more: more linears than the classifier has rows for."""
    return write_peft(folder / "deeper", tiny("llama", num_hidden_layers=3), target_modules=["q_proj"])


def test_an_expert_that_is_more_than_a_lora_is_named(saved: Path, experts: dict[str, str], tmp_path: Path) -> None:
    dora = write_peft(tmp_path / "dora", use_dora=True)
    refused(tiny("llama"), saved, experts | {"1": dora}, match=r"expert '1' of .*use_dora=True")
    (dora / CONFIG).write_text("{")
    refused(tiny("llama"), dora, match="is damaged")


def test_inspecting_one_says_who_reads_it(saved: Path) -> None:
    with pytest.raises(MolexError, match=r"molex\.from_peft_xlora\(model, path\) makes it a mixture"):
        describe(saved)
