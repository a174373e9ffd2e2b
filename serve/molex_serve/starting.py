"""What `molex serve` does: read its arguments, load the base, serve until it is told to stop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex.checks import check_choice
from molex.errors import CheckpointError, ConfigError
from molex.evaluation.opening import open_model, open_tokenizer
from molex_serve.assembly import Assembly, assemble
from molex_serve.demo import demo_adapters, demo_model
from molex_serve.http.server import Server
from molex_serve.settings import AdapterLimits, EngineSettings, ServerSettings

DTYPES = ("auto", "float32", "bfloat16", "float16")
Say = Callable[[str], Any]


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


def start(given: Start, say: Say) -> None:
    """Returns when the server has stopped."""
    adapters, settings = adapters_of(given, say), server_settings(given)
    assembly = prepare(given, adapters)
    known = f"{given.name} and {len(adapters)} adapters" if adapters else given.name
    try:
        Server(assembly.app, settings, listening=lambda address: say(f"serving {known} on {address}")).run()
    finally:
        assembly.close()


def adapters_of(given: Start, say: Say) -> dict[str, str]:
    """A source for each alias. The demonstration's are made, where they are not there yet."""
    adapters = named(given.adapters)
    if given.demo is None:
        return adapters
    given.demo.mkdir(parents=True, exist_ok=True)
    return demo_adapters(given.demo, say) | adapters


def server_settings(given: Start) -> ServerSettings:
    return ServerSettings(
        model_name=given.name,
        host=given.host,
        port=given.port,
        api_key=given.api_key,
        admin_key=given.admin_key,
        adapter_root=given.adapter_root,
    )


def prepare(given: Start, adapters: Mapping[str, str]) -> Assembly:
    """A whole server but for its sockets."""
    check_choice("dtype", given.dtype, DTYPES)
    model, tokenizer = load(given.model, given.dtype) if given.demo is None else demo_model()
    return assemble(
        model,
        tokenizer,
        adapters,
        server=server_settings(given),
        engine=EngineSettings(cache_tokens=given.cache_tokens, two_passes=given.two_passes),
        limits=AdapterLimits(resident=given.resident),
        static=given.static,
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


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its tokenizer, on the GPU where there is one. Raises CheckpointError where they cannot be had, and
    on an encoder-decoder, which no engine here serves."""
    model = open_model(name, dtype=dtype)
    if model.config.is_encoder_decoder:
        raise CheckpointError(f"{name} is an encoder-decoder, and only decoders are served")
    return model, open_tokenizer(None, model, name)
