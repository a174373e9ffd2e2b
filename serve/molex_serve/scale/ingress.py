"""The application that clients meet: who may ask, whose adapter it is, which replica; the answer is that replica's.

It keeps nothing but the names of adapters that it heard of, so any number of them can stand side by side.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from pydantic import ValidationError

from molex_serve.errors import Unavailable
from molex_serve.http.auth import require_admin, require_key, settings_of
from molex_serve.http.limits import read_body
from molex_serve.http.metrics import CONTENT_TYPE
from molex_serve.http.problems import add_handlers
from molex_serve.http.schemas import Body
from molex_serve.scale import administration
from molex_serve.scale.exchange import Call
from molex_serve.scale.figures import merged
from molex_serve.scale.forwarding import forwarded
from molex_serve.scale.ports import Directory, Engines, engines_of
from molex_serve.settings import ServerSettings

HEARD_SECONDS = 1.0  # how long a name that nobody knew stays unknown
asking, reading, watching = APIRouter(), APIRouter(), APIRouter()


def create_ingress(engines: Engines, directory: Directory, settings: ServerSettings) -> FastAPI:
    app = FastAPI(title="molex", openapi_url=None)
    app.state.settings, app.state.engines, app.state.directory = settings, engines, directory
    app.state.aliases = Aliases(directory)
    add_handlers(app)
    app.include_router(administration.router, dependencies=[Depends(require_admin)])
    app.include_router(asking, dependencies=[Depends(require_key)])
    app.include_router(watching)
    app.include_router(reading)
    return app


class Aliases:
    """Adapters by name. Only a name that is known is a reason to prefer a replica: Ray remembers each that it was ever
    given, and has the second request for one that no replica took wait for the first."""

    def __init__(self, directory: Directory):
        self._directory, self._names = directory, frozenset[str]()
        self._asking, self._next = asyncio.Lock(), 0.0

    async def knows(self, alias: str) -> bool:
        """A directory that does not answer knows nothing new."""
        if alias not in self._names:
            async with self._asking:
                await self._ask(alias)
        return alias in self._names

    async def _ask(self, alias: str) -> None:
        if alias in self._names or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + HEARD_SECONDS
        try:
            self._names = await self._directory.aliases()
        except Unavailable:
            return


class Named(Body):
    """What of a request's body says whose it is."""

    model: str | None = None
    adapter: str | None = None


def alias_in(body: bytes, base: str) -> str:
    """The adapter that a body names. "" = none, or it cannot be read: then the engine says what is wrong with it."""
    try:
        named = Named.model_validate_json(body)
    except ValidationError:
        return ""
    alias = named.adapter or (named.model or base).removeprefix(f"{base}:")
    return "" if alias == base else alias


@asking.post("/v1/completions")
@asking.post("/v1/chat/completions")
async def ask(request: Request) -> Response:
    settings = settings_of(request)
    body = await read_body(request, settings.body_bytes)
    alias = alias_in(body, settings.model_name)
    aliases: Aliases = request.app.state.aliases
    key = alias if alias and await aliases.knows(alias) else ""
    return await forwarded(engines_of(request).ask(Call.of(request, body), key))


@asking.get("/v1/{path:path}")
@reading.api_route("/{path:path}", methods=["GET", "HEAD"])
async def read(request: Request, path: str) -> Response:
    """Everything that changes nothing, any replica can say: the models, the page."""
    return await forwarded(engines_of(request).ask(Call.of(request), ""))


@watching.get("/health/live")
async def live() -> dict[str, Any]:
    """This ingress is; Ray looks after the others itself."""
    return {"status": "live"}


@watching.get("/health/ready")
async def ready(request: Request) -> dict[str, Any]:
    running = await engines_of(request).running()
    if not running:
        raise Unavailable("no engine runs")
    return {"status": "ready", "replicas": running}


@watching.get("/metrics")
async def metrics(request: Request) -> Response:
    """Of every replica, by its name. Ray has figures of its own, for each machine."""
    found = await engines_of(request).figures()
    text = await asyncio.to_thread(merged, {figures.replica: figures.text for figures in found})
    return Response(text, media_type=CONTENT_TYPE)


def maker(connect: Callable[[], tuple[Engines, Directory]], settings: ServerSettings) -> Callable[[], FastAPI]:
    """What a replica of the ingress calls to have its application."""

    def make() -> FastAPI:
        return create_ingress(*connect(), settings)

    return make
