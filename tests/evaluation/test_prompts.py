"""Tasks and composite prompts: files in every layout, the formats letter for letter, seeds, refusals."""

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from molex import workbench
from molex.errors import ConfigError
from molex.evaluation.composite.parsing import join_answers
from molex.evaluation.composite.prompts import CompositeSettings, compose, formats, write_prompts
from molex.evaluation.composite.tasks import Pair, Task, read_task
from molex.workbench.tasks import skill_tasks

TASKS = [
    Task(
        name=name,
        rows=tuple(Pair(f"{name} question {i}", f"{name} answer {i}") for i in range(20)),
        examples=tuple(Pair(f"{name} example {i}", f"{name} shown {i}") for i in range(4)),
    )
    for name in ("a", "b", "c", "d")
]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "[INST] why? [/INST]\n", "response": "so"}, "why?"),
        ({"prompt": "why?", "completion": "so"}, "why?"),
        ({"inputs": "why?", "targets": ["so", "thus"], "multiple_choice_targets": []}, "why?"),
        ({"question": "why?", "answer": "so"}, "why?"),
        ({"instruction": "ask", "input": "why?", "output": "so"}, "ask\nwhy?"),
        ({"instruction": "ask", "input": "", "output": "so"}, "ask"),
    ],
)
def test_columns_are_found(row: dict[str, Any], question: str, tmp_path: Path) -> None:
    path = tmp_path / "reasons.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    task = read_task(path, "contains", wrapped=formats["meteora"].alone)
    assert task == Task(name="reasons", rows=(Pair(question, "so"),) * 2, metric="contains")


def test_a_folder_is_a_task_with_examples(tmp_path: Path) -> None:
    folder = tmp_path / "winowhy"
    folder.mkdir()
    for split in ("test", "train"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "so"}))
    task = read_task(folder)
    assert (task.name, task.rows, task.examples) == ("winowhy", (Pair("test", "so"),), (Pair("train", "so"),))
    assert read_task(folder / "test.jsonl").name == "winowhy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "why?", "label": 1}', "line 1 has the columns prompt, label; rename them to one of: prompt"),
        ('{"question": "a", "answer": "b"}\n{"question"', "line 2 is no JSON"),
        ("[1]", "holds a list"),
        ('{"question": "why?", "answer": 7}', "answer is 7; give a text"),
        ('{"question": "why?", "answer": " "}', "1 blank answers"),
        ("", "no rows"),
    ],
)
def test_damaged_files_are_clear_errors(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_task(path)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a jsonl file"):
        read_task(tmp_path / "nothing.jsonl")


def test_the_numbered_format_is_the_workbenchs() -> None:
    """What the base was pretrained on."""
    drawn = [workbench.skills()[name] for name in ("upper", "ends", "triple")]
    row = workbench.numbered(drawn, Random(3), "test")
    again, questions, answers = Random(3), [], []
    for skill in drawn:
        text, answer = skill.sample(again, "test")
        questions.append(f"{skill.name}: {text}")
        answers.append(answer)
    assert formats["numbered"].ask(questions) == row["prompt"]
    assert join_answers(answers) == row["completion"]
    alone = formats["numbered"].alone.format(question=questions[0])
    assert alone == f"{questions[0]}\n= "


def test_the_meteora_format() -> None:
    worked = [[Pair("q1", "a1"), Pair("q2 {braces}", "a2")], [Pair("q3", "a3"), Pair("q4", "a4")]]
    assert formats["meteora"].ask(["one", "two"], worked) == (
        "\nExample 1:\n\n[INST] q1 [/INST]\n\n[INST] q2 {braces} [/INST]\n\n1. a1\n2. a2\n\n\n"
        "Example 2:\n\n[INST] q3 [/INST]\n\n[INST] q4 [/INST]\n\n1. a3\n2. a4\n\n\n"
        "Following the example above, generate answers to the questions below:\n\n"
        "[INST] one [/INST]\n\n\n[INST] two [/INST]\n\n"
    )


def test_prompts_depend_on_the_seed_alone() -> None:
    settings = CompositeSettings(num_prompts=6)
    prompts = compose(TASKS, 3, settings)
    assert prompts == compose(TASKS, 3, settings)
    assert prompts[:4] == compose(TASKS, 3, CompositeSettings(num_prompts=4))
    assert prompts != compose(TASKS, 3, CompositeSettings(num_prompts=6, seed=1))


def test_each_prompt_asks_different_tasks_and_no_question_twice() -> None:
    prompts = compose(TASKS, 3, CompositeSettings(num_prompts=20))
    assert all(len(set(prompt.tasks)) == 3 for prompt in prompts)
    assert len({prompt.tasks for prompt in prompts}) > 10
    asked = Counter(question for prompt in prompts for question in prompt.questions)
    assert set(asked.values()) == {1}
    for prompt in prompts:
        for task, question, answer in zip(prompt.tasks, prompt.questions, prompt.answers, strict=True):
            assert question.startswith(f"{task} question")
            assert answer == question.replace("question", "answer")


def test_given_order_and_repetition() -> None:
    given = compose(TASKS, 3, CompositeSettings(num_prompts=5, order="given"))
    assert {prompt.tasks for prompt in given} == {("a", "b", "c")}
    repeated = compose(TASKS, 7, CompositeSettings(num_prompts=5, repeat=True))
    assert all(len(prompt.tasks) == 7 for prompt in repeated)


def test_worked_examples_are_of_the_same_tasks_in_the_same_order() -> None:
    for prompt in compose(TASKS, 2, CompositeSettings(num_prompts=3, shots=2)):
        first, second = prompt.tasks
        worked = [[Pair(f"{task} example {i}", f"{task} shown {i}") for task in (first, second)] for i in range(2)]
        assert prompt.prompt == formats["numbered"].ask(prompt.questions, worked)
        assert prompt.prompt.startswith(f"1. {first} example 0\n2. {second} example 0\n= 1. {first} shown 0\n")


def test_saved_prompts_are_json_lines(tmp_path: Path) -> None:
    prompts = compose(TASKS, 2, CompositeSettings(num_prompts=3))
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt.prompt for prompt in prompts]
    assert [tuple(row["answers"]) for row in rows] == [prompt.answers for prompt in prompts]


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (5, {}, "composite-5 of 4 tasks; give at least 5"),
        (0, {}, "count=0"),
        (4, {"num_prompts": 21}, "has 20 questions, too few for 21 prompts"),
        (2, {"num_prompts": 2, "shots": 5}, "has 4 worked examples, 5 shots need 5"),
        (2, {"format": "numbred"}, "did you mean 'numbered'"),
        (2, {"order": "random"}, "order='random'"),
        (2, {"order": "given", "repeat": True}, "leave it out"),
        (2, {"num_prompts": 0}, "num_prompts=0"),
    ],
)
def test_what_cannot_be_asked_is_refused(count: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(TASKS, count, CompositeSettings(**settings))


def test_two_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="one name"):
        compose([TASKS[0], TASKS[0]], 2, CompositeSettings())


def test_skills_are_tasks() -> None:
    (task,) = skill_tasks(["upper"], 5, num_examples=2)
    skill = workbench.skills()["upper"]
    for split, pairs in (("test", task.rows), ("train", task.examples)):
        for question, answer in pairs:
            text = question.removeprefix("upper: ")
            assert (workbench.split_of("upper", text), answer) == (split, skill.answer(text))
    assert (len(task.rows), len(task.examples)) == (5, 2)
