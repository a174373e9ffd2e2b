"""Whole evaluations: the workbench's base on what it knows, mixtures whose answers are known, files, refusals."""

import json
from pathlib import Path

import pytest
import torch

import molex
from molex import workbench
from molex.errors import ConfigError
from molex.evaluation.composite import (
    CompositeSettings,
    Pair,
    Task,
    attribution_rows,
    evaluate,
    score_rows,
    write_report,
)
from molex.evaluation.composite.generation import Asker
from molex.mixture import Mixture
from molex.workbench.tasks import skill_tasks
from tests.models import tiny

TOKENIZER = workbench.load_tokenizer()


@pytest.fixture(scope="module")
def known() -> list[str]:
    """Three of the base's own transformations that it answers well."""
    return list(workbench.transformations())[:4]


def test_the_base_knows_its_own_transformations() -> None:
    """Its pretraining measured 98% of answers right in prompts of three: far from chance, and from a lost label."""
    tasks = skill_tasks(list(workbench.transformations()), 20)
    settings = CompositeSettings(num_prompts=20, batch_size=20)
    (report,) = evaluate(workbench.load_base(), TOKENIZER, tasks, (3,), settings)
    base = report.lines["base"]
    assert list(report.lines) == ["base"]
    assert base.attempted.value == 3
    assert base.correct.value > 2.7
    assert (report.attribution, report.alone) == (None, {})


def test_experts_that_add_nothing_answer_as_the_base(known: list[str]) -> None:
    """Every line is the base's, in prompts and alone; a mixture of any routing has one attribution a task."""
    tasks = skill_tasks(known, 4)
    mixture = _mixture(known)
    asked: list[str] = []
    settings = CompositeSettings(num_prompts=4, max_new_tokens=60)
    reports = evaluate(mixture, TOKENIZER, tasks, (2, 4), settings, merged=workbench.load_base(), on_part=asked.append)
    for report in reports:
        assert report.lines["mixture"] == report.lines["base"] == report.lines["merged"]
        assert report.generations["mixture"] == report.generations["base"] == report.generations["merged"]
        assert report.alone["own expert, alone"] == report.alone["mixture, alone"]
        assert report.attribution is not None
        for weights in report.attribution.weights.values():
            assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
        assert set(report.attribution.own) == {task for prompt in report.prompts for task in prompt.tasks}
    assert asked[:2] == ["composite-2: base", "composite-2: mixture"]


def test_each_line_is_who_it_says(known: list[str]) -> None:
    """One expert silences the model and is at work for all in the mixture: the base answers, the others do not, except
    a task's own harmless expert alone."""
    mixture = _mixture(known)
    loud = {
        name: molex.LoRA(torch.ones(2, layer.in_features), 9 * torch.ones(layer.out_features, 2), 1.0)
        for name, layer in mixture.layers.items()
    }
    mixture.load_expert(0, known[0], loud)
    (report,) = evaluate(
        mixture, TOKENIZER, skill_tasks(known, 4), (4,), CompositeSettings(num_prompts=4, max_new_tokens=60)
    )
    assert report.lines["base"].correct.value > 3
    assert report.lines["mixture"].correct.value == 0
    own = report.alone["own expert, alone"]
    assert own[known[0]].value == 0
    assert min(own[name].value for name in known[1:]) > 0.6
    assert max(score.value for score in report.alone["mixture, alone"].values()) == 0


def test_batches_change_nothing(known: list[str]) -> None:
    tasks = skill_tasks(known, 5)
    lines = [
        evaluate(workbench.load_base(), TOKENIZER, tasks, (3,), CompositeSettings(num_prompts=5, batch_size=size))[0]
        for size in (1, 2, 5)
    ]
    assert lines[0].generations == lines[1].generations == lines[2].generations


def test_worked_examples_are_asked_in_one_prompt(known: list[str]) -> None:
    """The base never saw examples in its pretraining; what counts is that prompts with them run and are cut."""
    tasks = skill_tasks(known, 3, num_examples=2)
    (report,) = evaluate(
        workbench.load_base(), TOKENIZER, tasks, (2,), CompositeSettings(num_prompts=3, shots=1, max_new_tokens=20)
    )
    assert all(prompt.prompt.count("\n= ") == 2 for prompt in report.prompts)
    assert all("\n\n\n" not in text for text in report.generations["base"])


def test_reports_are_written_whole(known: list[str], tmp_path: Path) -> None:
    tasks, settings = skill_tasks(known, 4), CompositeSettings(num_prompts=4)
    (report,) = evaluate(_mixture(known), TOKENIZER, tasks, (3,), settings)
    folder = write_report(report, tasks, settings, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["generations.jsonl", "prompts.jsonl", "scores.json"]
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["count"] == 3
    assert scores["lines"]["base"]["attempted"] == {"value": 3.0, "error": 0.0}
    assert scores["lines"]["mixture"]["by_task"].keys() == report.lines["mixture"].by_task.keys()
    assert scores["attribution"]["own_overall"]["value"] == report.attribution.own_overall.value  # type: ignore[union-attr]
    assert scores["settings"]["num_prompts"] == 4
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert [row["mixture"] for row in rows] == report.generations["mixture"]
    table = {row[""]: row for row in score_rows(report)}
    assert list(table) == ["attempted", "right", "all right", *report.lines["base"].by_task]
    assert list(table["attempted"])[1:] == ["base", "mixture", "own expert, alone", "mixture, alone"]
    assert (table["attempted"]["base"], table["attempted"]["mixture, alone"]) == ("3.00 ±0.00", "")
    assert all(table[task]["mixture, alone"] for task in report.lines["base"].by_task)
    assert attribution_rows(report)[-1]["task"] == "all"


def test_a_generation_ends_where_the_format_says() -> None:
    """Neither what the model goes on to write nor the end of sequence belongs to it."""
    prompt = "1. double: abc\n2. double: xyz\n= "
    (whole,) = Asker(tokenizer=TOKENIZER).ask(workbench.load_base(), [prompt], 30)
    (cut,) = Asker(tokenizer=TOKENIZER, ends=("\n2",)).ask(workbench.load_base(), [prompt], 30)
    first, second = whole.text.split("\n")
    assert (cut.text, first[:3], second[:3]) == (first, "1. ", "2. ")


def test_a_model_in_training_stays_so(known: list[str]) -> None:
    model = workbench.load_base().train()
    evaluate(model, TOKENIZER, skill_tasks(known, 1), (2,), CompositeSettings(num_prompts=1))
    assert all(module.training for module in model.modules())


def test_too_long_a_prompt_is_refused() -> None:
    task = Task(name="long", rows=(Pair("x" * 1020, "y"),))
    with pytest.raises(ConfigError, match="context of 1024; ask fewer"):
        evaluate(workbench.load_base(), TOKENIZER, [task], (1,), CompositeSettings(num_prompts=1))


def test_an_unknown_own_expert_is_refused(known: list[str]) -> None:
    with pytest.raises(ConfigError, match="names nobody"):
        evaluate(_mixture(known), TOKENIZER, skill_tasks(known, 1), (1,), own={known[0]: "nobody"})


def test_no_counts_are_refused(known: list[str]) -> None:
    with pytest.raises(ConfigError, match="counts is empty"):
        evaluate(workbench.load_base(), TOKENIZER, skill_tasks(known, 1), ())


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="no causal language model"):
        Asker(tokenizer=TOKENIZER).ask(tiny("t5"), ["a"], 4)


def test_forwards_that_make_no_token_are_refused(known: list[str]) -> None:
    """A prompt read in pieces takes more forwards than tokens: who made which would be a guess."""
    mixture = _mixture(known)
    mixture.model.generation_config.prefill_chunk_size = 8  # type: ignore[union-attr]
    with pytest.raises(molex.MolexError, match="prefill_chunk_size"):
        Asker(tokenizer=TOKENIZER).ask(mixture.model, ["1. double: abcdefghijkl\n= "], 4, mixture)


def _mixture(experts: list[str]) -> Mixture:
    """A routed mixture over the base whose experts, named, add nothing yet."""
    config = molex.preset("mola", num_experts=len(experts), rank=2, dropout=0.0)
    mixture = molex.convert(workbench.load_base().eval(), config)
    for expert_id, name in enumerate(experts):
        zero = {layer_name: layer.zero_expert(expert_id) for layer_name, layer in mixture.layers.items()}
        mixture.load_expert(expert_id, name, zero)
    return mixture
