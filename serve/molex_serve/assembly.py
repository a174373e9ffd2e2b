"""A server put together: the base with its adapters, the engine, the registry, the HTTP face."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex_serve.adapters.blend import blend
from molex_serve.adapters.generations import Source
from molex_serve.adapters.registry import Registry
from molex_serve.adapters.residency import Residency
from molex_serve.engine.base import Engine
from molex_serve.engine.continuous import ContinuousEngine, NotPaged
from molex_serve.engine.static import StaticEngine
from molex_serve.errors import BadRequest
from molex_serve.http.app import create_app
from molex_serve.model.served import ServedModel
from molex_serve.pools import Pools
from molex_serve.settings import AdapterLimits, EngineSettings, ServerSettings

logger = logging.getLogger("molex")


@dataclass(frozen=True)
class Assembly:
    """close() after the application has ended: the base is then as it was."""

    served: ServedModel
    engine: Engine
    registry: Registry
    app: FastAPI

    def close(self) -> None:
        self.registry.close()
        self.served.close()


def assemble(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Mapping[str, str] | None = None,
    *,
    server: ServerSettings | None = None,
    engine: EngineSettings | None = None,
    limits: AdapterLimits | None = None,
    static: bool = False,
) -> Assembly:
    """adapters: a folder for each alias, or a blend of other aliases, "law:0.6+code:0.4"; read when first asked for.

    static: the engine without pages, which otherwise only serves models that continuous batching refuses. Raises
    BadRequest on a blend of unknown aliases.
    """
    settings, limits = server or ServerSettings(), limits or AdapterLimits()
    served = ServedModel(model, limits)
    running = make_engine(served, tokenizer, engine or EngineSettings(), static)
    read = partial(served.read, two_passes=running.two_passes)
    residency = Residency(served.attach, served.detach, read, running.paused, limits)
    registry = Registry(residency, reserved=(settings.model_name,))
    for alias, source in sources(adapters or {}, served).items():
        registry.register(alias, source)
    app = create_app(running, registry, tokenizer, settings, [Pools(residency.counts, served)])
    return Assembly(served, running, registry, app)


def make_engine(
    served: ServedModel, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings, static: bool
) -> Engine:
    """Continuous batching where the model can have it. Raises BackendError where transformers cannot do it."""
    if not static:
        try:
            return ContinuousEngine(served, tokenizer, settings)
        except NotPaged as error:
            logger.warning("served one request at a time: %s", error)
    return StaticEngine(served, tokenizer, settings)


def sources(adapters: Mapping[str, str], served: ServedModel) -> dict[str, Source]:
    """Folders as they are, blends of the others as what makes them."""
    found: dict[str, Source] = {}
    for alias, given in adapters.items():
        shares = parse_blend(given, adapters) if not Path(given).is_dir() and ":" in given else None
        found[alias] = given if shares is None else partial(blend, shares, served.pristine, given)
    return found


def parse_blend(given: str, adapters: Mapping[str, str]) -> dict[Path, float]:
    """ "law:0.6+code:0.4" -> a share for each folder."""
    shares = {}
    for part in given.split("+"):
        alias, _, share = part.rpartition(":")
        if alias not in adapters:
            known = ", ".join(name for name, source in adapters.items() if source != given)
            raise BadRequest(f"{given!r} blends {alias!r}, which is no adapter here; known: {known}")
        try:
            shares[Path(adapters[alias])] = float(share)
        except ValueError as error:
            raise BadRequest(f"{given!r}: {share!r} is no share of {alias}; give a number") from error
    return shares
