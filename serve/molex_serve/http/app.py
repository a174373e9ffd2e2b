"""The application: all routes, what stands before them, and the engine's life around them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from molex_serve.engine.base import Engine
from molex_serve.errors import Unavailable
from molex_serve.http import adapters as administration
from molex_serve.http import chat, completions, health, metrics, models, playground
from molex_serve.http.auth import require_admin, require_key
from molex_serve.http.face import Face
from molex_serve.http.ports import Adapters
from molex_serve.http.problems import add_handlers, refusal
from molex_serve.settings import ServerSettings

OPEN_WHILE_STOPPING = ("/health/", "/metrics")


def create_app(
    engine: Engine,
    adapters: Adapters,
    tokenizer: PreTrainedTokenizerBase,
    settings: ServerSettings,
    collectors: Sequence[Collector] = (),
) -> FastAPI:
    """The engine is started and stopped with the application. collectors: of further figures for /metrics."""
    face = Face(engine, adapters, tokenizer, settings)
    for collector in collectors:
        face.metrics.register(collector)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await face.start()
        try:
            yield
        finally:
            await face.stop(settings.drain_seconds)
            await face.close()

    # no pages about the API: they would load scripts from elsewhere
    app = FastAPI(title="molex", lifespan=life, openapi_url=None)
    app.state.face, app.state.settings = face, settings
    add_handlers(app)
    app.add_middleware(Doorkeeper, face=face)
    for part in (completions, chat, models):
        app.include_router(part.router, dependencies=[Depends(require_key)])
    app.include_router(administration.router, dependencies=[Depends(require_admin)])
    for part in (health, metrics, playground):
        app.include_router(part.router)
    return app


class Doorkeeper:
    """Lets nobody in while the server stops, counts who is inside, and notes how every request ended."""

    def __init__(self, app: ASGIApp, face: Face):
        self.app, self.face = app, face

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # not the path: clients could make up any number
            self.face.metrics.responses.labels(route, str(status)).inc()

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(OPEN_WHILE_STOPPING):
            await self.app(scope, receive, send)
        elif self.face.gate.closed:
            error = Unavailable("the server is stopping; ask another one, or this one later")
            await refusal(error)(scope, receive, send)
        else:
            with self.face.gate.entered():
                await self.app(scope, receive, send)
