"""The extend backend lays the base's weight in other memory: nobody else may notice."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import molex
from tests.models import tiny


def extended() -> tuple[LlamaForCausalLM, molex.Mixture, dict[str, torch.Tensor]]:
    """A converted model after a forward, and its base's weights from before."""
    model = tiny("llama", num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = molex.preset("mola", num_experts=4, rank=4, allocation=None, backend="extend")
    mixture = molex.convert(model, config)
    torch.nn.init.normal_(mixture.layers["model.layers.0.self_attn.q_proj"].experts.lora_B)
    model(torch.arange(6)[None])
    return model, mixture, before


def test_the_weight_is_the_same_parameter_with_the_same_values() -> None:
    _, mixture, before = extended()
    weight = mixture.layers["model.layers.0.self_attn.q_proj"].weight
    assert not weight.is_contiguous()
    assert torch.equal(weight, before["model.layers.0.self_attn.q_proj.weight"])
    reverted = mixture.revert().state_dict()
    assert reverted.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in reverted.items())
    assert all(tensor.is_contiguous() for tensor in reverted.values())
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_folders_hold_the_base_and_the_mixture(tmp_path: Path) -> None:
    model, mixture, before = extended()
    logits = model(torch.arange(6)[None]).logits
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    loaded = molex.load(tmp_path)
    torch.testing.assert_close(loaded.model(torch.arange(6)[None]).logits, logits)
    mixture.revert().save_pretrained(tmp_path / "reverted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "reverted")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("moved", ["copy", "dtype"])
def test_a_weight_that_went_elsewhere_is_laid_anew(moved: str) -> None:
    model, _, _ = extended()
    model = copy.deepcopy(model) if moved == "copy" else model.to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.base.weight.mul_(2)
    logits = model(torch.arange(6)[None]).logits
    mixture = molex.Mixture.of(model)
    mixture.state.planner = molex.kernels.Planner("dense")
    torch.testing.assert_close(logits, model(torch.arange(6)[None]).logits)


def test_two_forwards_before_two_backwards() -> None:
    """B lies in memory that the next forward writes: the backward of the first must have its own."""
    model, mixture, _ = extended()
    ids, B = torch.arange(6)[None], mixture.layers["model.layers.0.self_attn.q_proj"].experts.lora_B
    expected = torch.autograd.grad(model(ids).logits.square().sum(), B)[0]
    first = model(ids).logits.square().sum()
    with torch.no_grad(), mixture.disabled():
        model(ids)
    model(ids.flip(1)).logits.square().sum().backward()
    torch.testing.assert_close(torch.autograd.grad(first, B)[0], expected)


def test_what_is_laid_in_inference_is_trained_with_later() -> None:
    model = tiny("llama", num_hidden_layers=1)
    molex.convert(model, molex.preset("mola", num_experts=4, rank=4, allocation=None, backend="extend"))
    with torch.inference_mode():
        model(torch.arange(6)[None])
    model.train()(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert not model.model.layers[0].self_attn.q_proj.weight.is_inference()
