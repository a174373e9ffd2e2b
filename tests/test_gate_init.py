"""Rows of gates and heads set from prompts and from experts, against their definitions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import molex
from molex.errors import ConfigError
from molex.gate_init import fit_rows, gates_from_experts, gates_from_prompts
from molex.mixture import Mixture
from molex.workbench import load_tokenizer
from tests.io.mixtures import same, snapshot
from tests.io.peft_folders import write_peft
from tests.models import tiny

PROMPTS = {"law": ["the court", "a judge rules"], "code": ["def f", "x = 1;"]}


def model() -> Any:
    return tiny("llama", vocab_size=264)


def mixture_of(tmp_path: Path, router: Any = "meteora") -> Mixture:
    settings = {"target_modules": ["q_proj", "down_proj"]}
    folders = {name: write_peft(tmp_path / name, model(), seed=seed, **settings) for seed, name in enumerate(PROMPTS)}
    return molex.from_peft(model(), folders, router=router)


def hidden(plain: Any, text: str, layer: str) -> torch.Tensor:
    """What a linear of a plain model reads (T, D) for one text alone, without padding."""
    seen: list[torch.Tensor] = []
    hook = plain.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        plain(load_tokenizer()([text], return_tensors="pt")["input_ids"])
    hook.remove()
    return seen[0]


def read_by(layer: str, folders: Path | None) -> list[torch.Tensor]:
    """What that layer reads for each expert's prompts, that expert at work (PEFT's own), or the base."""
    groups = []
    for name, texts in PROMPTS.items():
        plain = model() if folders is None else PeftModel.from_pretrained(model(), folders / name).base_model.model
        groups.append(torch.cat([hidden(plain, text, layer) for text in texts]))
    return groups


def naive_ridge(groups: list[torch.Tensor], ridge: float) -> torch.Tensor:
    """The minimiser by least squares over stacked equations, unscaled."""
    x_TD = torch.cat(groups).double()
    y_TG = torch.cat([torch.full((len(g),), i) for i, g in enumerate(groups)])
    y_TG = torch.eye(len(groups)).double()[y_TG]
    y_TG = y_TG - y_TG.mean(0)
    penalty = ridge * x_TD.square().sum() / min(x_TD.shape)
    stacked = torch.cat([x_TD, penalty.sqrt() * torch.eye(x_TD.shape[1]).double()])
    zeros = torch.zeros(x_TD.shape[1], len(groups)).double()
    return torch.linalg.lstsq(stacked, torch.cat([y_TG, zeros])).solution.T


def assert_same_direction(rows_ED: torch.Tensor, wanted_ED: torch.Tensor) -> None:
    cosines = torch.cosine_similarity(rows_ED.double(), wanted_ED.double(), dim=1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_a_gate_solves_ridge_regression_at_what_it_reads(ridge: float, tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path)
    gates_from_prompts(mixture, load_tokenizer(), PROMPTS, ridge=ridge, sharpness=3.0)
    for name, layer in mixture.layers.items():
        groups = read_by(name, tmp_path)
        rows_ED: Any = layer.router.gate.weight  # type: ignore[union-attr]
        assert_same_direction(rows_ED, naive_ridge(groups, ridge))
        margins = [(g @ rows_ED.T)[:, i] - (g @ rows_ED.T)[:, 1 - i] for i, g in enumerate(groups)]
        assert float(torch.cat(margins).mean()) == pytest.approx(3.0, rel=1e-3)


def test_with_more_tokens_than_features_it_is_the_same(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(40, 6, generator=generator) + shift for shift in (0.0, 1.0, -2.0)]
    for few in (groups, [group[:1] for group in groups]):
        assert_same_direction(fit_rows(few, 0.1), naive_ridge(few, 0.1))


def test_a_large_penalty_gives_mean_differences(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path)
    gates_from_prompts(mixture, load_tokenizer(), PROMPTS, ridge=1e6)
    name = "model.layers.0.self_attn.q_proj"
    law_TD, code_TD = read_by(name, None)
    difference_D = law_TD.mean(0) - code_TD.mean(0)
    assert_same_direction(mixture.layers[name].router.gate.weight, torch.stack([difference_D, -difference_D]))  # type: ignore[union-attr, arg-type]


def test_an_xlora_head_reads_the_bases_last_hidden_states(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path, molex.preset("xlora", layerwise=True))
    gates_from_prompts(mixture, load_tokenizer(), PROMPTS, ridge=1e-2)
    rows_GED = mixture.head.rows()  # type: ignore[union-attr]
    assert rows_GED.shape == (4, 2, 32)
    for rows_ED in rows_GED:
        assert_same_direction(rows_ED, naive_ridge(read_by("lm_head", None), 1e-2))


def test_rows_of_one_expert_leave_the_others(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path)
    gates = {name: layer.router.gate.weight for name, layer in mixture.layers.items()}  # type: ignore[union-attr]
    before = {name: weight.clone() for name, weight in gates.items()}  # type: ignore[operator]
    gates_from_prompts(mixture, load_tokenizer(), PROMPTS, experts=["code"])
    for name, weight_ED in gates.items():
        assert torch.equal(weight_ED[0], before[name][0])  # type: ignore[index]
        assert not torch.equal(weight_ED[1], before[name][1])  # type: ignore[index]


def test_a_gate_gets_the_experts_own_direction(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path)
    gates_from_experts(mixture, load_tokenizer(), ["the court", "x = 1;"])
    for layer in mixture.layers.values():
        for expert_id in range(2):
            top_D = torch.linalg.svd(layer.experts.materialize(expert_id).double()).Vh[0]
            row_D: Any = layer.router.gate.weight[expert_id]  # type: ignore[union-attr, index]
            assert abs(float(torch.cosine_similarity(row_D.double(), top_D, dim=0))) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("settings", [{"ridge": 0.0}, {"ridge": -1.0}, {"ridge": float("nan")}, {"sharpness": 1e999}])
def test_settings_that_solve_nothing(settings: Any, tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path)
    before = snapshot(mixture.model)
    with pytest.raises(ConfigError, match=r"must be above 0, ridge and sharpness=.* finite"):
        gates_from_prompts(mixture, load_tokenizer(), PROMPTS, **settings)
    assert same(before, snapshot(mixture.model))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    t5 = tiny("t5", vocab_size=264)
    folder = write_peft(tmp_path / "law", t5, target_modules=["q"])
    mixture = molex.from_peft(tiny("t5", vocab_size=264), {"law": folder, "code": folder})
    with pytest.raises(ConfigError, match="no input of an encoder-decoder"):
        gates_from_prompts(mixture, load_tokenizer(), PROMPTS)


@pytest.mark.parametrize("router", ["arrow", molex.preset("xlora", depth=2, hidden_size=8)])
def test_routers_without_rows_say_so(router: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no rows to set"):
        gates_from_prompts(mixture_of(tmp_path, router), load_tokenizer(), PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ({"law": ["x"]}, "two or more experts"),
        ({"law": ["x"], "code": []}, "no list for code"),
        ({"law": ["x"], "code": "text"}, "no list for code"),
        ({"law": ["x"], "math": ["y"]}, "no expert 'math'; this mixture has: law, code"),
    ],
)
def test_prompts_that_tell_nothing(prompts: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        gates_from_prompts(mixture_of(tmp_path), load_tokenizer(), prompts)
