"""Every command of docs/serving.md, as a new user runs it: two servers, and what curl asks them."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.serve.adapters_of import save_workbench

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
DEMO, MODEL = re.findall(r"^molex (serve .*)$", PAGE, re.M)
ADDRESS = "http://127.0.0.1:8000"
SECONDS = 300


@contextmanager
def running(command: str, folder: Path) -> Iterator[str]:
    """Its address, once it says so. It must end by SIGTERM."""
    arguments = [sys.executable, "-m", "molex", *shlex.split(command), "--port", "0"]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "serving" in line:
                break
        found = re.search(r"on (http://\S+)", lines[-1] if lines else "")
        assert found, f"{lines} {log.read_text()}"
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM), log.read_text()
    finally:
        process.kill()
        process.wait()


def test_the_demo_answers_curl(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    commands = re.findall(r"^(curl .*)$", PAGE, re.M)
    assert len(commands) == 5
    with running(DEMO, tmp_path) as address:
        answers = []
        for command in commands:
            assert ADDRESS in command
            arguments = [*shlex.split(command.replace(ADDRESS, address)), "--silent", "--fail-with-body"]
            asked = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS)
            assert asked.returncode == 0, asked.stdout
            answers.append(asked.stdout)
    models, upper, mixture, stream, metrics = answers
    assert {model["id"] for model in json.loads(models)["data"]} == {
        *("base", "upper", "reverse", "vowels", "mixture", "blend")
    }
    assert json.loads(upper)["choices"][0]["text"].strip() == "HELLO"
    experts = json.loads(mixture)["choices"][0]["experts"]
    assert {expert["name"] for expert in experts} == {"upper"}
    events = [event.removeprefix("data: ") for event in stream.strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    assert {choice["index"] for event in events[:-1] for choice in json.loads(event)["choices"]} == {0, 1, 2, 3}
    assert 'molex_new_tokens_total{adapter="upper"}' in metrics


def test_a_model_and_its_adapters(tmp_path: Path) -> None:
    save_workbench(tmp_path)
    with running(MODEL, tmp_path) as address:
        for name in ("base", "law", "code", "both"):
            asked = {"model": name, "prompt": "hello", "max_tokens": 4}
            answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=SECONDS)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] >= 1


def test_the_command_says_what_it_needs() -> None:
    for arguments in ([], ["--model", "x", "--demo"]):
        run = subprocess.run(
            [sys.executable, "-m", "molex", "serve", *arguments], capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 1
        assert "give a base with --model, or --demo" in run.stderr
