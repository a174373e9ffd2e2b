"""How many of what there are, and the arguments of the application as a Ray Serve configuration gives them."""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from molex.checks import check_range


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """replicas: engines, each with the base; max_replicas: as many as the load asks for, None = always `replicas`.
    num_gpus, num_cpus: of an engine; None = a GPU where the cluster has any. max_ongoing_requests: at one engine, those
    that wait in its own queue among them; max_queued_requests: that wait in one ingress because all engines are full,
    further ones are refused."""

    replicas: int = 1
    max_replicas: int | None = None
    ingress_replicas: int = 1
    num_gpus: float | None = None
    num_cpus: float = 1.0
    max_ongoing_requests: int = 128
    max_queued_requests: int = 256

    def __post_init__(self) -> None:
        for name in ("replicas", "ingress_replicas", "max_ongoing_requests", "max_queued_requests"):
            check_range(name, getattr(self, name), 1)
        if self.max_replicas is not None:
            check_range("max_replicas", self.max_replicas, self.replicas)


class Arguments(BaseModel):
    """The options of `molex serve`, and those of `Scaling`. Paths are as the cluster's machines see them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""
    adapters: dict[str, str] = {}
    demo: Path | None = None
    name: str = "base"
    api_key: str | None = Field(default_factory=lambda: os.environ.get("MOLEX_API_KEY"))
    admin_key: str | None = Field(default_factory=lambda: os.environ.get("MOLEX_ADMIN_KEY"))
    adapter_root: str | None = None
    resident: int = 32
    cache_tokens: int = 16384
    dtype: str = "auto"
    two_passes: bool = False
    static: bool = False
    replicas: int = 1
    max_replicas: int | None = None
    ingress_replicas: int = 1
    num_gpus: float | None = None
    num_cpus: float = 1.0
    max_ongoing_requests: int = 128
    max_queued_requests: int = 256
