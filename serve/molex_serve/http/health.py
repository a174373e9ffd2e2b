"""GET /health/live: the process is worth keeping. GET /health/ready: it takes requests."""

from typing import Any

from fastapi import APIRouter, Request

from molex_serve.errors import Unavailable
from molex_serve.http.face import face_of

router = APIRouter()


@router.get("/health/live")
async def live(request: Request) -> dict[str, Any]:
    """A stopping server is alive until it is gone."""
    face = face_of(request)
    if not face.engine.alive() and not face.gate.closed:
        raise Unavailable("the engine has stopped; restart the server")
    return {"status": "live"}


@router.get("/health/ready")
async def ready(request: Request) -> dict[str, Any]:
    face = face_of(request)
    if face.gate.closed or not face.engine.alive():
        raise Unavailable("the server is stopping" if face.gate.closed else "the engine does not run")
    return {"status": "ready"}
