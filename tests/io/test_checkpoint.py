"""Whatever is wrong with the files is one clear sentence, and leaves the model and the disk as they were."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molex
from molex import Mixture
from molex.errors import CheckpointError
from molex.io.checkpoint import load_into
from molex.io.files import read_tensors
from molex.io.record import digest
from tests.io.mixtures import file_bytes, logits, of_preset, same, snapshot
from tests.models import tiny

TENSORS, CONFIG = "molex.safetensors", "molex_config.json"
A = "model.layers.0.mlp.up_proj.experts.lora_A"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    of_preset("mixlora", also_train=("norm",)).save(tmp_path / "out")
    return tmp_path / "out"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Writes other tensors under the same configuration."""
    document = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"molex": digest(document)})


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes another configuration, with the tensors vouching for it."""
    document = json.loads((folder / CONFIG).read_text())
    change(document)
    (folder / CONFIG).write_text(json.dumps(document))
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"molex": digest(document)})


def cut(folder: Path, name: str, keep: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * keep)])


def dump(folder: Path) -> None:
    with (folder / TENSORS).open("wb") as file:
        pickle.dump({A: [1.0]}, file)


def peft_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def without_layer(document: dict[str, Any]) -> None:
    del document["layers"]["model.layers.1.mlp.up_proj"]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(A)), rf"lacks {A}"),
    "unexpected tensor": (
        lambda f: change_tensors(f, lambda t: t.update(stray=torch.zeros(1))),
        "has unexpected stray",
    ),
    "both": (lambda f: change_tensors(f, lambda t: t.update(stray=t.pop(A))), f"lacks {A} and has unexpected stray"),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({A: t[A].T.contiguous()})),
        rf"{A} has shape \(32, 12\)",
    ),
    "wider dtype": (lambda f: change_tensors(f, lambda t: t.update({A: t[A].double()})), f"{A} is torch.float64"),
    "numbers for indices": (
        lambda f: change_tensors(
            f, lambda t: t.update({"model.layers.0.mlp.up_proj.experts.expert_of_column": torch.ones(12)})
        ),
        "expert_of_column is torch.float32 in the file and torch.int64",
    ),
    "other indices": (
        lambda f: change_tensors(f, lambda t: t["model.layers.0.mlp.up_proj.experts.expert_of_column"].add_(1 << 40)),
        "expert_of_column is not what the experts' ranks say",
    ),
    "whole numbers": (lambda f: change_tensors(f, lambda t: t.update({A: t[A].int()})), f"{A} is torch.int32; give"),
    "not a number": (lambda f: change_tensors(f, lambda t: t[A].fill_(torch.nan)), f"{A} has values that are not fin"),
    "JSON without end": (lambda f: (f / CONFIG).write_text("[" * 100_000), f"{CONFIG} is damaged, it is not JSON"),
    "sizes of a wrong kind": (lambda f: change_config(f, lambda d: d["base"].update(sizes="x")), "are no sizes"),
    "cut short": (lambda f: cut(f, TENSORS, 0.9), f"{TENSORS} is damaged, cut short or no safetensors file"),
    "cut in the header": (lambda f: cut(f, TENSORS, 0.01), f"{TENSORS} is damaged, cut short"),
    "empty tensors": (lambda f: cut(f, TENSORS, 0), f"{TENSORS} is damaged, cut short"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"{TENSORS} is missing"),
    "code instead of tensors": (dump, f"{TENSORS} is damaged, cut short or no safetensors file"),
    "json cut short": (lambda f: cut(f, CONFIG, 0.5), f"{CONFIG} is damaged, it is not JSON"),
    "json of another kind": (lambda f: (f / CONFIG).write_text("[1]"), f"{CONFIG} is damaged: it holds a list"),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), f"{CONFIG} is damaged, it is not JSON"),
    "no json": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}: it was not written by mixture.save"),
    "a PEFT adapter": (peft_folder, "is a PEFT adapter, no mixture; mixture.load_expert takes"),
    "newer format": (
        lambda f: change_config(f, lambda d: d.update(format_version=9, molex_version="7.0")),
        r"of format 9, written by molex 7\.0; .* upgrade molex",
    ),
    "foreign json": (lambda f: (f / CONFIG).write_text('{"a": 1}'), "format_version None; it was not written by molex"),
    "unknown key": (lambda f: change_config(f, lambda d: d.update(colour="red")), "colour"),
    "unknown setting": (lambda f: change_config(f, lambda d: d["config"].update(colour="red")), "colour"),
    "unknown router": (lambda f: change_config(f, lambda d: d["config"].update(router={"kind": "x"})), "router 'x'"),
    "missing key": (lambda f: change_config(f, lambda d: d.pop("layers")), "layers"),
    "layers of a wrong kind": (lambda f: change_config(f, lambda d: d.update(layers=[1])), "damaged"),
    "setting of a wrong kind": (
        lambda f: change_config(f, lambda d: d["config"].update(num_experts="four")),
        "num_experts",
    ),
    "edited by hand": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"top_k": 2', '"top_k": 1')),
        "are not of one save",
    ),
    "origins of a wrong kind": (lambda f: change_config(f, lambda d: d.update(origins="x")), "where they come from"),
    "experts of a wrong kind": (lambda f: change_config(f, lambda d: d.update(experts=True)), "True and .* are no exp"),
    "names of a wrong kind": (
        lambda f: change_config(f, lambda d: d["layers"]["model.layers.0.mlp.up_proj"].update(names=5)),
        "5 are no names of a layer's experts",
    ),
    "a setting without end": (
        lambda f: change_config(f, lambda d: d["config"].update(num_experts=10**20)),
        "does not fit this model",
    ),
    "settings in a text": (lambda f: change_config(f, lambda d: d.update(config="x")), "damaged, or not of this molex"),
    "a count of a wrong kind": (
        lambda f: change_config(f, lambda d: d["layers"]["model.layers.0.mlp.up_proj"].update(num_experts="4")),
        "'4' in a layer's record is no count",
    ),
    "other targets": (lambda f: change_config(f, without_layer), "now mean other layers than when saved"),
    "other ranks": (
        lambda f: change_config(f, lambda d: d["layers"]["model.layers.0.mlp.up_proj"].update(ranks=[1, 2, 3, 4])),
        r"up_proj.experts.lora_A has shape \(12, 32\), here it is \(10, 32\)",
    ),
    "frozen beyond its experts": (
        lambda f: change_config(f, lambda d: d["layers"]["model.layers.0.mlp.up_proj"].update(frozen=2)),
        "4 experts cannot all be frozen",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_leave_model_and_disk_as_they_were(damage: str, folder: Path) -> None:
    harm, sentence = DAMAGES[damage]
    harm(folder)
    refused(tiny("llama"), folder, sentence)


@pytest.mark.parametrize("wrong", [-1, 1 << 40])
def test_shards_outside_of_their_pool(wrong: int, tmp_path: Path) -> None:
    of_preset("mos").save(tmp_path)
    index = next(name for name in load_file(tmp_path / TENSORS) if name.endswith("index_B"))
    change_tensors(tmp_path, lambda t: t[index].fill_(wrong))
    refused(tiny("llama"), tmp_path, f"{index} points outside of its pool")


def test_what_was_read_does_not_follow_its_file(tmp_path: Path) -> None:
    """Of a file that is cut short, a mapped tensor would end the process."""
    save_file({"b": torch.ones(5000), "a": torch.ones(3)}, tmp_path / TENSORS)
    tensors = read_tensors(tmp_path / TENSORS)
    (tmp_path / TENSORS).write_bytes(bytes(30_000))
    assert all(bool(tensor.eq(1).all()) for tensor in tensors.values())
    (tmp_path / TENSORS).write_bytes(b"")
    assert tensors["b"].sum() == 5000
    assert [*tensors] == ["a", "b"]


def refused(model: torch.nn.Module, folder: Path, sentence: str) -> None:
    """Loading raises this sentence, and nothing has changed."""
    on_disk, before = file_bytes(folder), snapshot(model)
    modules = {name: id(module) for name, module in model.named_modules()}
    attributes, hooks = set(vars(model)), hook_counts(model)
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CheckpointError, match=sentence) as caught:
        molex.load(model, folder)
    assert "\n" not in str(caught.value).strip()
    assert file_bytes(folder) == on_disk
    assert same(snapshot(model), before)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert set(vars(model)) == attributes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert hook_counts(model) == hooks


def hook_counts(model: torch.nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


BASES: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "another architecture of the same shapes": (
        lambda: tiny("mistral"),
        "made for a llama base, this model is a mistral",
    ),
    "another vocabulary": (
        lambda: tiny("llama", vocab_size=65),
        "made for a base with vocab_size 64, this model has 65",
    ),
    "another width": (lambda: tiny("llama", hidden_size=64), "hidden_size 32, this model has 64"),
    "more layers": (lambda: tiny("llama", num_hidden_layers=3), "num_hidden_layers 2, this model has 3"),
    "tied embeddings": (lambda: tiny("llama", tie_word_embeddings=True), "tie_word_embeddings False"),
    "another inner width": (
        lambda: tiny("llama", intermediate_size=64),
        r"whose model\.layers\.0\.mlp\.gate_proj is 32 -> 48; here it is 32 -> 64",
    ),
    "no head": (lambda: tiny("llama").model, "this model has no such linear"),
}


@pytest.mark.parametrize("name", BASES)
def test_another_base_is_refused_and_left_alone(name: str, folder: Path) -> None:
    make, sentence = BASES[name]
    refused(make(), folder, sentence)


def test_a_base_without_weights_is_refused(folder: Path) -> None:
    model = tiny("llama").to("meta")
    with pytest.raises(CheckpointError, match="is on the meta device here: give the base its weights"):
        molex.load(model, folder)
    assert not hasattr(model, "molex_mixture")


def test_a_narrower_base_would_round_a_module_trained_whole(folder: Path) -> None:
    refused(tiny("llama").to(torch.bfloat16), folder, "load the base in the wider dtype")


def test_tied_tensors_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    also = ("lm_head", "embed_tokens")
    of_preset("lora", tiny("llama", tie_word_embeddings=True), also_train=also).save(tmp_path)
    change_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    refused(tiny("llama", tie_word_embeddings=True), tmp_path, "are one tensor in this model, but two in the file")


@pytest.mark.parametrize("path", ["nowhere/at/all", "out/molex_config.json", "/", "./nowhere"])
def test_a_path_that_is_no_mixture_is_refused(path: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder|is a file|has no molex_config\.json"):
        molex.load(tiny("llama"), folder.parent / path if path.startswith("out") else path)


@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{path} is no path"):
        molex.load(path)


def test_a_living_mixture_is_filled_or_left_alone(folder: Path) -> None:
    saved = molex.load(tiny("llama"), folder)
    mixture = of_preset("mixlora", also_train=("norm",))
    with torch.no_grad():
        mixture.layers["model.layers.0.mlp.up_proj"].experts.lora_A.zero_()
    load_into(mixture, folder)
    assert same(mixture.state_dict(), saved.state_dict())
    assert mixture.experts == saved.experts
    assert torch.equal(logits(mixture), logits(saved))

    change_tensors(folder, lambda t: t[A].zero_())
    change_tensors(folder, lambda t: t.pop("model.norm.weight"))
    left_alone(mixture, folder, r"lacks model\.norm\.weight")


def test_another_mixture_is_left_alone(folder: Path) -> None:
    left_alone(of_preset("mixlora", rank=2), folder, "saved with experts of ranks")
    left_alone(of_preset("mola"), folder, "saved with experts of ranks")
    left_alone(of_preset("lora", targets="attention"), folder, "have different layers converted")
    fewer = of_preset("mixlora", plain_targets=("q_proj",))
    left_alone(fewer, folder, "have different layers converted")


def left_alone(mixture: Mixture, folder: Path, sentence: str) -> None:
    before = snapshot(mixture.model)
    with pytest.raises(CheckpointError, match=sentence):
        load_into(mixture, folder)
    assert same(snapshot(mixture.model), before)
