"""mixture.save: three files, whole or not at all, the same bytes every time, and no network."""

import os
import socket
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import molex
from molex.errors import CheckpointError, StateError
from tests.io.mixtures import file_bytes, logits, of_preset, same, scrambled, snapshot
from tests.models import tiny


def test_three_files_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("saving opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    of_preset("mixlora").save(tmp_path / "deep" / "out")
    assert sorted(file_bytes(tmp_path / "deep" / "out")) == ["README.md", "molex.safetensors", "molex_config.json"]


def test_only_the_mixture_is_in_the_file(tmp_path: Path) -> None:
    mixture = of_preset("mos", also_train=("norm",))
    mixture.save(tmp_path)
    with safe_open(tmp_path / "molex.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(mixture.state_dict())
        assert not [name for name in file.keys() if ".base." in name]  # noqa: SIM118 (not a mapping)
        assert "model.norm.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("failing", ["molex.io.saving.save_file", "molex.io.saving.write_json", "os.fsync"])
def test_a_crash_leaves_the_old_files_whole(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = of_preset("mixlora")
    mixture.save(tmp_path / "old")
    before, said = file_bytes(tmp_path / "old"), logits(mixture)
    scrambled(mixture)

    def write_half_and_fail(*args: object, **kwargs: object) -> None:
        for path in args:
            if isinstance(path, Path):
                path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(failing, write_half_and_fail)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            mixture.save(tmp_path / name)
    assert file_bytes(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()
    assert torch.equal(logits(molex.load(tiny("llama"), tmp_path / "old")), said)


def test_a_crash_between_two_renamings_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_preset("mixlora").save(tmp_path)
    replace = os.replace

    def once(source: str, target: str) -> None:
        replace(source, target)
        if str(target).endswith("molex.safetensors"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        of_preset("mixlora", top_k=1).save(tmp_path)
    with pytest.raises(CheckpointError, match="are not of one save"):
        molex.load(tiny("llama"), tmp_path)


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    mixture = of_preset("smora")
    mixture.save(tmp_path / "one")
    mixture.save(tmp_path / "two")
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    mixture = of_preset("poly")
    before = snapshot(mixture.model)
    mixture.save(tmp_path)
    assert same(snapshot(mixture.model), before)


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; give a folder to save into"):
        of_preset("lora").save(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"inside cannot be made: Not a directory; give another folder"):
        of_preset("lora").save(tmp_path / "out" / "inside")
    assert (tmp_path / "out").read_text() == "mine"


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    model = tiny("llama").to("meta")
    mixture = molex.convert(model, molex.preset("lora"))
    with pytest.raises(StateError, match="hold no values here"):
        mixture.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hand_edited_base_name_is_allowed(tmp_path: Path) -> None:
    mixture = of_preset("lora")
    mixture.model.config._name_or_path = "someone/old"
    mixture.save(tmp_path / "out")
    tiny("llama").save_pretrained(tmp_path / "moved")
    config = tmp_path / "out" / "molex_config.json"
    config.write_text(config.read_text().replace("someone/old", str(tmp_path / "moved")))
    assert torch.equal(logits(molex.load(tmp_path / "out")), logits(mixture))


def test_the_card_has_hub_metadata_and_facts(tmp_path: Path) -> None:
    mixture = of_preset("mixlora")
    mixture.model.config._name_or_path = "someone/llama"
    mixture.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "someone/llama"
    assert metadata["library_name"] == "molex"
    assert "mixlora" in metadata["tags"]
    assert f"{mixture.num_parameters()['stored']:,}" in card
    assert str(tmp_path) not in card


def test_a_card_of_the_users_own_stays(tmp_path: Path) -> None:
    mixture = of_preset("lora")
    mixture.save(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    mixture.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
