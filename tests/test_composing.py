"""Adapters as experts: what PEFT computes with them, alone and in one batch; unlike ranks and targets; one more; back
into folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import molex
from molex.errors import CheckpointError, ConfigError, TargetError
from molex.io.adapter import Adapter
from molex.io.peft import read_adapter
from tests.io.mixtures import same, snapshot
from tests.io.peft_folders import write_peft
from tests.models import batch_for, tiny

# two adapters unlike in rank, alpha, scaling and targets
LAW: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
CODE: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 4,
    "use_rslora": True,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 3},
}
NAMES = ("law", "code")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "law": write_peft(tmp_path / "law", seed=1, **LAW),
        "code": write_peft(tmp_path / "code", seed=2, **CODE),
    }


def inputs(rows: int = 3) -> dict[str, Tensor]:
    ids_BS = batch_for(tiny("llama"), rows)["input_ids"]
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}


def peft_logits(folders: dict[str, Path], names: list[str]) -> Tensor:
    """PEFT's own batch of several adapters; "__base__" is none."""
    (first, path), *others = folders.items()
    model = PeftModel.from_pretrained(tiny("llama"), path, adapter_name=first).eval()
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    with torch.no_grad():
        return model(**inputs(), adapter_names=names).logits


@pytest.mark.parametrize("names", [["law"] * 3, ["code"] * 3, ["code", "__base__", "law"]])
def test_a_batch_of_adapters_equals_pefts(folders: dict[str, Path], names: list[str]) -> None:
    mixture = molex.from_peft(tiny("llama"), folders)
    with torch.no_grad(), mixture.using(adapters=[None if name == "__base__" else name for name in names]):
        ours = mixture.model(**inputs()).logits
    torch.testing.assert_close(ours, peft_logits(folders, names), rtol=1e-5, atol=1e-6)


def test_routing_over_unlike_adapters_is_the_sum_of_weighted_deltas(folders: dict[str, Path]) -> None:
    """Each layer's output against PEFT's deltas under the weights that the router gave."""
    mixture = molex.from_peft(tiny("llama"), folders)
    theirs = {name: PeftModel.from_pretrained(tiny("llama"), path) for name, path in folders.items()}
    x_TD = torch.randn(6, 32)
    name = "model.layers.1.self_attn.q_proj"
    layer = mixture.layers[name]
    with torch.no_grad():
        y_TO = layer(x_TD)
        gates_TE = mixture.state.trace[name].routing.gates()
        wanted_TO = layer.base(x_TD)
        for expert_id, expert in enumerate(NAMES):
            delta_OD = theirs[expert].base_model.model.get_submodule(name).get_delta_weight("default")
            wanted_TO = wanted_TO + gates_TE[:, expert_id : expert_id + 1] * (x_TD @ delta_OD.T)
    torch.testing.assert_close(y_TO, wanted_TO, rtol=1e-5, atol=1e-5)


def test_experts_keep_their_own_ranks_and_missing_layers_are_reported(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "molex"):
        mixture = molex.from_peft(tiny("llama"), folders)
    assert mixture.experts == ["law", "code"]
    assert mixture.layers["model.layers.0.self_attn.q_proj"].experts.ranks == (2, 5)
    assert mixture.layers["model.layers.1.self_attn.q_proj"].experts.ranks == (2, 3)
    assert mixture.layers["model.layers.0.mlp.up_proj"].experts.ranks == (2, 1)
    assert not mixture.layers["model.layers.0.mlp.up_proj"].experts.materialize(1).any()
    assert "expert 'code' has no 2 of 6 layers" in caplog.text
    assert mixture.config.targets == ("q_proj", "up_proj", "down_proj")


ROUTERS = ["meteora", "xlora", "lora-mixer", "arrow", "soft", "dynmole"]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_takes_them_and_comes_back_from_disk(
    router: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    mixture = molex.from_peft(tiny("llama"), folders, router=router)
    with torch.no_grad():
        wanted = mixture.model(**inputs()).logits
    mixture.save(tmp_path / "out")
    again = molex.load(tiny("llama"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.model(**inputs()).logits, wanted)
    assert again.origins == mixture.origins
    assert same(again.state_dict(), mixture.state_dict())


def test_a_configuration_of_ones_own_routes(folders: dict[str, Path]) -> None:
    config = molex.preset("meteora", top_k=1, temperature=3.0, train_experts=True)
    mixture = molex.from_peft(tiny("llama"), folders, router=config)
    assert (mixture.config.router.top_k, mixture.config.num_experts) == (1, 2)  # type: ignore[attr-defined]
    assert any(
        parameter.requires_grad for parameter in mixture.layers["model.layers.0.mlp.up_proj"].experts.parameters()
    )


def test_nobody_is_the_base(folders: dict[str, Path]) -> None:
    mixture = molex.from_peft(tiny("llama"), folders, nobody=True)
    assert mixture.experts == ["law", "code", "nobody"]
    with torch.no_grad(), mixture.using(adapters=["nobody"] * 3):
        assert torch.equal(mixture.model(**inputs()).logits, tiny("llama")(**inputs()).logits)


def test_arrow_needs_no_training_and_takes_unequal_ranks(folders: dict[str, Path]) -> None:
    mixture = molex.from_peft(tiny("llama"), folders, router="arrow")
    name = "model.layers.1.self_attn.q_proj"
    for expert_id, expert in enumerate(NAMES):
        delta_OD = PeftModel.from_pretrained(tiny("llama"), folders[expert]).base_model.model.get_submodule(name)
        top_D = torch.linalg.svd(delta_OD.get_delta_weight("default").double()).Vh[0]
        prototype_D: Any = mixture.layers[name].router.prototypes[expert_id]  # type: ignore[union-attr]
        assert abs(float(prototype_D.double() @ top_D)) == pytest.approx(1, abs=1e-5)
    routing = mixture.layers[name].router(torch.randn(4, 32), molex.RouteContext((1, 4)))  # type: ignore[misc]
    routing.check()
    up = mixture.layers["model.layers.0.mlp.up_proj"].router(torch.randn(4, 32), molex.RouteContext((1, 4)))  # type: ignore[misc]
    assert set(up.expert_ids.flatten().tolist()) <= {0, -1}, "an adapter without this layer was chosen in it"


@pytest.mark.parametrize("router", ["meteora", "xlora", "lora-mixer", "arrow", "soft"])
def test_one_more_expert_leaves_the_others_as_they_are(router: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_peft(tmp_path / "math", seed=3, r=3, target_modules=["down_proj"])
    mixture = molex.from_peft(tiny("llama"), folders, router=router)
    before = mixture.state_dict()
    mixture.add_expert(path, "math")
    assert mixture.experts == ["law", "code", "math"]
    with torch.no_grad(), mixture.using(adapters=["math", "law", "code"]):
        ours = mixture.model(**inputs()).logits
    torch.testing.assert_close(
        ours, peft_logits({**folders, "math": path}, ["math", "law", "code"]), rtol=1e-5, atol=1e-6
    )
    for name, tensor in mixture.state_dict().items():
        own = [slice(0, size) for size in before[name].shape]
        if name != "molex.router.head.0.weight" and name != "molex.router.head.0.bias":
            assert torch.equal(tensor[tuple(own)], before[name]), name
    with torch.no_grad():
        wanted = mixture.model(**inputs()).logits
    mixture.save(tmp_path / "out")
    again = molex.load(tiny("llama"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.model(**inputs()).logits, wanted)


def test_one_more_row_of_an_xlora_head_scores_zero_and_moves_no_other(folders: dict[str, Path], tmp_path: Path) -> None:
    config = molex.preset("xlora", layerwise=True, depth=2, hidden_size=8)
    mixture = molex.from_peft(tiny("llama"), folders, router=config)
    hidden_TD = torch.randn(5, 32)
    before = [routing.logits for routing in mixture.head.eval().decide(hidden_TD)]  # type: ignore[union-attr]
    mixture.add_expert(write_peft(tmp_path / "math", r=3), "math")
    after = [routing.logits for routing in mixture.head.eval().decide(hidden_TD)]  # type: ignore[union-attr]
    for old_TE, new_TE in zip(before, after, strict=True):
        torch.testing.assert_close(new_TE[:, :2], old_TE)
        assert not new_TE[:, 2].any()


def test_training_goes_on_after_one_more(folders: dict[str, Path], tmp_path: Path) -> None:
    mixture = molex.from_peft(tiny("llama"), folders)
    mixture.add_expert(write_peft(tmp_path / "math", r=3, target_modules=["down_proj"]), "math")
    frozen = snapshot(mixture.model)
    mixture.set_tasks([0, 1, 2])
    optimizer = torch.optim.SGD(mixture.trainable_parameters(), lr=0.5)
    batch = inputs()
    (mixture.model(**batch, labels=batch["input_ids"]).loss + mixture.aux_loss()).backward()
    optimizer.step()
    for name, tensor in mixture.model.state_dict().items():
        assert torch.equal(tensor, frozen[name]) == (".router." not in name), name


def test_adapters_may_be_called_by_numbers(folders: dict[str, Path]) -> None:
    mixture = molex.from_peft(tiny("llama"), {"1": folders["law"], "0": folders["code"]})
    assert mixture.experts == ["1", "0"]
    with torch.no_grad(), mixture.using(adapters=["0", None, "1"]):
        ours = mixture.model(**inputs()).logits
    torch.testing.assert_close(ours, peft_logits(folders, ["code", "__base__", "law"]), rtol=1e-5, atol=1e-6)


def test_a_head_that_ends_like_a_target_is_no_target(tmp_path: Path) -> None:
    """BERT's encoder and its head both have linears that end in `dense`."""
    folder = write_peft(tmp_path / "law", tiny("bert"), target_modules=["attention.output.dense"])
    mixture = molex.from_peft(tiny("bert"), {"law": folder}, router="soft")
    assert mixture.config.targets == tuple(f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2))


def test_one_more_where_counts_were_allocated_comes_back_from_disk(folders: dict[str, Path], tmp_path: Path) -> None:
    config = molex.preset("mola", num_experts=8, allocation=(3, 3), rank=2, targets=("q_proj", "up_proj"))
    mixture = molex.convert(tiny("llama"), config)
    mixture.add_expert(folders["law"], "law")
    mixture.save(tmp_path / "out")
    assert molex.load(tiny("llama"), tmp_path / "out").experts == ["0", "1", "2", "law"]


def test_one_more_after_growing_comes_back_from_disk(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "law", r=1)
    mixture = molex.from_peft(tiny("llama"), {"law": path, "code": path}, router="moram")
    mixture.grow(1)
    mixture.add_expert(path, "more")
    with torch.no_grad():
        wanted = mixture.model(**inputs()).logits
    mixture.save(tmp_path / "out")
    again = molex.load(tiny("llama"), tmp_path / "out")
    assert again.experts == ["law", "code", "2", "more"]
    with torch.no_grad():
        assert torch.equal(again.model(**inputs()).logits, wanted)


def test_growing_experts_of_unlike_alphas_is_refused(tmp_path: Path) -> None:
    paths = {name: write_peft(tmp_path / name, r=1, lora_alpha=alpha) for name, alpha in (("law", 1), ("code", 2))}
    mixture = molex.from_peft(tiny("llama"), paths, router="moram")
    with pytest.raises(ConfigError, match=r"experts here have alpha \(1.*, 2.*\), .* add_expert"):
        mixture.grow(2)
    assert mixture.experts == ["law", "code"]


def test_a_router_of_single_ranks_takes_no_wider_expert(tmp_path: Path) -> None:
    mixture = molex.from_peft(tiny("llama"), {"law": write_peft(tmp_path / "law", r=1)}, router="moram")
    before = snapshot(mixture.model)
    with pytest.raises(ConfigError, match="of single ranks; 'new' has rank 4"):
        mixture.add_expert(write_peft(tmp_path / "new"), "new")
    assert same(before, snapshot(mixture.model))


def test_one_more_without_the_head_of_the_others_is_refused(tmp_path: Path) -> None:
    folders = whole_adapters(tmp_path, (1, 1))
    mixture = molex.from_peft(tiny("llama", tie_word_embeddings=False), folders)
    with pytest.raises(CheckpointError, match="plain was trained without the lm_head that the experts here came with"):
        mixture.add_expert(write_peft(tmp_path / "plain", target_modules=["q_proj"]), "plain")
    mixture.add_expert(folders["a0"], "another")
    assert mixture.experts == ["a0", "a1", "another"]


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_text(name: Any, folders: dict[str, Path]) -> None:
    mixture = molex.from_peft(tiny("llama"), folders)
    for give in (lambda: mixture.add_expert(folders["law"], name), lambda: mixture.load_expert(0, name, {})):
        with pytest.raises(ConfigError, match="an expert's name is a text that is not empty"):
            give()
    with pytest.raises(ConfigError, match="an expert's name is a text that is not empty"):
        molex.from_peft(tiny("llama"), {name: folders["law"]})
    assert mixture.experts == ["law", "code"]


CANNOT_GROW: dict[str, tuple[str, type[Exception], str]] = {
    "a name twice": ("law", ConfigError, "there is an expert 'law' already"),
    "layers not routed": ("new", TargetError, "layers that are not routed here: model.layers.0.self_attn.v_proj"),
}


@pytest.mark.parametrize("case", CANNOT_GROW)
def test_one_more_that_cannot_be_changes_nothing(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name, kind, sentence = CANNOT_GROW[case]
    mixture = molex.from_peft(tiny("llama"), folders)
    before = snapshot(mixture.model)
    with pytest.raises(kind, match=sentence):
        mixture.add_expert(write_peft(tmp_path / "new", target_modules=["v_proj"]), name)
    assert same(before, snapshot(mixture.model))
    assert mixture.config.num_experts == 2


def test_a_router_for_so_many_takes_no_more(tmp_path: Path) -> None:
    config = molex.preset("mtlora", num_experts=3, rank=4, targets=("q_proj", "down_proj"))
    mixture = molex.convert(tiny("llama"), config.override({"router": "sigmoid", "top_k": 2}))
    before = snapshot(mixture.model)
    with pytest.raises(ConfigError, match="made for the experts it has"):
        mixture.add_expert(write_peft(tmp_path / "new"), "new")
    assert same(before, snapshot(mixture.model))


def test_export_gives_the_folders_back_bit_for_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    half = {
        name: tensor.bfloat16() for name, tensor in load_file(folders["code"] / "adapter_model.safetensors").items()
    }
    save_file(half, folders["code"] / "adapter_model.safetensors", metadata={"format": "pt"})
    mixture = molex.from_peft(tiny("llama"), folders, nobody=True)
    mixture.save(tmp_path / "mixture")
    for kind, source in {"living": mixture, "loaded": molex.load(tiny("llama"), tmp_path / "mixture")}.items():
        written = source.export_peft(tmp_path / kind)
        assert [path.name for path in written] == ["law", "code"]
        for path in written:
            assert (path / "adapter_model.safetensors").read_bytes() == (
                folders[path.name] / "adapter_model.safetensors"
            ).read_bytes()
            assert config_of(path) == config_of(folders[path.name])


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_trained_experts_are_exported_as_peft_loads_them(tmp_path: Path) -> None:
    config = molex.preset("mola", num_experts=2, allocation=None, rank=4, targets=("q_proj", "down_proj"))
    mixture = molex.convert(tiny("llama"), config)
    with torch.no_grad():
        for layer in mixture.layers.values():
            layer.experts.lora_B.normal_(std=0.3)  # type: ignore[operator, union-attr]
    paths = mixture.export_peft(tmp_path)
    with torch.no_grad(), mixture.using(adapters=["1", None, "0"]):
        ours = mixture.model(**inputs()).logits
    theirs = peft_logits({path.name: path for path in paths}, ["1", "__base__", "0"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["a/b", "../x", "..", ".", "/x", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_not_exported(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    mixture = molex.from_peft(tiny("llama"), {"law": folders["law"], name: folders["code"]})
    with pytest.raises(ConfigError, match="cannot be a folder of that name; give it another"):
        mixture.export_peft(tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    mixture.load_expert(1, "a.b", mixture.factors(1))
    assert [path.name for path in mixture.export_peft(tmp_path / "out")] == ["law", "a.b"]


def test_a_file_in_the_place_of_one_expert_stops_all(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "code").write_text("mine")
    with pytest.raises(CheckpointError, match="code is a file"):
        molex.from_peft(tiny("llama"), folders).export_peft(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["code"]


def test_an_expert_put_in_the_place_of_another_is_exported_as_itself(folders: dict[str, Path], tmp_path: Path) -> None:
    mixture = molex.from_peft(tiny("llama"), folders)
    factors = mixture.factors(0)
    mixture.load_expert(0, "law", {layer: lora._replace(scale=2 * lora.scale) for layer, lora in factors.items()})
    mixture.export_peft(tmp_path / "out")
    for layer, lora in read_adapter(tmp_path / "out" / "law").factors.items():
        assert lora.scale == pytest.approx(2 * factors[layer].scale)


def test_what_a_folder_said_goes_with_its_expert(folders: dict[str, Path]) -> None:
    mixture = molex.from_peft(tiny("llama"), folders)
    mixture.load_expert(0, "statute", mixture.factors(0))
    assert [*mixture.origins] == ["code"]


def test_experts_trained_after_import_keep_their_precision(folders: dict[str, Path], tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(folders["law"] / "adapter_model.safetensors").items()}
    save_file(half, folders["law"] / "adapter_model.safetensors")
    mixture = molex.from_peft(tiny("llama"), folders, router=molex.preset("meteora", train_experts=True))
    with torch.no_grad():
        for layer in mixture.layers.values():
            layer.experts.lora_A.mul_(1.001)  # type: ignore[operator, union-attr]
    mixture.export_peft(tmp_path / "out")
    wanted = mixture.factors(0)
    for layer, lora in read_adapter(tmp_path / "out" / "law").factors.items():
        assert torch.equal(lora.A.float(), wanted[layer].A)


def whole_adapters(tmp_path: Path, seeds: tuple[int, int]) -> dict[str, Path]:
    settings = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    model = lambda: tiny("llama", tie_word_embeddings=False)  # noqa: E731
    return {f"a{i}": write_peft(tmp_path / f"a{i}", model(), seed=seed, **settings) for i, seed in enumerate(seeds)}


def test_modules_that_all_adapters_replace_alike_are_kept(tmp_path: Path) -> None:
    folders = whole_adapters(tmp_path, (1, 1))
    mixture = molex.from_peft(tiny("llama", tie_word_embeddings=False), folders)
    theirs = PeftModel.from_pretrained(tiny("llama", tie_word_embeddings=False), folders["a0"]).eval()
    with torch.no_grad(), mixture.using(adapters="a0"):
        torch.testing.assert_close(mixture.model(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in mixture.model.lm_head.parameters())  # type: ignore[union-attr, operator]
    mixture.save(tmp_path / "out")
    again = molex.load(tiny("llama", tie_word_embeddings=False), tmp_path / "out")
    assert torch.equal(again.model.lm_head.weight, mixture.model.lm_head.weight)  # type: ignore[union-attr]
    for path in again.export_peft(tmp_path / "back"):
        assert same(
            load_file(path / "adapter_model.safetensors"), load_file(folders[path.name] / "adapter_model.safetensors")
        )


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "nothing": (lambda path: {}, ConfigError, "give a mapping of experts' names to folders"),
    "a path alone": (lambda path: str(path), ConfigError, "give a mapping of experts' names to folders"),
    "no folder": (lambda path: {"law": path / "absent"}, CheckpointError, "is no folder; give a folder that PEFT"),
    "a mixture's folder": (
        lambda path: {"law": mixture_folder(path)},
        CheckpointError,
        "adapter_config.json cannot be",
    ),
    "another architecture": (
        lambda path: {"gpt": write_peft(path / "gpt", tiny("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)},
        TargetError,
        "gpt changes transformer.h.0.attn.c_attn, .* not in this model",
    ),
    "another size": (
        lambda path: {"wide": write_peft(path / "wide", tiny("llama", intermediate_size=64))},
        TargetError,
        "is for a linear 64 -> 32, here it is .48, 32.: another base",
    ),
    "whole modules that differ": (
        lambda path: whole_adapters(path, (1, 2)),
        CheckpointError,
        "a0, a1 replace lm_head.weight, and not all of 2 adapters agree",
    ),
    "whole modules of one alone": (
        lambda path: {**whole_adapters(path, (1, 2)), "a1": write_peft(path / "plain")},
        CheckpointError,
        "a0 replace lm_head.weight, and not all of 2 adapters agree",
    ),
    "another vocabulary": (
        lambda path: {"v": write_peft(path / "v", tiny("llama", vocab_size=70), modules_to_save=["lm_head"])},
        CheckpointError,
        r"replace lm_head.weight by \(70, 32\), here it is \(64, 32\): resize",
    ),
    "float64": (
        lambda path: {"d": write_peft(path / "d", tiny("llama").double())},
        CheckpointError,
        "is torch.float64, experts here are torch.float32, which would round it",
    ),
}


def mixture_folder(path: Path) -> Path:
    molex.convert(tiny("llama"), molex.preset("lora")).save(path / "mixture")
    return path / "mixture"


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_leaves_the_model_alone(case: str, tmp_path: Path) -> None:
    make, kind, sentence = REFUSED[case]
    adapters, model = make(tmp_path), tiny("llama", tie_word_embeddings=False)
    before = snapshot(model)
    with pytest.raises(kind, match=sentence):
        molex.from_peft(model, adapters)
    assert same(before, snapshot(model))
    assert not hasattr(model, "molex_mixture")


def test_replaced_heads_of_tied_models_are_refused(tmp_path: Path) -> None:
    folders = whole_adapters(tmp_path, (1, 1))
    with pytest.raises(CheckpointError, match=r"this model ties to model\.embed_tokens\.weight: untie them first"):
        molex.from_peft(tiny("llama", tie_word_embeddings=True), folders)


@pytest.mark.parametrize("router", ["mos", "flylora", "poly", "no such", 3])
def test_routers_that_cannot_take_them(router: Any, folders: dict[str, Path]) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError):
        molex.from_peft(model, folders, router=router)
    assert not hasattr(model, "molex_mixture")


def test_an_adapter_in_memory_is_taken_as_well(folders: dict[str, Path]) -> None:
    adapter = Adapter(name="x", factors=read_adapter(folders["law"]).factors)
    mixture = molex.from_peft(tiny("llama"), {"law": adapter}, router="arrow")
    assert mixture.experts == ["law"]
    assert mixture.origins == {}
