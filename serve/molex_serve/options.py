"""What a server is started with, as the command line gives it. Who only hands it on needs no torch for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from molex.checks import check_choice
from molex.errors import ConfigError
from molex_serve.settings import ServerSettings

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The command line's arguments. demo: the folder of the demonstration's adapters, None = the base is `model`."""

    model: str
    adapters: Sequence[str]
    demo: Path | None
    host: str
    port: int
    name: str
    api_key: str | None
    admin_key: str | None
    adapter_root: str | None
    resident: int
    cache_tokens: int
    dtype: str
    two_passes: bool = False
    static: bool

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)


def server_settings(given: Start) -> ServerSettings:
    return ServerSettings(
        model_name=given.name,
        host=given.host,
        port=given.port,
        api_key=given.api_key,
        admin_key=given.admin_key,
        adapter_root=given.adapter_root,
    )


def named(adapters: Sequence[str]) -> dict[str, str]:
    """NAME=SOURCE each. Raises ConfigError on another form, and on a name that is given twice."""
    found: dict[str, str] = {}
    for text in adapters:
        name, separator, source = text.partition("=")
        if not separator or not name or not source:
            raise ConfigError(f"--adapter {text!r}: give NAME=FOLDER, or NAME=one:0.6+other:0.4")
        if name in found:
            raise ConfigError(f"--adapter {name!r} is given twice")
        found[name] = source
    return found
