"""What cannot be served over a base is refused before anything has changed, and says why."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import molex
from molex.errors import StateError
from molex_serve.adapters.content import generation_of
from molex_serve.errors import BadAdapter, BadRequest, LoadBusy
from molex_serve.model.served import ServedModel
from molex_serve.settings import AdapterLimits
from tests.esft.models import moe
from tests.models import mixture_of, tiny
from tests.serve.adapters_of import save_blend, save_lora, save_mixture
from tests.serve.expert_swaps import save_swap


def refused(path: Path, match: str, architecture: str = "llama", limits: AdapterLimits | None = None) -> None:
    served = ServedModel(tiny(architecture), limits)
    with pytest.raises(BadAdapter, match=match):
        served.attach(served.read(str(path)))
    assert not served.pool.places
    assert not served.routed


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has none of")


def test_adapters_of_another_base(tmp_path: Path) -> None:
    wide = save_lora("law", tiny("llama", hidden_size=64), tmp_path)
    refused(wide, "another base")
    refused(save_lora("code", tiny("gpt2"), tmp_path), "not in this model")
    refused(save_mixture("loramoe", tiny("llama", num_hidden_layers=3), tmp_path), "layers|does not fit|another")


def test_damaged_files(tmp_path: Path) -> None:
    law = save_lora("law", tiny("llama"), tmp_path)
    tensors = load_file(law / "adapter_model.safetensors")
    name = next(key for key in tensors if "lora_B" in key)
    save_file({k: v for k, v in tensors.items() if k != name}, law / "adapter_model.safetensors")
    refused(law, "without lora_B")
    (law / "adapter_model.safetensors").write_bytes(b"not tensors")
    refused(law, "adapter_model.safetensors")


def test_factors_that_the_base_cannot_hold(tmp_path: Path) -> None:
    """They are finite numbers on disk, and infinite where they are served."""
    law = save_lora("law", tiny("llama"), tmp_path)
    save_lora("code", tiny("llama"), tmp_path)
    (save_blend(tmp_path) / "blend.json").write_text(json.dumps({"adapters": {"../law": 1e308, "../code": 1}}))
    refused(tmp_path / "blend", "float32 cannot hold at its scale of 1.0")
    half = ServedModel(tiny("llama").half())
    assert half.read(str(law)).kind == "lora"
    config = json.loads((law / "adapter_config.json").read_text())
    (law / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e6}))
    with pytest.raises(BadAdapter, match="float16 cannot hold at its scale of 250000"):
        half.read(str(law))
    (law / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e308}))
    refused(law, "float32 cannot hold")


@pytest.mark.parametrize("kind", ["lora", "mixture", "esft"])
def test_files_that_change_while_they_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read might be served under the name of what came after it."""
    model = moe("mixtral") if kind == "esft" else tiny("llama")
    save = {"lora": save_lora, "mixture": save_mixture, "esft": save_swap}[kind]
    folder = save("mola" if kind == "mixture" else "law", model, tmp_path)
    served, module = ServedModel(moe("mixtral") if kind == "esft" else tiny("llama")), f"molex_serve.adapters.{kind}"
    before = served.read(str(folder)).generation

    def later(found: Path) -> str:
        config = next(found.glob("*.json"))
        config.write_text(config.read_text() + "\n")
        return generation_of(found)

    with monkeypatch.context() as patched:
        patched.setattr(f"{module}.generation_of", later)
        with pytest.raises(BadAdapter, match="changed while it was read"):
            served.read(str(folder))
    if kind != "mixture":
        assert served.read(str(folder)).generation != before


def test_what_is_trained_whole_cannot_share_a_batch(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny("llama", tie_word_embeddings=False), config)
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").add_(1)
    model.save_pretrained(str(tmp_path / "whole"))
    refused(tmp_path / "whole", "lm_head.weight whole")
    base = tiny("llama")
    before = base.lm_head.weight.detach().clone()  # type: ignore[union-attr]
    molex.convert(base, molex.preset("mola", num_experts=2, allocation=None, top_k=1, also_train=("lm_head",))).save(
        tmp_path / "head"
    )
    served = ServedModel(tiny("llama"))
    with pytest.raises(BadAdapter, match="lm_head whole"):
        served.read(str(tmp_path / "head"))
    assert torch.equal(served.model.lm_head.weight, before)  # type: ignore[union-attr]


def test_methods_that_need_the_whole_model(tmp_path: Path) -> None:
    refused(save_mixture("xlora", tiny("llama"), tmp_path), "first pass over the base, which takes a second cache")
    refused(save_mixture("mixlora", tiny("opt"), tmp_path), "beside the block", "opt")


def test_limits(tmp_path: Path) -> None:
    code = save_lora("code", tiny("llama"), tmp_path)
    refused(code, "has rank 12, at most 8", limits=AdapterLimits(rank=8))
    served = ServedModel(tiny("llama"), AdapterLimits(resident=2, columns=64))
    handles = [served.attach(served.read(str(code))) for _ in range(2)]
    assert handles == [1, 2]
    with pytest.raises(LoadBusy, match="2 adapters are resident"):
        served.attach(served.read(str(code)))
    few = ServedModel(tiny("llama"), AdapterLimits(columns=16))
    few.attach(few.read(str(code)))
    with pytest.raises(LoadBusy, match="no 16 columns are free of 16"):
        few.attach(few.read(str(code)))
    assert few.pool.places.keys() == {1}


def test_tasks_are_asked_for(tmp_path: Path) -> None:
    served = ServedModel(tiny("llama"))
    poly = served.attach(served.read(str(save_mixture("poly", tiny("llama"), tmp_path))))
    law = served.attach(served.read(str(save_lora("law", tiny("llama"), tmp_path))))
    for task in (None, -1, 2):
        with pytest.raises(BadRequest, match="give one from 0 to 1"):
            served.check_task(poly, task)
    served.check_task(poly, 1)
    served.check_task(law, None)


@pytest.mark.parametrize("share", [True, "much", float("nan"), 10**400], ids=["bool", "text", "nan", "many digits"])
def test_shares_of_a_blend(share: object, tmp_path: Path) -> None:
    save_lora("law", tiny("llama"), tmp_path), save_lora("code", tiny("llama"), tmp_path)
    blend = save_blend(tmp_path)
    (blend / "blend.json").write_text(json.dumps({"adapters": {"../law": share}}))
    refused(blend, "no finite number|damaged|NaN")


def test_blends_without_members(tmp_path: Path) -> None:
    (tmp_path / "blend").mkdir()
    for document, match in (({"adapters": {}}, "at least one member"), ({}, 'no "adapters"')):
        (tmp_path / "blend" / "blend.json").write_text(json.dumps(document))
        refused(tmp_path / "blend", match)


def test_a_mixture_is_no_base() -> None:
    with pytest.raises(StateError, match="serve its base"):
        ServedModel(mixture_of().model)  # type: ignore[arg-type]


def test_generations_are_contents(tmp_path: Path) -> None:
    law = save_lora("law", tiny("llama"), tmp_path)
    (tmp_path / "copy").mkdir()
    for file in law.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    assert generation_of(law) == generation_of(tmp_path / "copy")
    config = json.loads((law / "adapter_config.json").read_text())
    (law / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    assert generation_of(law) != generation_of(tmp_path / "copy")
