"""Adapters over HTTP on all replicas at once: the single server's answers, and what each replica says beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from molex_serve.scale.ingress import create_ingress
from molex_serve.settings import ServerSettings
from tests.serve.scale.cluster_of import Cluster
from tests.serve.scale.ingress_of import listening

GONE = {"replica": None, "status": 503, "code": "unavailable", "message": "lost"}


@contextmanager
def administrated(folder: Path, *started: str) -> Iterator[tuple[Cluster, httpx.Client]]:
    """started: the adapters that the server is started with."""
    with Cluster(folder, {name: str((folder / name).resolve()) for name in started}) as cluster:
        for name in ("law", "code"):
            cluster.write(name, f"{name}-1")
        ingress = create_ingress(cluster, cluster.directory, ServerSettings())  # type: ignore[arg-type]
        with listening(ingress) as (host, port), httpx.Client(base_url=f"http://{host}:{port}", timeout=10) as http:
            yield cluster, http


def test_an_adapter_comes_and_goes(tmp_path: Path) -> None:
    with administrated(tmp_path) as (cluster, http):
        made = http.post("/v1/adapters", json={"alias": "team/law", "path": "law", "pin": True})
        assert made.status_code == 200, made.text
        replicas = [{"replica": name, "generation": "law-1", "residency": "device"} for name in ("r0", "r1")]
        described = {
            **{"object": "adapter", "alias": "team/law", "parent": "base", "kind": "lora", "generation": "law-1"},
            **{"residency": "device", "pinned": True, "num_bytes": 10, "replicas": replicas},
        }
        assert made.json() == described
        assert http.get("/v1/adapters").json() == {"object": "list", "data": [described]}
        stale = http.delete("/v1/adapters/team/law", params={"expected_generation": "x"})
        assert (stale.status_code, stale.json()["error"]["code"]) == (409, "generation_conflict")
        cluster.lost = {"r1"}
        assert http.get("/v1/adapters").json()["data"][0]["replicas"] == [replicas[0], GONE]
        assert http.delete("/v1/adapters/team/law", params={"expected_generation": "law-1"}).json() == {
            **{"object": "adapter", "alias": "team/law", "deleted": True},
            "replicas": [{"replica": "r0", "status": 200}, GONE],
        }
        assert http.delete("/v1/adapters/team/law").status_code == 404


@pytest.mark.parametrize("who", ["r0", "r1"])
def test_where_an_adapter_is(who: str, tmp_path: Path) -> None:
    with administrated(tmp_path, "law") as (cluster, http):
        cluster.members[who].says("law")
        (law,) = http.get("/v1/adapters").json()["data"]
        assert (law["kind"], law["generation"], law["residency"], law["num_bytes"]) == ("lora", "law-1", "device", 10)
        places = {one["replica"]: (one["generation"], one["residency"]) for one in law["replicas"]}
        assert places == {"r0": (None, "disk"), "r1": (None, "disk")} | {who: ("law-1", "device")}


def test_a_refusal_says_what_each_replica_said(tmp_path: Path) -> None:
    with administrated(tmp_path) as (cluster, http):
        cluster.members["r1"].world.write(str((tmp_path / "law").resolve()), "law-1", binds=False)
        refused = http.post("/v1/adapters", json={"alias": "law", "path": "law"})
        assert refused.status_code == 422
        message = f"{(tmp_path / 'law').resolve()} does not bind"
        assert refused.json() == {
            "error": {"message": message, "type": "invalid_request_error", "param": None, "code": "bad_adapter"},
            "replicas": [
                {"replica": "r0", "status": 200},
                {"replica": "r1", "status": 422, "code": "bad_adapter", "message": message},
            ],
        }
        assert http.get("/v1/adapters").json()["data"] == []


def test_a_busy_place_says_when_to_come_back(tmp_path: Path) -> None:
    with administrated(tmp_path) as (cluster, http):
        cluster.write("poem", "poem-1")
        leases = []
        for name in ("law", "code"):
            assert http.post("/v1/adapters", json={"alias": name, "path": name}).status_code == 200
            leases.append(cluster.members["r0"].world.registry.resolve(name))
        refused = http.post("/v1/adapters", json={"alias": "poem", "path": "poem"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert [told["status"] for told in refused.json()["replicas"]] == [429, 200]
        for lease in leases:
            lease.release()
        assert http.post("/v1/adapters", json={"alias": "poem", "path": "poem"}).status_code == 200


def test_vllms_calls_are_understood(tmp_path: Path) -> None:
    with administrated(tmp_path) as (_, http):
        asked = {"lora_name": "code", "lora_path": "code"}
        loaded = http.post("/v1/load_lora_adapter", json=asked)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'code' added successfully.")
        assert http.post("/v1/load_lora_adapter", json=asked).status_code == 409
        assert http.post("/v1/load_lora_adapter", json={**asked, "load_inplace": True}).status_code == 200
        gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "code"})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'code' removed successfully.")
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "code"}).status_code == 404


def test_no_route_changes_one_replica_alone(tmp_path: Path) -> None:
    """What is handed on as it is may only read."""
    with administrated(tmp_path) as (_, http):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            for path in ("/v1/adapters/", "//v1/adapters", "/v1/load_lora_adapter/", "/v1//adapters", "/v1/nowhere"):
                answer = http.request(method, path, json={"alias": "a", "path": "law"})
                assert answer.status_code in (404, 405, 307), (method, path)
