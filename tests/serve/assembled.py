"""A whole server over a tiny model, as `molex serve` puts it together, on a loopback port.

A token below 64 is a byte, so an answer's text tells its tokens.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel

from molex_serve.assembly import Assembly, assemble
from molex_serve.http.server import Server
from molex_serve.settings import AdapterLimits, EngineSettings, ServerSettings
from tests.serve.engine.serving import tokenizer
from tests.serve.http.conftest import wait_for

SMALL = EngineSettings(cache_tokens=512, page_tokens=4, step_tokens=32)


@dataclass
class Whole:
    assembly: Assembly
    server: Server
    http: httpx.Client

    def ask(self, name: str, ids: Sequence[int], new: int = 8, **body: Any) -> httpx.Response:
        asked = {"model": name, "prompt": list(ids), "max_tokens": new, "temperature": 0, **body}
        return self.http.post("/v1/completions", json=asked)

    def text(self, name: str, ids: Sequence[int], new: int = 8) -> str:
        answer = self.ask(name, ids, new)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def load(self, alias: str, path: str | Path, **body: Any) -> httpx.Response:
        return self.http.post("/v1/adapters", json={"alias": alias, "path": str(path), **body})

    def generation(self, alias: str) -> str | None:
        listed = self.http.get("/v1/adapters").json()["data"]
        return next((own["generation"] for own in listed if own["alias"] == alias), None)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def wait_until_idle(self) -> None:
        """Nothing runs, nobody holds an adapter, and the whole cache is free."""
        wait_for(lambda: not any(self.busy().values()), 20)

    def busy(self) -> dict[str, int]:
        stats, registry = self.assembly.engine.stats(), self.assembly.registry
        return {
            "running": stats.running + stats.waiting,
            "cached": stats.cache_total - stats.cache_free,
            "leases": sum(listed.leases for listed in registry.listing()),
            "waiting": registry.residency.counts().waiting,
            "draining": registry.residency.counts().draining,
            "inside": self.server.face.gate.inside,
        }


@contextmanager
def serving(
    model: PreTrainedModel,
    root: Path,
    adapters: Mapping[str, str | Path],
    engine: EngineSettings = SMALL,
    limits: AdapterLimits | None = None,
    wait_seconds: float = 20.0,
) -> Iterator[Whole]:
    """wait_seconds: for a place on the device. It must end by itself, and leave the model as it was."""
    settings = ServerSettings(port=0, adapter_root=str(root), drain_seconds=2)
    folders = {alias: str(folder) for alias, folder in adapters.items()}
    assembly = assemble(model, tokenizer(), folders, server=settings, engine=engine, limits=limits)
    assembly.registry.residency.wait_seconds = wait_seconds
    server = Server(assembly.app, settings, log_level="critical")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive(), 30)
    try:
        with httpx.Client(base_url="http://{}:{}".format(*server.address), timeout=60) as http:
            yield Whole(assembly, server, http)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        assembly.close()


def expected(model: PreTrainedModel, ids: Sequence[int], new: int = 8) -> list[int]:
    """What transformers' own generate says."""
    with torch.no_grad():
        whole = model.generate(torch.tensor([list(ids)]), max_new_tokens=new, do_sample=False)  # type: ignore[operator]
    return whole[0, len(ids) :].tolist()


def expected_text(model: PreTrainedModel, ids: Sequence[int], new: int = 8) -> str:
    return bytes(expected(model, ids, new)).decode()
