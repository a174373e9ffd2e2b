"""save_pretrained of a converted model: the stock loader finds the base, bit for bit; molex.load finds the mixture."""

import inspect
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import hub

import molex
from molex import Mixture
from molex.errors import ConfigError, StateError
from tests.io.mixtures import file_bytes, logits, of_preset, same, scrambled, snapshot
from tests.models import batch_for, tiny


def stock(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """What transformers alone loads from a folder, with nothing re-initialised and nothing left over."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)  # type: ignore[misc]
    assert not any(report.values()), report
    return model


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("preset", "architecture", "fields"),
    [
        *[("lora", name, {}) for name in ("gpt2", "gemma2", "opt", "mamba2", "bert_classifier", "t5", "t5_gated")],
        *[("mos", name, {}) for name in ("llama", "gpt2", "mamba", "t5")],
        *[("xlora", name, {}) for name in ("llama", "mamba", "bert_classifier")],
        ("mixlora", "llama", {}),
        ("mixlora", "llama", TIED),
        ("arrow", "llama", TIED),
    ],
)
def test_the_folder_is_the_base_and_the_mixture(
    preset: str, architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny(architecture, **fields)
    before = snapshot(base)
    mixture = of_preset(preset, base)
    said = logits(mixture)
    names, modules = [*snapshot(base)], [*base.named_modules()]
    mixture.model.save_pretrained(tmp_path)

    assert same(snapshot(stock(tmp_path, type(base))), before)
    loaded = molex.load(tmp_path)
    assert type(loaded.model) is type(base)
    assert torch.equal(logits(loaded), said)
    assert same(loaded.state_dict(), mixture.state_dict())

    assert [*snapshot(base)] == names, "saving left its traces on the model"
    assert [*base.named_modules()] == modules
    assert torch.equal(logits(mixture), said)


def test_the_base_is_saved_as_transformers_would_have(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "plain")
    of_preset("mixlora").model.save_pretrained(tmp_path / "both")
    plain, both = file_bytes(tmp_path / "plain"), file_bytes(tmp_path / "both")
    assert {name: both[name] for name in plain} == plain
    assert both.keys() - plain.keys() == {"molex.safetensors", "molex_config.json", "README.md"}


def test_signature_is_transformers_own() -> None:
    model = of_preset("lora").model
    assert inspect.signature(model.save_pretrained) == inspect.signature(tiny("llama").save_pretrained)


def test_shards_and_what_an_earlier_save_left(tmp_path: Path) -> None:
    mixture = of_preset("lora")
    mixture.model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    mixture.model.model.norm.weight.data.add_(1)
    mixture.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert (tmp_path / "notes.txt").exists()
    assert torch.equal(stock(tmp_path, LlamaForCausalLM).model.norm.weight, mixture.model.model.norm.weight)
    assert torch.equal(logits(molex.load(tmp_path)), logits(mixture))


def test_a_later_save_of_the_mixture_alone_still_finds_the_base_there(tmp_path: Path) -> None:
    mixture = of_preset("lora")
    mixture.model.save_pretrained(tmp_path)
    scrambled(mixture)
    mixture.save(tmp_path)
    assert torch.equal(logits(molex.load(tmp_path)), logits(mixture))


def test_a_base_under_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave variant out"):
        of_preset("lora").model.save_pretrained(tmp_path / "out", variant="fp16")
    assert not (tmp_path / "out").exists()


def test_a_deep_copy_saves_its_own_weights(tmp_path: Path) -> None:
    mixture = of_preset("mixlora")
    mixture.model(**batch_for(mixture.model)).loss.backward()
    twin = Mixture.of(deepcopy(mixture.model))
    scrambled(twin)
    with torch.no_grad():
        twin.model.lm_head.weight.add_(1)
    mixture.model.save_pretrained(tmp_path / "one")
    twin.model.save_pretrained(tmp_path / "two")
    for name, its in (("one", mixture), ("two", twin)):
        assert torch.equal(logits(molex.load(tmp_path / name)), logits(its))
    assert not torch.equal(logits(mixture), logits(twin))


def test_modules_trained_whole_are_in_the_base_as_trained_and_the_card_says_so(tmp_path: Path) -> None:
    mixture = of_preset("lora", also_train=("norm", "layers.1.input_layernorm"))
    mixture.model.save_pretrained(tmp_path)
    base = stock(tmp_path, LlamaForCausalLM)
    assert torch.equal(base.model.norm.weight, mixture.model.model.norm.weight)
    assert torch.equal(logits(molex.load(tmp_path)), logits(mixture))
    card = (tmp_path / "README.md").read_text()
    assert "`model.norm`" in card
    assert "not the original base's" in card
    assert json.loads((tmp_path / "molex_config.json").read_text())["also_trained"] == [
        "model.layers.1.input_layernorm",
        "model.norm",
    ]


def test_a_trainers_gathered_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    mixture = of_preset("mos")
    given = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in snapshot(mixture.model).items()
    }
    mixture.model.save_pretrained(tmp_path, state_dict=given)
    base = snapshot(stock(tmp_path, LlamaForCausalLM))
    assert torch.equal(base["model.layers.0.mlp.up_proj.weight"], given["model.layers.0.mlp.up_proj.base.weight"])
    loaded = molex.load(tmp_path).state_dict()
    assert same(loaded, {name: given[name] for name in loaded})
    with pytest.raises(StateError, match=r"lacks the mixture's .*experts.*and .* more"):
        mixture.model.save_pretrained(tmp_path, state_dict={"model.norm.weight": given["model.norm.weight"]})


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    mixture = of_preset("lora")
    mixture.model.save_pretrained(tmp_path / "out", is_main_process=False)
    mixture.save(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_model_and_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = of_preset("lora")
    mixture.model.save_pretrained(tmp_path)
    before, said = file_bytes(tmp_path), logits(mixture)
    modules = [*mixture.model.named_modules()]
    scrambled(mixture)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    for name in ("transformers.modeling_utils.safe_save_file", "molex.io.saving.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full_disk)
            with pytest.raises(OSError, match="no space left"):
                mixture.model.save_pretrained(tmp_path)
        assert file_bytes(tmp_path) == before
        assert [*mixture.model.named_modules()] == modules
    assert torch.equal(logits(molex.load(tmp_path)), said)


def test_distributed_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave distributed_checkpoint out"):
        of_preset("lora").model.save_pretrained(tmp_path, distributed_checkpoint=True)


def test_reverting_gives_transformers_own_method_back(tmp_path: Path) -> None:
    mixture = of_preset("lora")
    model = mixture.revert()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "molex_config.json").exists()
    assert same(snapshot(AutoModelForCausalLM.from_pretrained(tmp_path)), snapshot(model))


def test_state_dicts_of_a_converted_model_stay_ordinary() -> None:
    mixture, other = of_preset("hydralora"), of_preset("hydralora")
    scrambled(other)
    assert not torch.equal(logits(mixture), logits(other))
    other.model.load_state_dict(mixture.model.state_dict())
    assert torch.equal(logits(mixture), logits(other))


class Hub:
    """Stands in for the hub: takes repositories and commits, and keeps the files."""

    def __init__(self) -> None:
        self.repos: list[str] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.repos.append(repo_id)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> None:
        for operation in operations:
            self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], **options: Any) -> None:
        self.files.update({name: (Path(folder_path) / name).read_bytes() for name in allow_patterns})


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_pushing_to_the_hub_sends_base_and_mixture(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub()
    card = huggingface_hub.ModelCard("---\n---\n")
    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(huggingface_hub, "create_repo", fake.create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", fake.upload_folder)
    mixture = of_preset("mixlora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "secret.txt").write_text("not to be uploaded")
    if way == "push_to_hub":
        mixture.model.push_to_hub("someone/mine")
    else:
        mixture.model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/mine", private=True)
    assert fake.repos == ["someone/mine"]
    assert fake.files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "molex.safetensors",
        "molex_config.json",
        "README.md",
    }
    (tmp_path / "snapshot").mkdir()
    for name, content in fake.files.items():
        (tmp_path / "snapshot" / name).write_bytes(content)
    assert torch.equal(logits(molex.load(tmp_path / "snapshot")), logits(mixture))
