"""Models and adapters over HTTP: what is listed, what may be loaded and from where, and who may."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import AuthenticationError

from molex_serve.settings import ServerSettings
from tests.serve.http.conftest import Running, serving


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name in ("law", "code", "bad"):
        (root / name).mkdir()
        (root / name / "adapter_model.safetensors").write_text("")
    return root


@pytest.fixture(scope="module")
def keyed(root: Path) -> Iterator[Running]:
    settings = ServerSettings(port=0, api_key="sesame", admin_key="öffne", adapter_root=str(root), drain_seconds=1)
    with serving(settings, key="sesame") as running:
        yield running


@pytest.fixture
def admin(keyed: Running) -> Iterator[httpx.Client]:
    keyed.adapters.known = {name: one for name, one in keyed.adapters.known.items() if name == "law"}
    headers = [(b"Authorization", "Bearer öffne".encode())]
    with httpx.Client(base_url=keyed.url, headers=headers, timeout=5) as client:
        yield client


def test_models_are_the_base_and_its_adapters(served: Running) -> None:
    base, law = served.client.models.list().data
    assert (base.id, base.object, base.owned_by) == ("base", "model", "molex")
    assert law.id == "law"
    extra = law.model_extra or {}
    assert (extra["parent"], extra["kind"], extra["generation"]) == ("base", "lora", "aaaaaaaaaaaa")
    assert (extra["residency"], extra["pinned"], extra["num_bytes"]) == ("device", False, 1000)
    assert served.client.models.retrieve("law") == law
    assert served.client.models.retrieve("base:law") == law
    assert served.client.models.retrieve("base").id == "base"
    missing = served.http.get("/v1/models/org/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_adapter")


def test_an_adapter_comes_and_goes(admin: httpx.Client, root: Path) -> None:
    made = admin.post("/v1/adapters", json={"alias": "team/code", "path": "code", "pin": True})
    assert made.status_code == 200, made.text
    assert made.json()["pinned"]
    generation = made.json()["generation"]
    assert [one["alias"] for one in admin.get("/v1/adapters").json()["data"]] == ["law", "team/code"]
    stale = admin.delete("/v1/adapters/team/code", params={"expected_generation": "x"})
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "generation_conflict")
    again = {"alias": "team/code", "path": str(root / "code")}
    assert admin.post("/v1/adapters", json={**again, "expected_generation": ""}).status_code == 409
    assert admin.post("/v1/adapters", json={**again, "expected_generation": generation}).status_code == 200
    assert admin.delete("/v1/adapters/team/code").json() == {
        "object": "adapter",
        "alias": "team/code",
        "deleted": True,
    }
    assert admin.delete("/v1/adapters/team/code").status_code == 404
    damaged = admin.post("/v1/adapters", json={"alias": "b", "path": "bad"})
    assert (damaged.status_code, damaged.json()["error"]["code"]) == (422, "bad_adapter")


def test_vllms_calls_are_understood(admin: httpx.Client) -> None:
    asked = {"lora_name": "code", "lora_path": "code"}
    loaded = admin.post("/v1/load_lora_adapter", json=asked)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'code' added successfully.")
    assert admin.post("/v1/load_lora_adapter", json=asked).status_code == 409
    assert admin.post("/v1/load_lora_adapter", json={**asked, "load_inplace": True}).status_code == 200
    gone = admin.post("/v1/unload_lora_adapter", json={"lora_name": "code"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'code' removed successfully.")
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "code"}).status_code == 404


def test_nothing_is_loaded_from_outside_of_the_root(
    keyed: Running, admin: httpx.Client, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "adapter_model.safetensors").write_text("secret")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "mixed").mkdir()
    (root / "mixed" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    (root / "circle").symlink_to(root / "circle")
    outside = ["", ".", "..", "../outside", "/", "/etc", str(tmp_path / "outside"), "law/../../x"]
    for path in (*outside, "linked", "mixed", "a\x00b", "circle", "x" * 5000):
        answer = admin.post("/v1/adapters", json={"alias": "a", "path": path})
        assert answer.status_code in (400, 422), path
        assert "a" not in keyed.adapters.known


def test_without_a_root_nothing_is_loaded(served: Running) -> None:
    answer = served.http.post("/v1/adapters", json={"alias": "a", "path": "law"})
    assert answer.status_code == 400
    assert "adapter root" in answer.json()["error"]["message"]


def test_keys_are_asked_for(keyed: Running, admin: httpx.Client) -> None:
    assert keyed.completion().status_code == 200
    assert admin.get("/v1/models").status_code == 200
    with httpx.Client(base_url=keyed.url) as nobody:
        for header in ("", "Bearer", "Bearer sesam", "Bearer sesame2", "Basic sesame", "sesame"):
            answer = nobody.get("/v1/models", headers={"Authorization": header} if header else {})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert nobody.get(path).status_code == 200
    client = keyed.client.with_options(api_key="wrong")
    with pytest.raises(AuthenticationError):
        client.completions.create(model="base", prompt="x")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters"),
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/law"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
def test_the_api_key_does_not_administrate(keyed: Running, method: str, path: str) -> None:
    body = {"alias": "a", "path": "law", "lora_name": "law", "lora_path": "law"}
    assert keyed.http.request(method, path, json=body).status_code == 401
    assert "law" in keyed.adapters.known


def test_the_key_is_asked_for_before_the_body_is_read(keyed: Running) -> None:
    answer = httpx.post(f"{keyed.url}/v1/completions", content=b"x" * 100)
    assert answer.status_code == 401
