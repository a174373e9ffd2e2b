"""What a server may use, as frozen settings: of its engine, of its adapters, of its HTTP face."""

from dataclasses import dataclass

from molex.checks import check_range


@dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """resident: adapters on the device at once; columns: all their ranks together; rank: of one adapter's linear, all
    its experts together; host_bytes: of what is kept in memory ready to be made resident; registered: known aliases;
    expert_slots: expert-swap adapters' experts in each layer of a mixture-of-experts base."""

    resident: int = 32
    columns: int = 4096
    rank: int = 512
    host_bytes: int = 4 << 30
    registered: int = 4096
    expert_slots: int = 256

    def __post_init__(self) -> None:
        for name in ("resident", "columns", "rank", "host_bytes", "registered"):
            check_range(name, getattr(self, name), 1)
        check_range("expert_slots", self.expert_slots, 0)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """cache_tokens: that the KV cache holds, of all requests; step_tokens, step_requests, step_adapters: how many
    tokens, requests and different adapters a step computes; queue: requests that may wait; drain_steps: after so many
    steps a waiting adapter gets a place before running ones get another request; two_passes: a second cache of the same
    size, for mixtures that look at the base's hidden states first (xlora)."""

    cache_tokens: int = 16384
    page_tokens: int = 16
    step_tokens: int = 256
    step_requests: int = 64
    step_adapters: int = 16
    queue: int = 256
    drain_steps: int = 64
    prefix_cache: bool = True
    two_passes: bool = False

    def __post_init__(self) -> None:
        for name in ("cache_tokens", "page_tokens", "step_tokens", "step_requests", "step_adapters", "queue"):
            check_range(name, getattr(self, name), 1)
        check_range("drain_steps", self.drain_steps, 1)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """api_key, admin_key: None = nobody is asked; without an admin key the administration takes the API key.
    adapter_root: the folder that adapters may be loaded from over HTTP, None = nothing may be."""

    model_name: str = "base"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    admin_key: str | None = None
    adapter_root: str | None = None
    body_bytes: int = 4 << 20
    max_tokens: int = 256
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("body_bytes", self.body_bytes, 1)
        check_range("max_tokens", self.max_tokens, 1)
        check_range("drain_seconds", self.drain_seconds, 0)
