"""A whole server and what befalls it: clients that leave, folders that change under it, places that run out, SIGTERM.

Whatever happens to one request, all others get their adapter's own tokens, and in the end nothing is held.
"""

import json
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from molex_serve.settings import AdapterLimits
from tests.esft.models import moe
from tests.models import tiny
from tests.serve.adapters_of import own_model, save_lora, save_mixture, save_workbench
from tests.serve.assembled import Whole, expected_text, serving
from tests.serve.engine.conftest import little_garbage  # noqa: F401 (a fixture)
from tests.serve.engine.serving import prompt
from tests.serve.expert_swaps import save_swap
from tests.serve.http.conftest import wait_for

NAMES = ("law", "code", "poem")
IDS = prompt(9)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LONG = 50  # new tokens of an answer during which something happens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name in NAMES:
        save_lora(name, tiny("llama"), folder)
    save_mixture("mola", tiny("llama"), folder)
    return folder


@pytest.fixture(scope="module")
def truth(folders: Path) -> dict[str, str]:
    found = {name: expected_text(own_model(name, folders), IDS, LONG) for name in ("base", *NAMES, "mola")}
    assert len({*found.values()}) == len(found)
    return found


@pytest.fixture
def root(folders: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(folders, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def server(root: Path) -> Iterator[Whole]:
    """With places for two adapters; at the end nothing may be held."""
    with serving(tiny("llama"), root, {name: root / name for name in NAMES}, limits=AdapterLimits(resident=2)) as made:
        yield made
        made.wait_until_idle()


class Stream:
    """An answer of one adapter that is being read; closed, its client is gone."""

    def __init__(self, server: Whole, name: str, **body: Any):
        asked = {"model": name, "prompt": [*IDS], "max_tokens": LONG, "temperature": 0, "stream": True, **body}
        request = server.http.build_request("POST", "/v1/completions", json=asked)
        self.answer = server.http.send(request, stream=True)
        self.lines = (line.removeprefix("data: ") for line in self.answer.iter_lines() if line)
        self.first = next(self.lines)

    def rest(self) -> str:
        *events, done = [self.first, *self.lines]
        assert done == "[DONE]"
        return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])

    def close(self) -> None:
        self.answer.close()


def hang_up(server: Whole, **body: Any) -> None:
    """Asks, and is gone while the answer is made."""
    asked = {"model": "law", "prompt": [*IDS], "max_tokens": LONG, "temperature": 0, **body}
    text = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    with socket.create_connection(server.server.address, timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + text)
        wait_for(lambda: server.assembly.engine.stats().running)


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}], ids=str)
def test_clients_that_leave(body: dict[str, Any], server: Whole, truth: dict[str, str]) -> None:
    steps = server.assembly.engine.stats().steps
    with ThreadPoolExecutor() as pool:
        stays = pool.submit(server.text, "code", IDS, LONG)
        for _ in range(3):
            hang_up(server, **body)
        assert stays.result(30) == truth["code"]
    server.wait_until_idle()
    assert server.metric('molex_cancelled_total{adapter="law"}') > 0
    assert server.assembly.engine.stats().steps - steps < 4 * LONG, "what nobody reads was computed to its end"
    assert server.text("law", IDS, LONG) == truth["law"]


def edited(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


def retensored(folder: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors, next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / TENSORS)


def moved(name: str) -> str:
    """Into a layer that there is not."""
    return re.sub(r"layers\.\d", "layers.7", name)


def in_pickle(folder: Path) -> None:
    (folder / TENSORS).write_bytes(pickle.dumps({"x": [1]}))


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def linked_out(folder: Path) -> None:
    outside = folder.parent.parent / TENSORS
    shutil.move(folder / TENSORS, outside)
    (folder / TENSORS).symlink_to(outside)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "cut short": lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-100]),
    "empty": lambda f: (f / TENSORS).write_bytes(b""),
    "a header without end": lambda f: (f / TENSORS).write_bytes(b"\xff" * 8 + (f / TENSORS).read_bytes()[8:]),
    "no numbers": lambda f: retensored(f, lambda t, name: t[name].fill_(torch.nan)),
    "another shape": lambda f: retensored(f, lambda t, name: t.update({name: t[name].T.contiguous()})),
    "a tensor too many": lambda f: retensored(f, lambda t, name: t.update(stray=torch.ones(1))),
    "a tensor too few": lambda f: retensored(f, lambda t, name: t.pop(name)),
    "another layer": lambda f: retensored(f, lambda t, name: [t.update({moved(n): t.pop(n)}) for n in list(t)]),
    "whole numbers": lambda f: retensored(f, lambda t, name: t.update({name: t[name].int()})),
    "no JSON": lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", '),
    "JSON without end": lambda f: (f / CONFIG).write_text("[" * 100_000),
    "an odd setting": lambda f: edited(f, rank_pattern=[1]),
    "an infinite scale": lambda f: edited(f, lora_alpha=float("inf")),
    "another kind": lambda f: edited(f, peft_type="IA3"),
    "a .bin alone": as_bin,
    "a pickle": in_pickle,
    "a link out": linked_out,
}


def test_no_damage_is_served_and_none_takes_the_alias(server: Whole, root: Path, truth: dict[str, str]) -> None:
    """Each is refused as the client's error, and the alias names what it named."""
    assert server.load("alias", "law").status_code == 200
    before = server.generation("alias")
    for name, damage in DAMAGES.items():
        shutil.copytree(root / "code", root / "damaged")
        damage(root / "damaged")
        answer = server.load("alias", "damaged")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_adapter"), f"{name}: {answer.text}"
        assert server.load("other", "damaged").status_code == 422, name
        assert server.generation("alias") == before, name
        shutil.rmtree(root / "damaged", ignore_errors=True)
    assert server.generation("other") is None
    assert server.text("alias", IDS) == truth["law"][:8]
    assert server.text("base", IDS) == truth["base"][:8]


@pytest.mark.parametrize("damage", ["gone", "empty", "no numbers"])
def test_a_folder_is_damaged_under_the_server(damage: str, root: Path, truth: dict[str, str]) -> None:
    """Read already, what was read is served: from the device, and from the host's memory. Once it has to be read again,
    it is refused, until it is mended; others go on."""
    largest = sum(tensor.nbytes for tensor in load_file(root / "code" / TENSORS).values())
    limits = AdapterLimits(resident=1, host_bytes=largest)  # code beside none of the others
    with serving(tiny("llama"), root, {name: root / name for name in NAMES}, limits=limits) as server:
        assert server.text("law", IDS) == truth["law"][:8]
        shutil.copytree(root / "law", root / "whole")
        DAMAGES[damage](root / "law")
        assert server.text("law", IDS) == truth["law"][:8], "on the device"
        assert server.text("poem", IDS) == truth["poem"][:8]
        assert levels(server)["law"] == "host"
        assert server.text("law", IDS) == truth["law"][:8], "in the host's memory"
        assert server.text("code", IDS) == truth["code"][:8]
        assert levels(server)["law"] == "disk"
        for _ in range(2):
            answer = server.ask("law", IDS)
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_adapter")
        assert server.text("poem", IDS) == truth["poem"][:8]
        shutil.rmtree(root / "law", ignore_errors=True)
        shutil.copytree(root / "whole", root / "law")
        assert server.text("law", IDS) == truth["law"][:8], "mended"
        shutil.copytree(root / "code", root / "law", dirs_exist_ok=True)
        assert server.text("code", IDS) == truth["code"][:8]
        answer = server.ask("law", IDS)
        assert answer.status_code == 422, "another content is not served under the alias in silence"
        assert "load it again" in answer.text
        assert server.load("law", "law").status_code == 200
        assert server.text("law", IDS) == truth["code"][:8]
        server.wait_until_idle()


def levels(server: Whole) -> dict[str, str]:
    return {own["alias"]: own["residency"] for own in server.http.get("/v1/adapters").json()["data"]}


@pytest.mark.parametrize("name", ["law", "mola"])
def test_unloaded_and_replaced_while_it_answers(name: str, server: Whole, truth: dict[str, str]) -> None:
    assert server.load("alias", name).status_code == 200
    streams = [Stream(server, "alias") for _ in range(2)]
    assert server.http.delete("/v1/adapters/alias").status_code == 200
    assert server.ask("alias", IDS).status_code == 404
    assert server.load("alias", "code").status_code == 200
    assert server.text("alias", IDS, LONG) == truth["code"]
    assert [stream.rest() for stream in streams] == [truth[name]] * 2
    server.wait_until_idle()
    for alias in ("alias", *NAMES):
        assert server.http.delete(f"/v1/adapters/{alias}").status_code == 200
    assert server.metric("molex_adapters_resident") == 0
    assert server.metric("molex_low_rank_bytes") == 0
    assert server.assembly.served.routed == {}


FULL = {
    "places": AdapterLimits(resident=1),
    "columns": AdapterLimits(columns=16),
    "expert slots": AdapterLimits(expert_slots=4),
}


@pytest.mark.parametrize("what", FULL)
def test_a_pool_that_is_full_of_what_is_in_use(what: str, root: Path) -> None:
    """Who comes next is told to come again; once there is a place, it is served. The base never waits."""
    limits, model = FULL[what], tiny("llama")
    if what == "expert slots":
        model = moe("mixtral")
        for name in NAMES:  # 4 experts in one layer, 3 and 2
            shutil.rmtree(root / name, ignore_errors=True)
        poem, code = save_swap("poem", model, root), save_swap("code", model, root)
    else:
        poem, code = root / "poem", root / "code"
    adapters = {"first": code, "next": poem}
    with serving(model, root, adapters, limits=limits, wait_seconds=0.3) as server:
        taken = server.assembly.registry.resolve("first")
        for _ in range(2):
            answer = server.ask("next", IDS)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1"), answer.text
            assert answer.json()["error"]["code"] == "load_busy"
        assert server.load("another", poem).status_code == 429
        assert server.ask("base", IDS).status_code == 200
        assert server.ask("first", IDS).status_code == 200
        taken.release()
        assert server.ask("next", IDS).status_code == 200
        server.wait_until_idle()


def test_what_never_has_a_place(root: Path) -> None:
    """Whatever is free."""
    for limits, why in (
        (AdapterLimits(columns=8), "columns"),
        (AdapterLimits(rank=8), "rank"),
        (AdapterLimits(host_bytes=1000), "host_bytes"),
    ):
        with serving(tiny("llama"), root, {"code": root / "code"}, limits=limits) as server:
            for answer in (server.ask("code", IDS), server.load("again", "code")):
                assert answer.status_code == 422, answer.text
                assert why in answer.text
            assert server.ask("base", IDS).status_code == 200


def test_prompts_that_are_too_long(server: Whole, truth: dict[str, str]) -> None:
    """Such a one ends transformers' own engine."""
    for name in ("base", "law"):
        for ids, new in ((prompt(65), 1), (prompt(63), 2), (prompt(5000), 1), (IDS, 1000)):
            answer = server.ask(name, ids, new)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert server.http.get("/health/live").status_code == 200
    assert server.text("law", IDS) == truth["law"][:8]
    assert server.ask("law", prompt(63), 1).status_code == 200


def test_an_adapter_that_overflows_spoils_nobody(server: Whole, root: Path, truth: dict[str, str]) -> None:
    """Its factors are finite numbers, what it computes is none; whatever it is asked for, others get their tokens."""
    retensored(root / "poem", lambda t, name: [tensor.fill_(1e30) for tensor in t.values()])
    assert server.load("huge", "poem").status_code == 200
    for settings in ({}, {"temperature": 1, "top_p": 0.5, "seed": 1}, {"logprobs": 3}, {"frequency_penalty": 1}):
        with ThreadPoolExecutor() as pool:
            spoiled = pool.submit(server.ask, "huge", IDS, 20, **settings)
            others = [pool.submit(server.text, name, IDS, 20) for name in ("law", "base")]
            assert [job.result(30) for job in others] == [truth["law"][:20], truth["base"][:20]]
            assert spoiled.result(30).status_code == 200
    assert server.text("base", IDS) == truth["base"][:8], "of a prefix that was computed beside it"


def made_up(dice: random.Random) -> dict[str, Any]:
    """A body, most of whose fields are fine."""
    odd: list[Any] = [None, True, -1, 0, 1.5, 10**20, "", "x" * 300, [], {}, [None], {"x": 1}]
    fields: dict[str, list[Any]] = {
        "model": ["base", "law", "code", "nobody", "base:law"],
        "prompt": [[*IDS], [[5], [6, 7]], "1 + 1", ["1", "22"], "hello", [99], ""],  # letters are no tokens here
        "max_tokens": [0, 1, 5, 90],
        "temperature": [0, 1, 101],
        "top_p": [0, 0.5, 1],
        "n": [1, 3, 129],
        "logprobs": [0, 3, 21],
        "echo": [True, False],
        "stream": [True, False],
        "stop": ["a", ["", "b"], ["x"] * 17],
        "logit_bias": [{"5": 100}, {"x": 1}, {"99": 1}],
        "stop_token_ids": [[5], [99]],
        "seed": [1, 1 << 64],
        "return_experts": [True],
        "response_format": [{"type": "json_object"}, {"type": "json_schema"}],
    }
    body = {name: dice.choice(values) for name, values in fields.items() if name in ("model", "prompt")}
    body |= {name: dice.choice(values) for name, values in fields.items() if dice.random() < 0.1}
    return body | ({dice.choice([*fields]): dice.choice(odd)} if dice.random() < 0.2 else {})


def test_bodies_that_are_made_up(server: Whole, truth: dict[str, str]) -> None:
    """Every one is answered, or refused as the client's fault."""

    def ask(seed: int) -> int:
        body = made_up(random.Random(seed))
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code == 200 and body.get("stream"):
            assert answer.text.endswith("data: [DONE]\n\n"), body
            assert '"error"' not in answer.text, body
        return answer.status_code

    with ThreadPoolExecutor(4) as pool:
        answered = Counter(pool.map(ask, range(80)))
    assert min(answered[200], answered[400]) > 8
    assert server.text("law", IDS) == truth["law"][:8]


def test_sigterm_under_load(tmp_path: Path) -> None:
    """Answers that have begun come to their ends, new requests are refused, and the process is gone."""
    save_workbench(tmp_path)
    command = [sys.executable, "-m", "molex", "serve", "--model", "base", "--port", "0", "--resident", "1"]
    command += ["--adapter", "law=adapters/law", "--adapter", "code=adapters/code"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "serving" in line)
        address = re.findall(r"http://\S+", line)[0]
        begun: list[str] = []

        def ask(name: str) -> tuple[int, str]:
            asked = {"model": name, "prompt": "hello", "max_tokens": 150, "stream": True, "ignore_eos": True}
            text = ""
            with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=120) as answer:
                for part in answer.iter_text():
                    begun.append(name)
                    text += part
            return answer.status_code, text

        with ThreadPoolExecutor(16) as pool:
            jobs = [pool.submit(ask, name) for name in ("base", "law", "law", "code", "base", "law", "code")]
            wait_for(lambda: len({*begun}) > 1, 60)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{address}/health/ready", timeout=30).status_code == 503, 30)
            assert ask("base")[0] == 503
            answers = [job.result(120) for job in jobs]
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
    for status, text in answers:
        is_whole = text.endswith("data: [DONE]\n\n") and '"error"' not in text
        assert is_whole if status == 200 else status == 503, text
    assert [status for status, _ in answers].count(200) >= 2
