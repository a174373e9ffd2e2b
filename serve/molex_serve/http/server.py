"""uvicorn, told to stop as a load balancer wishes: first not ready, then refusing, then gone.

On SIGTERM or SIGINT: /health/ready and every new request answer 503 while running answers finish, for at most
`drain_seconds`; then the engine stops, which ends what is left with an error; then the sockets close. A second SIGINT
does not wait.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from molex_serve.http.face import Face
from molex_serve.settings import ServerSettings

POLL_SECONDS = 0.05
CLOSE_SECONDS = 5  # for responses that are written when the engine has stopped
KEEP_ALIVE_SECONDS = 65  # longer than proxies and clients keep a connection, so that they close it first


class Server(uvicorn.Server):
    """listening: called with its address once requests may come."""

    def __init__(
        self,
        app: FastAPI,
        settings: ServerSettings,
        log_level: str = "info",
        listening: Callable[[str], object] = lambda address: None,
    ):
        config = uvicorn.Config(
            app,
            settings.host,
            settings.port,
            log_level=log_level,
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        super().__init__(config)
        self.face: Face = app.state.face
        self.drain_seconds, self.listening = settings.drain_seconds, listening

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, once started: port 0 takes any that is free."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return host, port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.address
            self.listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.face.gate.close()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.face.gate.close()
        deadline = time.monotonic() + self.drain_seconds
        while self.face.gate.inside and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(POLL_SECONDS)
        await self.face.stop(0.0)
        await super().shutdown(sockets)
