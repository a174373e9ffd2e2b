"""describe: what is in a folder, without its base and without reading a number."""

import json
from dataclasses import asdict
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from molex.errors import CheckpointError
from molex.io.inspect import describe
from tests.cases import PRESETS
from tests.io.mixtures import of_preset
from tests.models import tiny


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_described(preset: str, tmp_path: Path) -> None:
    mixture = of_preset(preset)
    mixture.save(tmp_path)
    description = describe(tmp_path)
    tensors = load_file(tmp_path / "molex.safetensors")
    assert (description.kind, description.method) == ("mixture", preset)
    assert description.base_class == "LlamaForCausalLM"
    assert description.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert description.num_parameters == mixture.num_parameters()["stored"]
    assert description.experts == tuple(mixture.experts)
    assert [layer.name for layer in description.layers] == [*mixture.layers]
    for layer in description.layers:
        living = mixture.layers[layer.name]
        ranks = layer.rank if isinstance(layer.rank, tuple) else (layer.rank,) * layer.num_experts
        assert ranks == living.experts.ranks
        assert (layer.in_features, layer.out_features) == (living.in_features, living.out_features)
        own = [*living.experts.state_dict().values()]
        own += [] if living.router is None else [*living.router.state_dict().values()]
        assert layer.num_bytes == sum(tensor.nbytes for tensor in own)


def test_a_grown_mixture_shows_all_its_ranks(tmp_path: Path) -> None:
    mixture = of_preset("moram")
    mixture.grow(2)
    mixture.save(tmp_path)
    assert describe(tmp_path).layers[0].num_experts == 10


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_preset("lora").save(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("molex.io.checkpoint.read_tensors", refuse)
    monkeypatch.setattr("molex.io.files.read_tensors", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert describe(str(tmp_path)).num_layers == 14


def adapter(folder: Path, **settings: object) -> PeftModel:
    model = peft.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj", "down_proj"], **settings))
    model.save_pretrained(folder)
    return model


def test_peft_adapters_are_described(tmp_path: Path) -> None:
    adapter(tmp_path / "law", r=4, lora_alpha=12)
    description = describe(tmp_path / "law")
    assert (description.kind, description.method, description.rank, description.alpha) == ("peft", "lora", 4, 12.0)
    assert description.targets == ("down_proj", "q_proj")
    assert description.experts == ("law",)
    assert description.num_parameters == 2 * 4 * ((32 + 32) + (48 + 32))
    assert description.num_bytes == 4 * description.num_parameters
    first = description.layers[0]
    assert (first.name, first.in_features, first.out_features) == ("model.layers.0.mlp.down_proj", 48, 32)
    assert json.loads(json.dumps(asdict(description)))["layers"][0]["name"] == first.name


def test_peft_adapters_of_several_ranks(tmp_path: Path) -> None:
    adapter(tmp_path, r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6}, use_dora=True)
    description = describe(tmp_path)
    assert description.rank == (2, 4)
    assert description.alpha == (6.0, 8.0)
    assert description.method == "dora"


def test_anything_else_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        describe(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no molex_config\.json"):
        describe(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="of type 'IA3'; only LORA"):
        describe(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        describe(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can run code when read"):
        describe(tmp_path)
