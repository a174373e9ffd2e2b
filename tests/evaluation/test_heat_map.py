"""Routing by label: against a loop over single texts, where there is no padding to leave out."""

import json
from pathlib import Path

import pytest
import torch

import molex
from molex.errors import ConfigError, TargetError
from molex.evaluation import figures
from molex.evaluation.heat_map import Measure, routing_by_label, routing_heat_map
from molex.evaluation.rows import labelled_texts, read_rows
from molex.mixture import Mixture
from molex.workbench import load_base, load_tokenizer
from tests.models import SMALL, mixture_of, wake_experts

TEXTS = ["upper: abc", "sort: hello there\n= ", "upper: a", "upper: abcdefgh\n= ABCDEFGH"]
LABELS = ["upper", "sort", "upper", "upper"]


def mixture_by(method: str, **overrides: object) -> Mixture:
    mixture = molex.convert(load_base(), molex.preset(method, **{**SMALL, **overrides}))
    wake_experts(mixture.model)
    return mixture


def naive(mixture: Mixture, label: str, measure: str) -> dict[str, list[float]]:
    """One text at a time, one token at a time, one slot at a time."""
    sums: dict[str, list[float]] = {}
    tokens = 0
    for text in [t for t, own in zip(TEXTS, LABELS, strict=True) if own == label]:
        ids = load_tokenizer()(text, return_tensors="pt")["input_ids"]
        tokens += ids.shape[1]
        with torch.no_grad():
            mixture.model(ids)
        for name, decision in mixture.state.trace.items():
            num_experts = mixture.layers[name].experts.num_experts
            if mixture.layers[name].plain or num_experts == 1:
                continue
            row = sums.setdefault(name, [0.0] * num_experts)
            heads = decision.routing.num_experts // num_experts
            for ids_K, weights_K in zip(decision.routing.expert_ids, decision.routing.weights, strict=True):
                for expert, weight in zip(ids_K.tolist(), weights_K.tolist(), strict=True):
                    if expert >= 0 and weight != 0:
                        row[expert % num_experts] += (weight if measure == "weight" else 1.0) / heads
    return {n: [v / (tokens if measure == "weight" else sum(row)) for v in row] for n, row in sums.items()}


@pytest.mark.parametrize("measure", ["load", "weight"])
@pytest.mark.parametrize(
    ("method", "overrides"),
    [("mola", {"allocation": (2, 2, 2, 2, 3, 3, 4, 4)}), ("mixlora", {}), ("mhr", {"num_tasks": 1})],
)
def test_equals_a_loop_over_single_texts(method: str, overrides: dict[str, object], measure: Measure) -> None:
    mixture = mixture_by(method, **overrides)
    mixture.model.train()
    with mixture.using(tasks=[0]):
        found = routing_by_label(mixture, load_tokenizer(), TEXTS, LABELS, measure, batch_size=2)
        assert mixture.model.training
        mixture.model.eval()
        assert list(found) == ["upper", "sort"]
        for label, panel in found.items():
            expected = naive(mixture, label, measure)
            assert list(panel) == list(expected)
            for name, values in panel.items():
                assert values.tolist() == pytest.approx(expected[name], abs=1e-5), (label, name)


def test_a_tokenizer_without_padding_will_do() -> None:
    mixture, tokenizer = mixture_by("mola"), load_tokenizer()
    padded = routing_by_label(mixture, tokenizer, TEXTS, LABELS)
    tokenizer.pad_token = None
    single = routing_by_label(mixture, tokenizer, TEXTS, LABELS)
    for label, panel in padded.items():
        for name, values in panel.items():
            assert values.tolist() == pytest.approx(single[label][name].tolist(), abs=1e-5)


def test_wrong_input_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, tokenizer = mixture_by("mola"), load_tokenizer()
    with pytest.raises(ConfigError, match="2 texts and 1 labels"):
        routing_by_label(mixture, tokenizer, ["a", "b"], ["x"])
    with pytest.raises(ConfigError, match="choose from 'load', 'weight'"):
        routing_by_label(mixture, tokenizer, ["a"], ["x"], "most")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no layer has more than one expert"):
        routing_by_label(mixture_by("lora", num_experts=1), tokenizer, ["a"], ["x"])
    with pytest.raises(TargetError, match="an encoder-decoder"):
        routing_by_label(mixture_of("t5", targets=("all",)), tokenizer, ["a"], ["x"])
    with pytest.raises(ConfigError, match="no routing to draw"):
        routing_heat_map({}, tmp_path / "map.png")
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'molex\[viz\]'"):
        routing_heat_map({"x": {"l": torch.ones(2)}}, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_the_picture_has_a_panel_for_each_label_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("molex.evaluation.heat_map.write_figure", lambda figure, path: drawn.append(figure))
    panels = {
        "law": {"m.0.q": torch.tensor([0.25, 0.75]), "m.1.q": torch.ones(3) / 3},
        "code": {"m.0.q": torch.ones(2)},
    }
    routing_heat_map(panels, tmp_path / "map.png", experts=["a", "b", "c"], title="who")
    law, code, _ = drawn[0].axes
    assert (law.get_title(), code.get_title()) == ("law", "code")
    assert [tick.get_text() for tick in law.get_xticklabels()] == ["a", "b", "c"]
    assert [tick.get_text() for tick in law.get_yticklabels()] == ["0.q", "1.q"]
    shown = law.images[0].get_array()
    assert shown[0, 1] == 0.75
    assert bool(shown.mask[0, 2]), "a layer of fewer experts is white there"
    assert bool(code.images[0].get_array().mask[1].all()), "so is a layer that a panel lacks"


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    routing_heat_map({"x": {"l": torch.rand(40)}}, tmp_path / "map.png", measure="load")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "task": 1}, {"text": "c", "task": "x"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_rows(tmp_path / "rows.json") == read_rows(tmp_path / "rows.jsonl") == rows
    assert labelled_texts(rows, "task") == (["ab", "c"], ["1", "x"])
    with pytest.raises(ConfigError, match="one has prompt, completion, task"):
        labelled_texts(rows, "skill")
    for content in ("[1]", "[]", "{", "3"):
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(ConfigError, match=r"rows\.json"):
            read_rows(tmp_path / "rows.json")
