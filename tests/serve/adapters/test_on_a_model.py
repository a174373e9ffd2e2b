"""Aliases over a real model and real files: bytes that come back, files that are damaged, folders that change."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from molex_serve.adapters.registry import Registry
from molex_serve.adapters.residency import Residency
from molex_serve.errors import BadAdapter
from molex_serve.model.served import ServedModel
from molex_serve.settings import AdapterLimits
from tests.models import tiny
from tests.serve.adapters_of import save_lora


@pytest.fixture
def served() -> Iterator[ServedModel]:
    model = ServedModel(tiny("llama"), AdapterLimits(resident=2))
    yield model
    model.close()


@pytest.fixture
def registry(served: ServedModel, tmp_path: Path) -> Iterator[Registry]:
    for name in ("law", "code", "poem"):
        save_lora(name, tiny("llama"), tmp_path)
    residency = Residency(served.attach, served.detach, served.read, nullcontext, served.limits, wait_seconds=5)
    made = Registry(residency)
    yield made
    made.close()


def test_what_is_unloaded_gives_its_memory_back(served: ServedModel, registry: Registry, tmp_path: Path) -> None:
    committed = [served.pool.committed_bytes()]
    for name in ("law", "code"):
        registry.load(name, str(tmp_path / name))
        committed.append(served.pool.committed_bytes())
    assert committed[0] == 0 < committed[1] < committed[2]
    registry.unload("code")
    assert served.pool.committed_bytes() == committed[1]
    registry.unload("law")
    assert served.pool.committed_bytes() == 0


def test_a_third_one_takes_the_place_of_the_first(registry: Registry, tmp_path: Path) -> None:
    for name in ("law", "code", "poem"):
        registry.register(name, tmp_path / name)
        registry.resolve(name).release()
    assert [listed.residency for listed in registry.listing()] == ["device", "host", "device"]
    with registry.resolve("law") as lease:
        assert lease.handle in (1, 2)
    assert [listed.residency for listed in registry.listing()] == ["host", "device", "device"]


def test_a_damaged_reload_changes_nothing(served: ServedModel, registry: Registry, tmp_path: Path) -> None:
    before = registry.load("law", str(tmp_path / "law"))
    weights = tmp_path / "law" / "adapter_model.safetensors"
    whole, committed = weights.read_bytes(), served.pool.committed_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(BadAdapter, match="damaged"):
            registry.load("law", str(tmp_path / "law"))
    assert [listed.generation for listed in registry.listing()] == [before.generation]
    assert served.pool.committed_bytes() == committed
    with registry.resolve("law") as lease:
        assert lease.generation == before.generation
    weights.write_bytes(whole)
    assert registry.load("law", str(tmp_path / "law")).generation == before.generation
