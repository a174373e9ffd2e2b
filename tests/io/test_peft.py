"""PEFT folders: read as PEFT itself computes with them, refused by name where they are more than LoRAs, written back
bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from molex.errors import CheckpointError
from molex.io.adapter import Adapter
from molex.io.peft import read_adapter, write_adapter
from tests.io.peft_folders import peft_model, write_peft
from tests.models import tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT itself would add to each weight."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default")
            found[name] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return found


EXPRESSIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "rank and alpha patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"layers.0.*q_proj": 5}},
    ),
    "patterns and rslora": ("llama", {"rank_pattern": {"^model.layers.1.*": 3}, "use_rslora": True}),
    "some layers only": ("llama", {"layers_to_transform": [1]}),
    "excluded modules": ("llama", {"exclude_modules": r".*layers\.0\.self_attn.*"}),
    "targets by regular expression": ("llama", {"target_modules": r".*\.(up|gate)_proj"}),
    "all linears": ("llama", {"target_modules": "all-linear"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "dropout": ("llama", {"lora_dropout": 0.3}),
}


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_an_adapter_means_what_peft_adds(case: str, tmp_path: Path) -> None:
    architecture, settings = EXPRESSIBLE[case]
    model = peft_model(tiny(architecture), **settings)
    model.save_pretrained(tmp_path / "law")
    adapter, wanted = read_adapter(tmp_path / "law"), deltas(model)
    assert adapter.name == "law"
    assert adapter.factors.keys() == wanted.keys()
    for layer, (A_RD, B_OR, scale) in adapter.factors.items():
        torch.testing.assert_close(scale * (B_OR @ A_RD), wanted[layer], rtol=1e-5, atol=1e-6)


def test_tensors_come_as_they_lie_on_disk(tmp_path: Path) -> None:
    write_peft(tmp_path)
    half = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / TENSORS).items()}
    save_file(half, tmp_path / TENSORS)
    assert {lora.A.dtype for lora in read_adapter(tmp_path).factors.values()} == {torch.bfloat16}


def test_adapters_wrapped_twice_are_the_same(tmp_path: Path) -> None:
    once = read_adapter(write_peft(tmp_path)).factors
    twice = {f"base_model.model.{name}": tensor for name, tensor in load_file(tmp_path / TENSORS).items()}
    save_file(twice, tmp_path / TENSORS)
    assert read_adapter(tmp_path).factors.keys() == once.keys()


def test_keys_of_other_versions_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """Files of PEFT 0.3 have fewer keys, those of later versions have more."""
    adapter = read_adapter(write_peft(tmp_path, lora_alpha=16))
    old = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out")
    edit(tmp_path, lambda config: [config.pop(key) for key in list(config) if key not in old])
    edit(tmp_path, lambda config: config.update(of_the_future={"x": 1}))
    again = read_adapter(tmp_path)
    assert {layer: lora.scale for layer, lora in again.factors.items()} == dict.fromkeys(adapter.factors, 4.0)


def test_modules_to_save_and_resized_embeddings_are_kept_whole(tmp_path: Path) -> None:
    model = peft_model(tiny("llama", tie_word_embeddings=False), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "head")
    saved = read_adapter(tmp_path / "head").whole
    wanted = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert [*saved] == ["lm_head.weight"]
    assert torch.equal(saved["lm_head.weight"], wanted)
    resized = tiny("llama", tie_word_embeddings=False)
    resized.resize_token_embeddings(70)
    peft_model(resized).save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in read_adapter(tmp_path / "resized").whole.items()}
    assert shapes == {"model.embed_tokens.weight": (70, 32), "lm_head.weight": (70, 32)}


def test_resized_embeddings_of_other_names_are_kept_whole(tmp_path: Path) -> None:
    resized = tiny("gpt2")
    resized.resize_token_embeddings(70, mean_resizing=False)
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    peft_model(resized, **settings).save_pretrained(tmp_path, save_embedding_layers=True)
    assert read_adapter(tmp_path).whole["transformer.wte.weight"].shape == (70, 32)


BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)

# features that PEFT itself writes -> what the refusal says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora=True: it scales rows of W"),
    "a bias in B": ({"lora_bias": True}, "lora_bias=True: it adds a bias"),
    "the base's biases": ({"bias": "all"}, "bias='all': it trains the base's biases"),
    "token indices": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]: it trains rows"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': it changed the base's weights"),
    "pissa by iterations": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': it changed the base's"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora': it changed the base's weights"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.*: it repeats layers"),
    "alora": ({"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens=.*from a marker"),
    "an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*a LoRA of an? "),
    "a head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight .a LoRA of a head"),
    "blocks": ({"use_bdlora": BLOCKS}, "use_bdlora=.*: it keeps A or B as diagonal blocks"),
    "kasa": ({"kasa_config": KasaConfig()}, "kasa_config=.*: it has changed the base's weights"),
    "monteclora": ({"monteclora_config": MontecloraConfig()}, "monteclora_config=.*: it draws its factors"),
    "velora": ({"velora_config": VeloraConfig()}, "velora_config=.*: it keeps state for training only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_a_lora_is_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, sentence = REFUSED[case]
    write_peft(tmp_path, tiny("llama", tie_word_embeddings=False), **settings)
    with pytest.raises(CheckpointError, match=sentence):
        read_adapter(tmp_path)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def rekind(folder: Path, kind: str) -> None:
    """Says that a file's one tensor has numbers of another kind, of one byte."""
    save_file({"x": torch.zeros(4, dtype=torch.uint8)}, folder / TENSORS)
    content = (folder / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"U8"', f'"{kind}"'.encode()).rstrip()
    (folder / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")

DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda f: (f / CONFIG).unlink(), "adapter_config.json cannot be read"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "adapter_model.safetensors is missing"),
    "cut short": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-10]), "damaged, cut short"),
    "half of a pair": (lambda f: retensor(f, lambda t: t.pop(B)), "has lora_A without lora_B"),
    "the other half": (lambda f: retensor(f, lambda t: t.pop(A)), "no pair of lora_A and lora_B"),
    "no LoRA at all": (lambda f: retensor(f, lambda t: [t.pop(name) for name in list(t)]), "it adds nothing"),
    "a stray tensor": (lambda f: retensor(f, lambda t: t.update(x=t[A].clone())), "no module in modules_to_save: x"),
    "an unknown part": (
        lambda f: retensor(f, lambda t: t.update({A.replace("lora_A", "lora_C"): t[A].clone()})),
        "no pair of lora_A and lora_B",
    ),
    "another rank": (lambda f: edit(f, lambda c: c.update(r=5)), "its configuration says rank 5"),
    "not a number": (lambda f: retensor(f, lambda t: t[A].fill_(float("nan"))), "values that are not finite"),
    "a convolution": (
        lambda f: retensor(f, lambda t: t.update({A: t[A][..., None, None].contiguous()})),
        "no LoRA of a linear",
    ),
    "alpha 0": (lambda f: edit(f, lambda c: c.update(lora_alpha=0)), "lora_alpha=0 for .*must be a number above 0"),
    "alpha without end": (lambda f: edit(f, lambda c: c.update(lora_alpha=float("inf"))), "lora_alpha=inf for"),
    "alpha no number": (lambda f: edit(f, lambda c: c.update(lora_alpha=float("nan"))), "lora_alpha=nan for"),
    "alpha of many digits": (lambda f: edit(f, lambda c: c.update(lora_alpha=10**400)), "a number above 0"),
    "patterns in a list": (lambda f: edit(f, lambda c: c.update(alpha_pattern=[1])), r"alpha_pattern=\[1\]; it maps"),
    "modules no list": (lambda f: edit(f, lambda c: c.update(modules_to_save=5)), "modules_to_save=5; it lists"),
    "modules no names": (lambda f: edit(f, lambda c: c.update(modules_to_save=[5])), r"modules_to_save=\[5\]; it"),
    "whole numbers": (lambda f: retensor(f, lambda t: t.update({A: t[A].int()})), "is torch.int32; give"),
    "8 bits": (lambda f: retensor(f, lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})), "of 16 bits or more"),
    "a kind of the future": (lambda f: rekind(f, "F8_E8M0"), "numbers of a kind that torch lacks: 'F8_E8M0'"),
    "alpha a word": (lambda f: edit(f, lambda c: c.update(lora_alpha="high")), "lora_alpha='high'"),
    "no rank": (lambda f: edit(f, lambda c: c.pop("r")), "r=None for"),
    "a broken pattern": (lambda f: edit(f, lambda c: c.update(rank_pattern={"(": 3})), "no regular expression"),
    "corda": (lambda f: edit(f, lambda c: c.update(init_lora_weights="corda")), "'corda': it changed the base's"),
    "qalora": (lambda f: edit(f, lambda c: c.update(use_qalora=True)), "use_qalora=True: it pools the input"),
    "MoE parameters": (lambda f: edit(f, lambda c: c.update(target_parameters=["w"])), "it adapts fused parameters"),
    "IA3": (lambda f: edit(f, lambda c: c.update(peft_type="IA3")), "of type 'IA3'; experts come from LORA only"),
    "X-LoRA": (lambda f: edit(f, lambda c: c.update(peft_type="XLORA")), "molex.from_peft_xlora reads it"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_foreign_folders_are_one_sentence(case: str, tmp_path: Path) -> None:
    damage, sentence = DAMAGED[case]
    damage(write_peft(tmp_path))
    with pytest.raises(CheckpointError, match=sentence):
        read_adapter(tmp_path)


def test_bin_files_are_read_on_demand_and_never_run(tmp_path: Path) -> None:
    adapter = read_adapter(write_peft(tmp_path))
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="pass allow_bin=True"):
        read_adapter(tmp_path)
    again = read_adapter(tmp_path, allow_bin=True)
    assert all(torch.equal(again.factors[layer].A, lora.A) for layer, lora in adapter.factors.items())
    torch.save({"w": Malice()}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_adapter(tmp_path, allow_bin=True)
    assert not Malice.ran
    torch.save([1], tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        read_adapter(tmp_path, allow_bin=True)


def test_an_old_adapter_of_the_hub_is_read_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_adapter(write_peft(tmp_path))
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()

    def cached_files(repository: str, names: list[str], revision: str | None) -> list[str]:
        """As transformers': it raises OSError where the repository lacks one of the files."""
        absent = [name for name in names if not (tmp_path / name).is_file()]
        if absent:
            raise OSError(f"{repository} does not appear to have files named {absent}")
        return [str(tmp_path / name) for name in names]

    monkeypatch.setattr("molex.io.hub.cached_files", cached_files)
    with pytest.raises(CheckpointError, match="nor does the hub give it"):
        read_adapter("someone/law")
    again = read_adapter("someone/law", allow_bin=True)
    assert all(torch.equal(again.factors[layer].B, lora.B) for layer, lora in adapter.factors.items())


class Malice:
    """Would run code wherever it is unpickled without restriction."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("from tests.io.test_peft import Malice; Malice.ran = True",)


def test_what_was_read_is_written_bit_for_bit(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"down_proj": 2}, "use_rslora": True, "modules_to_save": ["lm_head"]}
    write_peft(tmp_path / "in", tiny("llama", tie_word_embeddings=False), **settings)
    write_adapter(read_adapter(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "in" / TENSORS).read_bytes() == (tmp_path / "out" / TENSORS).read_bytes()
    assert json.loads((tmp_path / "in" / CONFIG).read_text()) == json.loads((tmp_path / "out" / CONFIG).read_text())


def test_factors_of_no_folder_get_a_configuration_that_peft_understands(tmp_path: Path) -> None:
    theirs = peft_model(rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 5})
    theirs.save_pretrained(tmp_path / "in")
    read = read_adapter(tmp_path / "in")
    write_adapter(Adapter(name="law", factors=read.factors), tmp_path / "out")
    wanted, found = deltas(theirs), deltas(PeftModel.from_pretrained(tiny("llama"), tmp_path / "out"))
    assert found.keys() == wanted.keys()
    for layer, delta in wanted.items():
        torch.testing.assert_close(found[layer], delta)


def test_a_configuration_that_means_other_factors_is_not_written(tmp_path: Path) -> None:
    read = read_adapter(write_peft(tmp_path / "in"))
    doubled = {layer: lora._replace(scale=2 * lora.scale) for layer, lora in read.factors.items()}
    with pytest.raises(CheckpointError, match=r"has scale 6.0, its configuration means 3.0"):
        write_adapter(Adapter(name="law", factors=doubled, config=read.config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
