"""The recipe and the command: a small mixture from nothing, adapters over a base, a saved mixture, files of tasks."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import molex
from molex import cli, workbench
from molex.errors import ConfigError
from molex.io.adapter import Adapter
from molex.io.peft import write_adapter
from recipes import composite_eval as recipe

SMALL = ["--counts", "2", "--num_prompts", "2", "--max_new_tokens", "8"]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["composite_eval.py", *arguments])
    recipe.main()


def test_without_a_mixture_a_small_one_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    skills = ["--skills", "upper", "ends", "--train_steps", "2", "--merge_rule", "linear"]
    run([*SMALL, *skills, "--out", str(out)], monkeypatch)
    scores = json.loads((out / "composite-2" / "scores.json").read_text())
    assert list(scores["lines"]) == ["base", "mixture", "merged"]
    assert scores["alone"].keys() == {"own expert, alone", "mixture, alone"}
    assert scores["attribution"]["weights"].keys() <= {"upper", "ends"}
    first = recipe.read_arguments([*SMALL, *skills, "--out", str(out)])
    assert recipe.read_arguments(["--config", str(out / "run.yaml")]) == first
    assert yaml.safe_load((out / "run.yaml").read_text())["counts"] == [2]


def test_adapters_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"inputs": f"[INST] upper: {text} [/INST]\n", "targets": [text.upper()]} for text in ("ab", "cd", "ef")]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lora = molex.LoRA(torch.randn(2, 128), torch.randn(128, 2), 1.0)
    for name in ("first", "second"):
        factors = {"model.layers.0.self_attn.q_proj": lora}
        write_adapter(Adapter(name=name, factors=factors), tmp_path / name)
    adapters = [f"{name}={tmp_path / name}" for name in ("first", "second")]
    asked = ["--files", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"), "--metrics", "one=contains"]
    own = ["--own", "one=first", "two=second", "--format", "meteora"]
    run([*SMALL, "--adapters", *adapters, *asked, *own, "--out", str(tmp_path / "out")], monkeypatch)
    folder = tmp_path / "out" / "composite-2"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["tasks"]["one"]["metric"] == "contains"
    assert scores["alone"]["own expert, alone"].keys() == {"one", "two"}
    prompt = json.loads((folder / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    assert prompt.startswith("[INST] upper: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixture", "there", "--adapters", "a=b"], "leave --model_name_or_path and --adapters out"),
        (["--model_name_or_path", "there"], "give some, or a --mixture"),
        (["--adapters", "there"], "--adapters there: write name=value"),
        (["--metrics", "sort=exact"], "--metrics names sort; the tasks are upper, ends, triple"),
        (["--skills", "double", "swap"], "cannot be learnt here"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run([*SMALL, *arguments, "--out", str(tmp_path / "out")], monkeypatch)
    assert not (tmp_path / "out").exists()


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = molex.convert(workbench.load_base(), molex.preset("mola", num_experts=2, rank=2))
    mixture.save(tmp_path / "mixture")
    asked = ["--composite", "2", "--tasks", "copy,double", "--limit", "2", "--out", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(sys, "argv", ["molex", "eval", str(tmp_path / "mixture"), *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["count"] == 2
    assert report["lines"]["base"]["attempted"]["value"] == 2
    assert (tmp_path / "out" / "composite-2" / "generations.jsonl").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--composite", "three"], "such as 3,5,10"),
        (["--composite", "3"], "no tasks"),
        (["--composite", "3", "--chat"], "leave --chat out"),
    ],
)
def test_the_command_refuses(
    asked: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["molex", "eval", str(tmp_path), *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
