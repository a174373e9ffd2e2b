"""The instruction tuning recipe on two processes, by the commands of recipes/README.md: what one process gets."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import molex
from molex import workbench
from tests.distributed.launch import HERE, run

ROOT = HERE.parents[1]
COMMANDS = re.findall(r"^torchrun --nproc_per_node 2 (.*)$", (ROOT / "recipes" / "README.md").read_text(), re.M)
GLOBAL_BATCH = 4
SHORT = "--max_steps 3 --skill_rows 20 --logging_steps 1 --save_strategy no --learning_rate 1e-2"
SETTINGS = "--set num_experts=2 top_k=1 rank=4 dropout=0 balance_coefficient=0.1"

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install -c constraints.txt -e '.[dev,scale]'",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return _run("recipes/instruction_tuning.py --preset mixlora", 1, tmp_path_factory.mktemp("alone"))


STRATEGIES = [
    *(pytest.param(command, id=command[-10:-5], marks=needs_deepspeed) for command in COMMANDS),
    pytest.param("recipes/instruction_tuning.py --preset mixlora --use_cpu true", id="ddp"),
]


def test_processes_that_would_train_alone_are_refused(tmp_path: Path) -> None:
    """Where accelerate finds no GPU and is not told of the CPU, each process would go its own way."""
    with pytest.raises(AssertionError, match="2 processes run, and accelerate has each of them train alone"):
        _run("recipes/instruction_tuning.py --preset mixlora", 2, tmp_path)


@pytest.mark.parametrize("command", STRATEGIES)
def test_losses_are_those_of_one_process(command: str, alone: list[dict[str, float]], tmp_path: Path) -> None:
    logs = _run(command, 2, tmp_path)
    assert len(logs) == len(alone) == 3
    for ours, theirs in zip(logs, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["routing/entropy"] == pytest.approx(theirs["routing/entropy"], rel=1e-4)
    assert logs[0]["loss"] != pytest.approx(logs[-1]["loss"], rel=1e-3)
    assert molex.load(workbench.load_base(), tmp_path / "out").config.method == "mixlora"


def _run(command: str, num_processes: int, folder: Path) -> list[dict[str, float]]:
    """Runs it over gloo and returns what was logged at each step."""
    script, *arguments = shlex.split(f"{command} {SETTINGS} {SHORT}")
    arguments = [argument.replace("recipes/", f"{ROOT}/recipes/") for argument in arguments]
    arguments += ["--per_device_train_batch_size", str(GLOBAL_BATCH // num_processes), "--output_dir", f"{folder}/out"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    run([*launcher, str(HERE / "on_gloo.py"), str(ROOT / script), *arguments], folder, timeout=300)
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
