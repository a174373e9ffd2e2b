"""A saved mixture merged from its folder, the base never loaded: equal to the merge in memory, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import molex
from molex.errors import CheckpointError, ConfigError
from molex.io.peft import read_adapter
from molex.merging.adapters import Output
from molex.merging.saved_mixture import merge_saved, open_mixture
from molex.mixture import Mixture
from tests.merging.adapters import saved_base
from tests.models import mixture_of, wake_experts

MIXTURES: list[tuple[str, dict[str, Any]]] = [
    ("mola", {}),
    ("mola", {"also_train": ("lm_head", "norm")}),
    ("mixlora", {}),
    ("hydralora", {}),
    ("mos", {"num_experts": 1, "rank": 2, "private_rank": 1}),
    ("xlora", {}),
    ("arrow", {}),
]


def saved(tmp_path: Path, method: str, settings: dict[str, Any]) -> Mixture:
    mixture = mixture_of("llama", method, **settings)
    wake_experts(mixture.model)
    mixture.model.config._name_or_path = str(saved_base(tmp_path / "base"))
    for name in mixture.also_trained:
        nn.init.normal_(mixture.model.get_submodule(name).weight)  # type: ignore[arg-type]
    mixture.save(tmp_path / "mixture")
    return mixture


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.mark.parametrize(("method", "settings"), MIXTURES)
def test_as_in_memory(tmp_path: Path, never_loaded: None, method: str, settings: dict[str, Any]) -> None:
    mixture = saved(tmp_path, method, settings)
    merge_saved(open_mixture(tmp_path / "mixture"), "linear", None, tmp_path / "out", Output())
    wanted = mixture.merge("linear").state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() <= wanted.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, wanted[name]), name


def test_as_an_adapter_on_the_bases_own_name(tmp_path: Path, never_loaded: None) -> None:
    saved(tmp_path, "mola", {})
    merge_saved(open_mixture(tmp_path / "mixture"), "svd", None, tmp_path / "out", Output(kind="lora"), rank=2)
    adapter = read_adapter(tmp_path / "out")
    assert adapter.base == str(tmp_path / "base")
    assert {lora.A.shape[0] for lora in adapter.factors.values()} == {2}


def test_with_the_base_in_the_mixtures_folder_in_16_bits(tmp_path: Path, never_loaded: None) -> None:
    mixture = mixture_of("llama", "mola", also_train=("norm",))
    wake_experts(mixture.model)
    mixture.model.bfloat16()
    mixture.model.save_pretrained(tmp_path / "both")
    merge_saved(open_mixture(tmp_path / "both"), "linear", None, tmp_path / "out", Output())
    wanted = mixture.merge("linear").state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted[name]), name


def test_refusals_write_nothing(tmp_path: Path) -> None:
    saved(tmp_path, "mola", {})
    with pytest.raises(ConfigError, match="no exact dense equivalent"):
        merge_saved(open_mixture(tmp_path / "mixture"), None, None, tmp_path / "out", Output())
    assert not (tmp_path / "out").exists()
    nameless = mixture_of("llama", "mola")
    nameless.save(tmp_path / "nameless")
    with pytest.raises(CheckpointError, match="does not name its base"):
        open_mixture(tmp_path / "nameless")
    other = AutoModelForCausalLM.from_config(mixture_of("llama", "mola", num_hidden_layers=3).model.config)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        open_mixture(tmp_path / "mixture")


def test_experts_over_a_base_without_memory_are_those_that_were_saved(tmp_path: Path) -> None:
    mixture = saved(tmp_path, "mola", {})
    read = open_mixture(tmp_path / "mixture").mixture
    assert read.experts == mixture.experts
    for expert_id in range(len(mixture.experts)):
        for name, lora in mixture.factors(expert_id).items():
            assert torch.equal(read.factors(expert_id)[name].B, lora.B)
    assert all(p.is_meta for name, p in read.model.named_parameters() if not read.owns(name))
    with pytest.raises(CheckpointError, match="meta device"), torch.device("meta"):
        molex.load(type(mixture.model)(mixture.model.config), tmp_path / "mixture")
