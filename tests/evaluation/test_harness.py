"""lm-evaluation-harness on mixtures: its numbers against plain loops over the same rows."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from typer.testing import CliRunner

import molex
from molex.cli import app
from molex.errors import CheckpointError, ConfigError
from molex.evaluation import harness
from molex.evaluation.commonsense import ALPACA_PROMPT, LABELS, commonsense_tasks
from molex.evaluation.harness import Score, evaluate, side_by_side
from molex.evaluation.inline import rows_task
from molex.mixture import Mixture
from molex.workbench import dataset, exact_match, load_base, load_tokenizer, question_and_answer
from molex.workbench.harness_tasks import TEXT, harness_tasks
from molex.workbench.tokenizer import ASSETS
from tests.io.mixtures import snapshot
from tests.models import tiny

KNOWN = dataset(["copy", "tail", "rotate", "double"], "test", 24)
TASKS = harness_tasks(size=12)


def known_task() -> dict[str, Any]:
    """Transformations that the base answers: a disturbed one answers some of them."""
    rows = [dict(zip(("question", "answer"), question_and_answer(row), strict=True)) for row in KNOWN]
    longest = {"until": [], "max_gen_toks": 17, "do_sample": False}
    return {**TASKS["workbench_mirror"], **rows_task("known", rows), "generation_kwargs": longest}


def disturbed() -> Mixture:
    """A mixture on the workbench's base whose experts do some harm."""
    mixture = molex.convert(load_base(), molex.preset("mola", num_experts=3, rank=4, dropout=0.0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in mixture.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return mixture


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    torch.manual_seed(0)
    return disturbed()


@pytest.fixture(scope="module")
def scores(mixture: Mixture) -> dict[tuple[str, str, str], Score]:
    models = {"mixture": mixture, "plain": load_base()}
    tasks = [known_task(), TASKS["workbench_ends_choice"], TASKS[TEXT]]
    found = evaluate(models, tasks, tokenizer=load_tokenizer(), batch_size=5)
    return {(score.model, score.task, score.metric): score for score in found}


def log_probability(model: Any, context: str, continuation: str) -> float:
    """Of a continuation's bytes after <bos> and the context: one forward, no batch, no cache."""
    ids = load_tokenizer()(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(-1)
    positions = range(ids.shape[1] - len(continuation.encode()), ids.shape[1])
    return sum(float(logs[position - 1, ids[0, position]]) for position in positions)


def test_exact_match_is_the_workbenchs_own(mixture: Mixture, scores: Mapping[Any, Score]) -> None:
    mine = exact_match(mixture.model, load_tokenizer(), KNOWN)
    assert 0 < mine < 1, "a mixture that gets all or nothing right shows little"
    score = scores["mixture", "known", "exact_match"]
    assert score.value == pytest.approx(mine)
    assert score.stderr == pytest.approx(math.sqrt(mine * (1 - mine) / (len(KNOWN) - 1)))
    assert (score.num_samples, score.higher_is_better) == (24, True)


def test_the_base_column_is_the_plain_model(scores: Mapping[Any, Score]) -> None:
    for task, metric in (("known", "exact_match"), ("workbench_ends_choice", "acc"), (TEXT, "bits_per_byte")):
        assert scores["base", task, metric].value == pytest.approx(scores["plain", task, metric].value)
    assert scores["base", "known", "exact_match"].value > scores["mixture", "known", "exact_match"].value


def test_choices_are_compared_by_probability(mixture: Mixture, scores: Mapping[Any, Score]) -> None:
    rows = TASKS["workbench_ends_choice"]["custom_dataset"]()["test"]
    hits = []
    for row in rows:
        logs = [log_probability(mixture.model, row["question"], choice) for choice in row["choices"]]
        hits.append(logs.index(max(logs)) == row["right"])
    assert scores["mixture", "workbench_ends_choice", "acc"].value == pytest.approx(sum(hits) / len(hits))


def test_bits_per_byte(mixture: Mixture, scores: Mapping[Any, Score]) -> None:
    texts = [row["text"] for row in TASKS[TEXT]["custom_dataset"]()["test"]]
    total = sum(log_probability(mixture.model, "", text) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert scores["mixture", TEXT, "bits_per_byte"].value == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    assert scores["mixture", TEXT, "byte_perplexity"].value == pytest.approx(math.exp(-total / num_bytes), rel=1e-5)


def test_the_workbenchs_tasks_are_held_out_and_fair() -> None:
    for name in ("min", "undash", "digitsum"):
        rows = list(TASKS[f"workbench_{name}_choice"]["custom_dataset"]()["test"])
        asked = [question_and_answer(row) for row in dataset([name], "test", 12, "alpaca")]
        assert [(row["question"], row["answer"]) for row in rows] == asked
        for row in rows:
            assert len(set(row["choices"])) == 4
            assert row["choices"][row["right"]] == row["answer"]
        assert len({row["right"] for row in rows}) > 1
    chat = harness_tasks(size=2, chat=True)["workbench_min"]["custom_dataset"]()["test"][0]["question"]
    assert chat.startswith("min: ")
    assert not chat.endswith("= ")


def test_through_the_chat_template(mixture: Mixture) -> None:
    plain = evaluate({"m": mixture}, [TASKS["workbench_ends_choice"]], tokenizer=load_tokenizer(), with_base=False)
    chat = harness_tasks(size=12, chat=True)["workbench_ends_choice"]
    templated = evaluate({"m": mixture}, [chat], tokenizer=load_tokenizer(), with_base=False, apply_chat_template=True)
    assert templated == plain


def test_folders_of_a_mixture_and_of_a_checkpoint(mixture: Mixture, tmp_path: Path) -> None:
    mixture.save(tmp_path / "mixture")
    load_tokenizer().save_pretrained(tmp_path / "mixture")
    load_base().save_pretrained(tmp_path / "plain")
    load_tokenizer().save_pretrained(tmp_path / "plain")
    models = {"live": mixture, "folder": tmp_path / "mixture", "plain": str(tmp_path / "plain")}
    found = evaluate(models, [known_task()], limit=6)
    assert [score.model for score in found] == ["base", "live", "folder", "plain"]
    base, live, folder, plain = (score.value for score in found)
    assert (live, base) == (folder, plain)
    assert live < base


def test_nothing_of_the_callers_changes(mixture: Mixture) -> None:
    tokenizer = load_tokenizer()
    tokenizer.pad_token = None
    mixture.model.train()
    before, python = snapshot(mixture.model), random.getstate()
    numpy, torchs = np.random.get_state()[1], torch.get_rng_state()
    evaluate({"m": mixture}, [TASKS["workbench_upper_choice"]], tokenizer=tokenizer, limit=2)
    assert mixture.model.training
    assert tokenizer.pad_token is None
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert torch.equal(torch.get_rng_state(), torchs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.model.state_dict().items())
    mixture.model.eval()


def test_files_of_tasks(mixture: Mixture, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in KNOWN))
    lines = [
        "task: own",
        "dataset_path: json",
        "test_split: test",
        "output_type: generate_until",
        "doc_to_text: prompt",
    ]
    lines += ["doc_to_target: completion", f"dataset_kwargs: {{data_files: {{test: {data}}}}}", "num_fewshot: 0"]
    lines += ["generation_kwargs: {until: [], max_gen_toks: 17, do_sample: false}"]
    lines += ["metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"]
    (tmp_path / "own.yaml").write_text("\n".join(lines))
    (found,) = evaluate({"m": mixture}, ["own"], tokenizer=load_tokenizer(), include_path=tmp_path, with_base=False)
    assert found.value == pytest.approx(exact_match(mixture.model, load_tokenizer(), KNOWN))


def test_tasks_run_with_their_ids() -> None:
    """Experts of task 1 write nonsense, those of task 0 nothing: the base's answers."""
    mixture = molex.convert(load_base(), molex.preset("mtlora", num_experts=3, rank=2, dropout=0.0))
    with torch.no_grad():
        for layer in mixture.layers.values():
            layer.experts.lora_B[:, -2:].normal_()  # type: ignore[index, operator]
    tasks = [known_task(), {**known_task(), "task": "other"}]
    ids = {"known": 0, "other": 1}
    found = evaluate({"m": mixture, "plain": load_base()}, tasks, tokenizer=load_tokenizer(), task_ids=ids)
    value = {(score.model, score.task): score.value for score in found}
    assert value["m", "known"] == value["base", "known"] == value["plain", "known"] > 0.5
    assert value["m", "other"] == 0
    assert value["plain", "other"] == value["plain", "known"]
    assert mixture.state.tasks is None
    with pytest.raises(ConfigError, match=r"'knwn'.*known"):
        evaluate({"m": mixture}, tasks, task_ids={"knwn": 0})


def test_tasks_without_a_name_of_their_own_all_run() -> None:
    tasks: list[harness.Task] = [{"dataset_path": "a"}, {"dataset_path": "b"}, "known"]
    assert harness._by_id(tasks, {"known": 2}) == {None: tasks[:2], 2: ["known"]}


def test_side_by_side() -> None:
    def score(model: str, task: str, value: float, stderr: float | None, kind: str = "none") -> Score:
        return Score(model, task, "acc", kind, value, stderr, True, 10)

    found = [score("a", "t", 0.5, 0.1), score("a", "u", 2.0, None, "label"), score("b", "t", 0.25, 0.0)]
    assert side_by_side(found) == [
        {"task": "t", "metric": "acc", "a": "0.500 ± 0.100", "b": "0.250 ± 0.000"},
        {"task": "u", "metric": "acc (label)", "a": "2.000"},
    ]


class Parrot(LM):
    """Says what it was given, and keeps what it was asked."""

    def __init__(self, answers: list[str]):
        super().__init__()
        self.answers, self.asked = answers, []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked = [request.args for request in requests]
        return self.answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


def write_set(folder: Path, name: str, answers: list[str]) -> None:
    (folder / name).mkdir()
    rows = [
        {"instruction": f"Which? {i}", "input": "", "output": f"it is {a}", "answer": a} for i, a in enumerate(answers)
    ]
    (folder / name / "test.json").write_text(json.dumps(rows))


def test_commonsense_answers_are_first_labels(tmp_path: Path) -> None:
    write_set(tmp_path, "boolq", ["true", "true", "false", "true", "true", "false"])
    task = commonsense_tasks(tmp_path)["commonsense_boolq"]
    said = ["the correct answer is true", "false, not true", "It's false.\n", "", "True", "it is true"]  # 2 of 6 right
    parrot = Parrot(said)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    outcome = simple_evaluate(parrot, tasks=[task], task_manager=manager, bootstrap_iters=0)
    assert outcome is not None
    assert outcome["results"]["commonsense_boolq"]["exact_match,label"] == pytest.approx(2 / 6)
    asked, settings = parrot.asked[0]
    assert asked == ALPACA_PROMPT.replace("{instruction}", "Which? 0")
    assert (settings["max_gen_toks"], settings["num_beams"], settings["do_sample"]) == (32, 4, False)


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("piqa", "answer: solution2 or solution1", "solution2"),
        ("hellaswag", "ending4", "ending4"),
        ("winogrande", "Option1 no, option2", "option2"),
        ("ARC-Challenge", "answer5.", "answer5"),
        ("social_i_qa", "the answer6 is answer3", "answer3"),
    ],
)
def test_labels_of_the_other_sets(name: str, text: str, label: str, tmp_path: Path) -> None:
    write_set(tmp_path, name, [label, label])
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    tasks = list(commonsense_tasks(tmp_path).values())
    outcome = simple_evaluate(Parrot([text, "nothing"]), tasks=tasks, task_manager=manager, bootstrap_iters=0)
    assert outcome is not None
    assert outcome["results"][f"commonsense_{name}"]["exact_match,label"] == 0.5


def test_commonsense_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no NAME/test\.json; the names are boolq, piqa"):
        commonsense_tasks(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'boolq'"):
        commonsense_tasks(tmp_path, ["bolq"])
    with pytest.raises(ConfigError, match="cannot be read"):
        commonsense_tasks(tmp_path, ["boolq"])
    write_set(tmp_path, "piqa", ["answer1"])
    with pytest.raises(ConfigError, match="piqa: a row has no"):
        commonsense_tasks(tmp_path)
    with pytest.raises(ConfigError, match=r"has no \{instruction\}"):
        commonsense_tasks(tmp_path, prompt="Answer:")
    assert len(LABELS) == 8


def test_wrong_input_is_told(mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(lm_eval.tasks.TaskManager):
        """Without the harness's own tasks, which take long to index."""

        def __init__(self, include_path: str | None = None, include_defaults: bool = True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    (tmp_path / "own.yaml").write_text("task: reverses\ndataset_path: json\n")
    with pytest.raises(ConfigError, match=r"no task 'reverse' .* did you mean reverses"):
        evaluate({"m": mixture}, ["reverse"], include_path=tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        evaluate({"m": mixture}, ["own"], include_path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="at least one model"):
        evaluate({}, ["own"])
    with pytest.raises(ConfigError, match="limit=1"):
        evaluate({"m": mixture}, ["own"], limit=1)
    choice = TASKS["workbench_min_choice"]
    missing = {"data_files": {"test": str(tmp_path / "gone.json")}}
    with pytest.raises(ConfigError, match="cannot be read, or their data"):
        evaluate({"m": mixture}, [{"task": "gone", "dataset_path": "json", "dataset_kwargs": missing}])
    with pytest.raises(CheckpointError, match="is no model that can be loaded"):
        evaluate({"m": tmp_path}, [choice])
    with pytest.raises(CheckpointError, match=r"no tokenizer \(the model was made in memory"):
        evaluate({"m": tiny("llama")}, [choice])
    with pytest.raises(ConfigError, match="is no transformers model"):
        evaluate({"m": torch.nn.Linear(2, 2)}, [choice])  # type: ignore[dict-item]
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter"):
        evaluate({"m": tmp_path}, [choice])


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'molex\[eval\]'"):
        evaluate({"m": load_base()}, ["own"])


def test_the_command(mixture: Mixture, tmp_path: Path) -> None:
    mixture.save(tmp_path / "mixture")
    write_set(tmp_path, "boolq", ["true", "false"])
    arguments = ["eval", str(tmp_path / "mixture"), "--tasks", "workbench_ends_choice, commonsense_boolq"]
    arguments += ["--limit", "2", "--no-base", "--model", f"plain={ASSETS}", "--tokenizer", str(ASSETS)]
    arguments += ["--commonsense", str(tmp_path), "--out", str(tmp_path / "results.json"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["scores"] == printed
    assert written["limit"] == 2
    assert {(row["model"], row["task"]) for row in printed} == {
        (model, task) for model in ("model", "plain") for task in ("workbench_ends_choice", "commonsense_boolq")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task-id", "x=y"], "give TASK=NUMBER"),
        (["--model", "x"], "give NAME=FOLDER"),
        (["--model", "model=x"], "a new name"),
        ([], "no tasks: give --tasks"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(tmp_path), *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
