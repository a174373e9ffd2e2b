"""The recipes: configs load, data in every format arrives, README commands run and leave a mixture that loads."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import molex
from molex import workbench
from molex.errors import ConfigError
from recipes import instruction_tuning as recipe
from tests.distributed.launch import run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "recipes" / "configs").glob("*.yaml") if not p.stem.startswith("merge_"))
COMMANDS = re.findall(
    r"^python (recipes/instruction_tuning\.py .*)$", (ROOT / "recipes" / "README.md").read_text(), re.M
)
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--skill_rows", "20", "--logging_steps", "1"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_read_and_makes_a_mixture(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    on_any_machine = ["--deepspeed", "", "--bf16", "false", "--output_dir", str(tmp_path)]
    mixed, _, training = recipe.read_arguments(["--config", str(path), *on_any_machine])
    mixture = molex.convert(workbench.load_base(), recipe.mixture_config(mixed))
    assert mixture.config.method == mixed.preset == path.stem.split("_")[0]
    assert training.learning_rate < 0.01
    named = re.search(r"^deepspeed: (.*)$", path.read_text(), re.M)
    if named:
        stage = json.loads((ROOT / named[1]).read_text())["zero_optimization"]["stage"]
        assert path.stem.endswith(f"zero{stage}")


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in _rows("alpaca")))
    workbench.load_base().save_pretrained(tmp_path / "model")
    workbench.load_tokenizer().save_pretrained(tmp_path / "model")
    given = command.replace("MODEL", str(tmp_path / "model")).replace("DATA.jsonl", str(tmp_path / "data.jsonl"))
    script, *arguments = shlex.split(given)
    arguments = [argument.replace("recipes/", f"{ROOT}/recipes/") for argument in arguments]
    out = tmp_path / "out"
    told = run([str(ROOT / script), *arguments, *SHORT, "--output_dir", str(out)], tmp_path, timeout=300)
    assert "answer:" in told
    assert "trainable" in told

    mixture = molex.load(workbench.load_base(), out)
    assert any(bool(tensor.any()) for name, tensor in mixture.state_dict().items() if name.endswith("lora_B"))
    again = recipe.read_arguments(["--config", str(out / "run.yaml")])
    first = recipe.read_arguments([*arguments, *SHORT, "--output_dir", str(out)])
    assert again[:2] == first[:2]
    assert again[2].to_dict() == first[2].to_dict()
    assert len(json.loads((out / "trainer_state.json").read_text())["log_history"]) >= 2


def test_readme_has_commands() -> None:
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("format", list(workbench.FORMATS))
def test_a_file_in_any_format_is_detected(format: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in _rows(format)))
    settings = recipe.DataSettings(
        dataset_name=str(path), dataset_train_split="train[:4]", dataset_test_split="train[4:]"
    )
    train_rows, eval_rows = recipe.load_data(settings, chat=True)
    assert (len(train_rows), len(eval_rows)) == (4, 2)
    ids = recipe.prompt_of(train_rows[0], workbench.load_tokenizer())
    text = workbench.load_tokenizer().decode(ids[0])
    assert "upper" in text
    assert format == "text" or _answer(_rows(format)[0]) not in text


def test_without_a_test_split_there_is_no_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(_rows("messages")))
    assert recipe.load_data(recipe.DataSettings(dataset_name=str(path)), chat=True)[1] is None


def test_flags_win_over_the_file_and_text_is_read_as_values() -> None:
    mixed = recipe.MixtureSettings(
        preset="mixlora", settings={"rank": 4, "balance_coefficient": "1e-2"}, set=["rank=2", "targets=ffn", "top_k=1"]
    )
    config = recipe.mixture_config(mixed)
    assert (config.rank, config.targets, config.router.top_k) == (2, ("ffn",), 1)
    assert config.losses[0].balance_coefficient == 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"set": ["topk=2"]}, "did you mean 'top_k'"),
        ({"set": ["top_k"]}, "name=value"),
        ({"preset": "mixlorra"}, "mixlora"),
        ({"preset": "arrow"}, "pretrained adapters"),
    ],
)
def test_wrong_settings_are_clear_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.mixture_config(recipe.MixtureSettings(**fields))


def test_unknown_names_in_a_file_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: lora\nnum_expert: 3\n")
    with pytest.raises(ValueError, match="num_expert"):
        recipe.read_arguments(["--config", str(path), "--output_dir", str(tmp_path)])


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(ConfigError, match="jsonl"):
        recipe.load_data(recipe.DataSettings(dataset_name=str(tmp_path / "rows.txt")), chat=False)


def test_the_base_comes_in_the_dtype_asked_for() -> None:
    assert recipe.load_model(recipe.MixtureSettings(dtype="bfloat16")).dtype == torch.bfloat16


def _rows(format: str) -> list[dict[str, Any]]:
    return workbench.dataset(["upper"], "train", 6, format=format)


def _answer(row: dict[str, Any]) -> str:
    return workbench.question_and_answer(row)[1]
