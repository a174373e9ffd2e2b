"""A whole server as `molex serve` makes it, asked by the openai client."""

import copy
import threading
from pathlib import Path

import httpx
import peft
import pytest
import torch
import transformers
from openai import NotFoundError, OpenAI

import molex
from molex.errors import BackendError, ConfigError
from molex.workbench import load_base, load_tokenizer
from molex_serve.assembly import assemble, parse_blend
from molex_serve.engine.static import StaticEngine
from molex_serve.errors import BadRequest
from molex_serve.http.server import Server
from molex_serve.options import named
from molex_serve.settings import EngineSettings, ServerSettings
from tests.models import tiny, wake_experts
from tests.serve.adapters_of import fill
from tests.serve.http.conftest import wait_for

PROMPT, NEW = "upper: hello\n= ", 6


def adapters(folder: Path) -> dict[str, str]:
    for name in ("law", "code"):
        model = peft.get_peft_model(load_base(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        fill(model, "lora_B", name)
        model.save_pretrained(str(folder / name))
    for name, method in (("routed", "mixlora"), ("looking", "xlora")):
        mixture = molex.convert(load_base(), molex.preset(method, num_experts=3, rank=2))
        wake_experts(mixture.model)
        mixture.save(folder / name)
    return {name: str(folder / name) for name in ("law", "code", "routed", "looking")} | {"both": "law:0.5+code:-0.5"}


def text_of(model: torch.nn.Module) -> str:
    tokenizer = load_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model.eval().generate(ids, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("static", [False, True], ids=["continuous", "static"])
def test_every_kind_over_http(static: bool, tmp_path: Path) -> None:
    folders = adapters(tmp_path)
    settings = ServerSettings(port=0, adapter_root=str(tmp_path), drain_seconds=2)
    engine = EngineSettings(cache_tokens=512, two_passes=not static)
    assembly = assemble(load_base(), load_tokenizer(), folders, server=settings, engine=engine, static=static)
    server = Server(assembly.app, settings, log_level="critical")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive(), 30)
    url = "http://{}:{}".format(*server.address)
    try:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:

            def ask(name: str) -> str:
                return (
                    client.completions.create(model=name, prompt=PROMPT, max_tokens=NEW, temperature=0).choices[0].text
                )

            assert {model.id for model in client.models.list()} == {"base", *folders}
            found = {name: ask(name) for name in ("base", *folders)}
            with pytest.raises(NotFoundError, match="nobody"):
                ask("nobody")
            asked = {"model": "routed", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "return_experts": True}
            experts = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["experts"]
            assert {expert["name"] for expert in experts} <= {"0", "1", "2"}
            assert all(1 / 3 <= expert["share"] <= 1 for expert in experts)
            body = {"alias": "again", "path": "law"}
            assert httpx.post(f"{url}/v1/adapters", json=body, timeout=60).status_code < 300
            assert ask("again") == found["law"]
            metrics = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    for line in (
        "molex_adapter_loads_total 5.0",
        'molex_adapter_hits_total{residency="device"} 3.0',
        "molex_adapters_resident 5.0",
        "molex_adapter_columns_total 4096.0",
        'molex_queue_seconds_count{adapter="law"} 1.0',
    ):
        assert line in metrics, line
    merged = {n: peft.PeftModel.from_pretrained(load_base(), folders[n]).merge_and_unload() for n in ("law", "code")}
    assert found["base"] == text_of(load_base())
    assert {name: found[name] for name in merged} == {name: text_of(model) for name, model in merged.items()}
    for name in ("routed", "looking"):
        assert found[name] == text_of(molex.load(load_base(), folders[name]).model), name
    base, both = dict(load_base().named_parameters()), copy.deepcopy(merged["law"])
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            parts = [dict(merged[n].named_parameters())[name] for n in ("law", "code")]
            parameter.copy_(base[name] + 0.5 * (parts[0] - base[name]) - 0.5 * (parts[1] - base[name]))
    assert found["both"] == text_of(both)
    assert len(set(found.values())) > 2, "the adapters do nothing"
    assembly.close()


def test_an_untested_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no silent step down to the engine that serves one request at a time."""
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.raises(BackendError, match=r"tested with transformers .* and this is 5\.99\.0"):
        assemble(load_base(), load_tokenizer())
    assert isinstance(assemble(load_base(), load_tokenizer(), static=True).engine, StaticEngine)


def test_what_has_no_pages_is_served_all_the_same() -> None:
    assert isinstance(assemble(tiny("mamba"), load_tokenizer()).engine, StaticEngine)


def test_blends_by_alias() -> None:
    known = {"law": "a", "code": "b", "both": "law:0.6+code:-1"}
    assert parse_blend(known["both"], known) == {Path("a"): 0.6, Path("b"): -1.0}
    with pytest.raises(BadRequest, match="blends 'poem', which is no adapter here; known: law, code"):
        parse_blend("poem:1", {**known, "x": "poem:1"} | {"both": "poem:1"})
    with pytest.raises(BadRequest, match="'much' is no share of law"):
        parse_blend("law:much", known)


@pytest.mark.parametrize("given", [["law"], ["=a"], ["law="], ["law=a", "law=b"]])
def test_adapters_are_named_once(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="--adapter"):
        named(given)
