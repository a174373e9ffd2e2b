"""What `molex serve` does: load the base, serve until it is told to stop."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex.errors import CheckpointError
from molex.evaluation.opening import open_model, open_tokenizer
from molex_serve.assembly import Assembly, assemble
from molex_serve.demo import demo_adapters, demo_model
from molex_serve.http.server import Server
from molex_serve.options import Start, named, server_settings
from molex_serve.settings import AdapterLimits, EngineSettings

Say = Callable[[str], Any]


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


def prepare(given: Start, adapters: Mapping[str, str]) -> Assembly:
    """A whole server but for its sockets."""
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


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its tokenizer, on the GPU where there is one. Raises CheckpointError where they cannot be had, and
    on an encoder-decoder, which no engine here serves."""
    model = open_model(name, dtype=dtype)
    if model.config.is_encoder_decoder:
        raise CheckpointError(f"{name} is an encoder-decoder, and only decoders are served")
    return model, open_tokenizer(None, model, name)
