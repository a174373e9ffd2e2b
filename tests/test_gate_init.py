"""Rows of gates and heads set from prompts and from experts, against their definitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import molex
from molex.errors import ConfigError
from molex.gate_init import gates_from_experts, gates_from_prompts
from molex.mixture import Mixture
from molex.workbench import load_tokenizer
from tests.io.peft_folders import write_peft
from tests.models import tiny

PROMPTS = {"law": ["the court", "a judge rules"], "code": ["def f", "x = 1;"]}


def model() -> Any:
    return tiny("llama", vocab_size=264)


def mixture_of(tmp_path: Path, router: Any = "meteora") -> Mixture:
    settings = {"target_modules": ["q_proj", "down_proj"]}
    folders = {name: write_peft(tmp_path / name, model(), seed=seed, **settings) for seed, name in enumerate(PROMPTS)}
    return molex.from_peft(model(), folders, router=router)


def hidden(text: str, take: Callable[[Any], tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """One text alone through a plain base, without padding."""
    ids = load_tokenizer()([text], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return take(model()(ids, output_hidden_states=True))[0]


def cosine_rows(rows_ED: torch.Tensor, states: dict[str, list[torch.Tensor]]) -> None:
    """row_e is a positive multiple of μ_e − μ."""
    means = {name: torch.cat(parts).mean(0) for name, parts in states.items()}
    middle_D = torch.stack([*means.values()]).mean(0)
    for row_D, mean_D in zip(rows_ED, means.values(), strict=True):
        assert float(torch.cosine_similarity(row_D, mean_D - middle_D, dim=0)) == pytest.approx(1, abs=1e-4)


def test_a_gate_gets_the_direction_of_its_prompts(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path)
    gates_from_prompts(mixture, load_tokenizer(), PROMPTS)
    norm: Any = model().model.layers[1].input_layernorm
    states = {
        n: [norm(hidden(text, lambda out: out.hidden_states[1])) for text in texts] for n, texts in PROMPTS.items()
    }
    router: Any = mixture.layers["model.layers.1.self_attn.q_proj"].router
    cosine_rows(router.gate.weight, states)
    scores = torch.cat([part for parts in states.values() for part in parts]) @ router.gate.weight.T
    assert 0.3 < float(scores.std()) < 3


def test_an_xlora_head_gets_the_direction_in_the_last_hidden_states(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path, molex.preset("xlora", layerwise=True))
    gates_from_prompts(mixture, load_tokenizer(), PROMPTS)
    states = {n: [hidden(text, lambda out: out.hidden_states[-1]) for text in texts] for n, texts in PROMPTS.items()}
    rows_GED = mixture.head.rows()  # type: ignore[union-attr]
    assert rows_GED.shape == (4, 2, 32)
    for rows_ED in rows_GED:
        cosine_rows(rows_ED, states)


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
