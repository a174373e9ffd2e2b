"""Errors as OpenAI's clients understand them: {"error": {message, type, param, code}}, with a fitting status."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from molex.errors import MolexError
from molex_serve.errors import BadRequest, ServeError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}


class ClientGone(ServeError):
    """Nobody reads this: it ends the work for a client that has left."""

    status, code = 499, "client_gone"


class EngineFailed(ServeError):
    """A step failed; the request is lost."""

    code = "engine_error"


class Refused(BadRequest):
    """A field whose value is wrong. param: its name."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


def problem(error: MolexError) -> dict[str, Any]:
    """The body of an error; also what a stream says that breaks off."""
    known = error if isinstance(error, ServeError) else BadRequest(str(error))
    return _body(known.status, str(known), known.code, getattr(known, "param", None))


def refusal(error: MolexError) -> JSONResponse:
    """An error as a whole response."""
    known = error if isinstance(error, ServeError) else BadRequest(str(error))
    headers = {} if known.retry_after is None else {"Retry-After": str(known.retry_after)}
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem(error), known.status, headers)


def wrong_values(errors: Sequence[Any]) -> Refused:
    """What pydantic found, as one error about the first field. The value itself is not repeated, it may be long."""
    place = ".".join(str(part) for part in errors[0]["loc"])
    message = str(errors[0]["msg"])
    return Refused(f"{place}: {message}" if place else message, place)


def add_handlers(app: FastAPI) -> None:
    """Every way in which a request can fail ends in a body of this shape."""

    async def failed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MolexError)
        return refusal(error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return refusal(wrong_values(error.errors()))

    async def unroutable(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = _CODES.get(error.status_code, "bad_request")
        body = _body(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code, None)
        return JSONResponse(body, error.status_code, error.headers)

    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_body(500, "internal error; the server's log has more", "internal_error", None), 500)

    app.add_exception_handler(MolexError, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unroutable)
    app.add_exception_handler(Exception, broken)


def _body(status: int, message: str, code: str, param: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
