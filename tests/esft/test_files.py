"""Folders in the form of the released ones: what was written comes back, and damage is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import molex.esft
from molex.errors import CheckpointError, TargetError
from molex.esft import Selection
from molex.esft.files import read_folder
from tests.esft.models import ARCHITECTURES, moe, tokens

CHOSEN = Selection({1: (5, 0), 2: (3,)})
Tensors = dict[str, Tensor]


def trained(name: str = "deepseek_v2", dtype: torch.dtype = torch.float32) -> molex.esft.Tuning:
    tuning = molex.esft.tune(moe(name).to(dtype), CHOSEN)
    with torch.no_grad():
        for p in tuning.trainable_parameters():
            p += 0.3 * torch.randn_like(p)
    return tuning


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "expert_cfg.json").read_text())
    (folder / "expert_cfg.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tuning = trained(name, dtype)
    tuning.save(tmp_path)
    with torch.no_grad():
        logits = tuning.model(input_ids=tokens(2, 7)).logits
        again = molex.esft.load(moe(name).to(dtype), tmp_path)
        assert torch.equal(again.model(input_ids=tokens(2, 7)).logits, logits)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "expert_cfg.json").read_text() == (tmp_path / "expert_cfg.json").read_text()
    first, second = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_form_is_the_released_one(tmp_path: Path) -> None:
    tuning = trained()
    tuning.save(tmp_path)
    assert json.loads((tmp_path / "expert_cfg.json").read_text()) == {
        "experts": {"1": [5, 0], "2": [3]},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    tensors = load_file(tmp_path / "model.safetensors")
    names = [f"model.layers.{n}.mlp.experts.{e}" for n, e in ((1, 0), (1, 5), (2, 3))]
    assert sorted(tensors) == [f"{n}.{m}_proj.weight" for n in names for m in ("down", "gate", "up")]
    gate_up, down = tuning.tuned(1).gate_up[0], tuning.tuned(1).down[0]  # expert 5 comes first
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.gate_proj.weight"], gate_up[:24])
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.up_proj.weight"], gate_up[24:])
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.down_proj.weight"], down)


def test_the_first_releases_names_and_several_files(tmp_path: Path) -> None:
    trained().save(tmp_path)
    before = read_folder(tmp_path).swaps
    tensors = {key.removeprefix("model."): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    keys = sorted(tensors)
    save_file({key: tensors[key] for key in keys[:4]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({key: tensors[key] for key in keys[4:]}, tmp_path / "model-00002-of-00002.safetensors")
    after = read_folder(tmp_path).swaps
    for number, own in before.items():
        for expert, weights in own.items():
            assert all(map(torch.equal, weights, after[number][expert]))
    molex.esft.load(moe("deepseek_v2"), tmp_path)
    with pytest.raises(CheckpointError, match="would be read with this adapter"):
        trained().save(tmp_path)
    save_file({keys[0]: tensors[keys[0]]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="twice"):
        read_folder(tmp_path)


GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a matrix is missing": (lambda f: rewrite(f, lambda t: t.pop(GATE)), "expert 5 of layer 1 has no gate_proj"),
    "an expert is missing": (lambda f: reconfigure(f, experts={"1": [5, 0, 4], "2": [3]}), "expert 4 .* has no"),
    "a tensor of nobody": (
        lambda f: rewrite(f, lambda t: t.update({GATE.replace(".5.", ".4."): t[GATE].clone()})),
        r"experts\.4\.gate_proj\.weight, which expert_cfg\.json does not list",
    ),
    "an unlisted layer": (lambda f: reconfigure(f, experts={"1": [5, 0]}), r"layers\.2\..* does not list"),
    "a shared expert's": (
        lambda f: rewrite(
            f, lambda t: t.update({"model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(2, 2)})
        ),
        "no matrix of a routed expert",
    ),
    "another shape": (lambda f: rewrite(f, lambda t: t.update({GATE: torch.ones(23, 32)})), r"gate_proj \(23, 32\)"),
    "one row": (lambda f: rewrite(f, lambda t: t.update({GATE: torch.ones(32)})), r"gate_proj \(32,\)"),
    "whole numbers": (lambda f: rewrite(f, lambda t: t.update({GATE: torch.ones(24, 32).int()})), "floating-point"),
    "8 bits": (
        lambda f: rewrite(f, lambda t: t.update({n: m.to(torch.float8_e5m2) for n, m in t.items()})),
        "of 16 bits or more",
    ),
    "not a number": (lambda f: rewrite(f, lambda t: t[GATE].fill_(torch.nan)), "not finite"),
    "shared experts too": (
        lambda f: reconfigure(f, shared_experts=True),
        "shared_experts: True.* rewrites shared experts",
    ),
    "the rest too": (
        lambda f: reconfigure(f, non_expert_modules=True),
        "non_expert_modules: True.* rewrites attention",
    ),
    "a flag in words": (lambda f: reconfigure(f, shared_experts="false"), "shared_experts: 'false'"),
    "no experts": (lambda f: reconfigure(f, experts={"1": []}), "lists no expert"),
    "an expert twice": (lambda f: reconfigure(f, experts={"1": [5, 5]}), "different experts"),
    "an expert as text": (lambda f: reconfigure(f, experts={"1": ["5"]}), "different experts"),
    "a layer twice": (lambda f: reconfigure(f, experts={"1": [5, 0], "01": [3]}), "is to map layers"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "experts are missing"),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "cut short",
    ),
    "no configuration": (lambda f: (f / "expert_cfg.json").unlink(), r"expert_cfg\.json cannot be read"),
    "no JSON": (lambda f: (f / "expert_cfg.json").write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    trained().save(tmp_path)
    spoil, message = DAMAGED[name]
    spoil(tmp_path)
    model = moe("deepseek_v2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        molex.esft.load(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_base_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    for overrides, message in (
        ({"moe_intermediate_size": 16}, r"from 32 to 24; here they are \(32, 16\): another base"),
        ({"n_routed_experts": 5}, "among them 5; this model has 5"),
        ({"first_k_dense_replace": 2}, "experts of layers.1.mlp.experts, not in this model"),
    ):
        with pytest.raises(TargetError, match=message):
            molex.esft.load(moe("deepseek_v2", **overrides), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[GATE].fill_(1e6))
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        molex.esft.load(moe("deepseek_v2").half(), tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        molex.esft.load(moe("deepseek_v2"), tmp_path / "nowhere")
