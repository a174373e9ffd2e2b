"""Engines on two machines, which are one here: every command of docs/serving_at_scale.md, and what clients meet.

Starting takes longest, so the tests use one cluster, one after the other; only the last has its own.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import yaml
from fastapi.testclient import TestClient
from openai import OpenAI

from molex.workbench import load_base, load_tokenizer
from molex_serve.assembly import assemble
from tests.serve.adapters_of import fill
from tests.serve.scale.ray_of import (
    CONFIGURATION,
    DEPLOY,
    HEAD,
    JOIN,
    MOLEX,
    SECONDS,
    SHUTDOWN,
    STATUS,
    Processes,
    free_ports,
    until,
)

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytest.importorskip("ray.serve", reason="the extra `ray` has no `serve`")

NAMES = ("law", "code", "poem", "tale")
ONGOING, QUEUED = 4, 6
LONG = {"max_tokens": 440, "ignore_eos": True, "n": 2, "stream": True}


@dataclass
class Running:
    """folder: shared by the machines. adapters: what the server was started with. address: of Ray's head."""

    http: httpx.Client
    folder: Path
    adapters: dict[str, str]
    processes: Processes
    address: str

    def ask(self, name: str, **body: object) -> httpx.Response:
        asked = {"model": name, "prompt": "upper: hello\n= ", "max_tokens": 6, "temperature": 0, **body}
        return self.http.post("/v1/completions", json=asked)

    @contextmanager
    def streaming(self, name: str, **body: object) -> Iterator[Iterator[str]]:
        """The events of a stream that has begun."""
        asked = {"model": name, "prompt": "upper: hello\n= ", **LONG, **body}
        with self.http.stream("POST", "/v1/completions", json=asked) as answer:
            assert answer.status_code == 200, answer.read()
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            yield lines

    def counts(self, figure: str, adapter: str) -> Counter[str]:
        """Of each replica."""
        text = self.http.get("/metrics").text
        found = re.findall(rf'^{figure}{{adapter="{adapter}",replica="(\w+)"}} (\S+)$', text, re.M)
        return Counter({replica: int(float(value)) for replica, value in found if float(value)})

    def requests(self, adapter: str) -> Counter[str]:
        """Of each replica, that came to a first token."""
        return self.counts("molex_time_to_first_token_seconds_count", adapter)

    def running(self) -> int:
        text = self.http.get("/metrics").text
        return sum(int(float(value)) for value in re.findall(r"^molex_requests_running{\S+} (\S+)$", text, re.M))

    def replicas(self, alias: str) -> dict[str, dict[str, Any]]:
        adapters = self.http.get("/v1/adapters").json()["data"]
        (found,) = [one["replicas"] for one in adapters if one["alias"] == alias] or [[]]
        return {one["replica"]: one for one in found if one["replica"]}

    def home(self, name: str) -> str:
        """The one replica that a request to it went to."""
        before = self.requests(name)
        assert self.ask(name).status_code == 200
        (went,) = (self.requests(name) - before).keys()
        return went

    def settled(self, name: str) -> str:
        """Its home, once Ray has told its ingress."""
        homes = ["", self.home(name)]
        until(lambda: homes[-2] == homes[-1] or homes.append(self.home(name)))
        return homes[-1]


def layout(folder: Path) -> None:
    """What the page's commands and its configuration find."""
    load_base().save_pretrained(folder / "base")
    load_tokenizer().save_pretrained(folder / "base")
    for name in NAMES:
        model = peft.get_peft_model(load_base(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        fill(model, "lora_B", name)
        model.save_pretrained(str(folder / "adapters" / name))


@contextmanager
def two_machines() -> Iterator[tuple[Processes, str]]:
    """The page's cluster, and the address of its head. Each has one core to give, so that each gets an engine."""
    port, *ports = free_ports(5)
    of_one = "--block --num-cpus=1 --num-gpus=0 --object-store-memory=100000000 --node-ip-address=127.0.0.1"
    head, join = HEAD.replace("6379", str(port)), JOIN.replace("HEAD:6379", f"127.0.0.1:{port}")
    head += f" --dashboard-port={ports[1]} --ray-client-server-port={ports[2]}"
    with Processes() as processes:
        processes.environment["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{ports[1]}"
        for command, agent in ((head, ports[0]), (join, ports[3])):
            command += f" {of_one} --dashboard-agent-listen-port={agent}"
            processes.start(command, "Ray runtime started")
        yield processes, f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, (port,) = tmp_path_factory.mktemp("shared"), free_ports(1)
    layout(folder)
    configuration = yaml.safe_load(CONFIGURATION.replace("/shared", str(folder)))
    configuration["http_options"] = {"host": "127.0.0.1", "port": port}
    arguments = configuration["applications"][0]["args"]
    del arguments["max_replicas"]
    arguments |= {"replicas": 2, "resident": 4, "max_ongoing_requests": ONGOING, "max_queued_requests": QUEUED}
    (folder / "molex.yaml").write_text(yaml.safe_dump(configuration))
    with two_machines() as (processes, address):
        processes.run(DEPLOY, folder)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as http:
            until(lambda: engines(http) == 2)
            yield Running(http, folder, arguments["adapters"], processes, address)


def engines(http: httpx.Client) -> int:
    """How many there are; 0 while nobody listens."""
    try:
        ready = http.get("/health/ready")
    except httpx.TransportError:
        return 0
    return ready.json()["replicas"] if ready.status_code == 200 else 0


def test_mixed_adapters_say_what_they_say_in_one_process(cluster: Running) -> None:
    assembly = assemble(load_base(), load_tokenizer(), cluster.adapters)
    words, names = ("hello", "a", "seven words"), ("base", *cluster.adapters)
    asked = [(name, f"upper: {word}\n= ") for word in words for name in names]
    with TestClient(assembly.app) as client:

        def alone(name: str, prompt: str) -> dict[str, Any]:
            body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1}
            return client.post("/v1/completions", json=body).json()

        expected = [alone(*one) for one in asked]
    assembly.close()
    with ThreadPoolExecutor(4) as pool:
        answers = [
            answer.json()
            for answer in pool.map(lambda one: cluster.ask(one[0], prompt=one[1], max_tokens=12, logprobs=1), asked)
        ]
    for got, wanted in zip(answers, expected, strict=True):
        assert got["adapter_generation"] == wanted["adapter_generation"]
        (choice,), (expected_choice,) = got["choices"], wanted["choices"]
        assert choice["text"] == expected_choice["text"]
        assert choice["logprobs"]["tokens"] == expected_choice["logprobs"]["tokens"]
    assert len({answer["choices"][0]["text"] for answer in answers}) > 4, "the adapters do nothing"
    assert cluster.ask("nobody").status_code == 404


def test_streams_and_chats(cluster: Running) -> None:
    with OpenAI(base_url=f"{cluster.http.base_url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
        assert {model.id for model in client.models.list()} == {"base", *cluster.adapters}
        stream = client.completions.create(
            model="law", prompt="upper: hello\n= ", max_tokens=6, temperature=0, stream=True
        )
        parts = [chunk.choices[0].text for chunk in stream]
        assert len(parts) > 2
        assert "".join(parts) == cluster.ask("law").json()["choices"][0]["text"]


def test_an_adapter_comes_and_goes_everywhere(cluster: Running) -> None:
    http = cluster.http
    made = http.post("/v1/adapters", json={"alias": "poem", "path": "poem", "expected_generation": ""})
    assert made.status_code == 200, made.text
    assert [one["residency"] for one in made.json()["replicas"]] == ["device", "device"]
    generation = made.json()["generation"]
    again = http.post("/v1/adapters", json={"alias": "poem", "path": "tale", "expected_generation": ""})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "generation_conflict")
    assert cluster.ask("poem").json()["adapter_generation"] == generation
    damaged = cluster.folder / "adapters" / "damaged"
    shutil.copytree(cluster.folder / "adapters" / "tale", damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    refused = http.post("/v1/adapters", json={"alias": "poem", "path": "damaged", "expected_generation": generation})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "bad_adapter")
    assert [one["code"] for one in refused.json()["replicas"]] == ["bad_adapter", "bad_adapter"]
    assert cluster.ask("poem").json()["adapter_generation"] == generation
    reloaded = http.post("/v1/adapters", json={"alias": "poem", "path": "tale", "expected_generation": generation})
    assert {one["generation"] for one in cluster.replicas("poem").values()} == {reloaded.json()["generation"]}
    assert reloaded.json()["generation"] != generation
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "tale", "lora_path": "tale"}).status_code == 200
    assert http.delete("/v1/adapters/both").status_code == 200
    assert cluster.ask("both").status_code == 404


def test_an_adapter_stays_where_it_is(cluster: Running) -> None:
    names = ("law", "code", "poem", "tale")
    homes = {name: cluster.settled(name) for name in names}
    before = {name: cluster.requests(name) for name in names}
    for _ in range(6):
        for name in names:
            assert cluster.ask(name).status_code == 200
    went = {name: cluster.requests(name) - before[name] for name in names}
    assert went == {name: Counter({home: 6}) for name, home in homes.items()}
    assert len(set(homes.values())) == 2, "one replica has nothing to do"


def test_a_full_replica_gives_to_the_other_and_who_leaves_gives_back(cluster: Running) -> None:
    home = cluster.settled("law")
    with ExitStack() as streams:
        for _ in range(ONGOING):
            streams.enter_context(cluster.streaming("law"))
        assert cluster.ask("law").status_code == 200
    until(lambda: cluster.running() == 0)
    assert set(cluster.requests("law")) > {home}
    assert sum(cluster.counts("molex_cancelled_total", "law").values()) == ONGOING


def test_a_full_cluster_refuses_before_it_answers(cluster: Running) -> None:
    with ThreadPoolExecutor(3 * QUEUED) as pool:
        with ExitStack() as streams:
            for _ in range(2 * ONGOING):
                streams.enter_context(cluster.streaming("base"))
            asking = [pool.submit(cluster.ask, "base", stream=True) for _ in range(3 * QUEUED)]
            until(lambda: sum(one.done() for one in asking) >= QUEUED)
        answers = [one.result() for one in asking]
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 503}
    assert statuses[503] >= QUEUED
    for answer in answers:
        if answer.status_code == 503:
            assert (answer.headers["retry-after"], answer.json()["error"]["code"]) == ("1", "overloaded")
    until(lambda: cluster.running() == 0)


def test_a_new_replica_knows_what_the_lost_one_knew(cluster: Running) -> None:
    """The directory, lost too, hears of it from the other one."""
    known = cluster.replicas("poem")
    (generation,) = {one["generation"] for one in known.values()}
    first = cluster.settled("poem")
    with cluster.streaming("poem") as events:
        kill(cluster, "#Directory#", first)
        *_, error, done = events
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert done == "data: [DONE]"
    until(lambda: len(cluster.replicas("poem").keys() - {first}) == 2)
    (new,) = cluster.replicas("poem").keys() - known.keys()
    until(lambda: cluster.replicas("both") == {})
    with ExitStack() as streams:  # more than one replica takes
        for _ in range(ONGOING):
            streams.enter_context(cluster.streaming("poem"))
        assert cluster.ask("poem").json()["adapter_generation"] == generation
    until(lambda: cluster.running() == 0)
    assert cluster.replicas("poem")[new]["generation"] == generation
    assert set(cluster.requests("poem")) == {new, *known} - {first}


def kill(cluster: Running, *replicas: str) -> None:
    """Named by a part of their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            for replica in replicas:
                (found,) = [a for a in ray.util.list_named_actors(all_namespaces=True) if replica in a["name"]]
                ray.kill(ray.get_actor(found["name"], namespace=found["namespace"]))
        finally:
            ray.shutdown()


def test_it_ends_by_command(cluster: Running) -> None:
    assert "RUNNING" in cluster.processes.run(STATUS, cluster.folder)
    cluster.processes.run(SHUTDOWN, cluster.folder)
    assert engines(cluster.http) == 0
    until(lambda: not [name for name in cluster.processes.names() if "ServeReplica" in name])


def test_one_machine(tmp_path: Path) -> None:
    """It has a Ray of its own. Told to stop, it finishes what it has begun, and leaves nothing behind."""
    layout(tmp_path)
    (port,) = free_ports(1)
    with Processes() as processes:
        command = f"{MOLEX} --port {port}"
        processes.start(command, f"serving base by 2 engines on http://127.0.0.1:{port}", tmp_path)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as http:
            assert engines(http) == 2
            for name in ("base", "law", "code"):
                answer = http.post("/v1/completions", json={"model": name, "prompt": "hello", "max_tokens": 4})
                assert answer.status_code == 200, answer.text
            with http.stream("POST", "/v1/completions", json={"model": "law", "prompt": "hello", **LONG}) as answer:
                lines = (line for line in answer.iter_lines() if line)
                next(lines)
                processes.tell_to_stop(command)
                *events, done = lines
        assert done == "data: [DONE]"
        choices = [choice for event in events for choice in json.loads(event.removeprefix("data: "))["choices"]]
        assert Counter(choice["finish_reason"] for choice in choices)["length"] == LONG["n"]
        processes.wait_until_stopped(command)
