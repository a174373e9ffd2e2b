"""What a body may be: so many bytes of JSON, with values of the right kinds. Everything else is refused early."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from molex_serve.errors import ServeError
from molex_serve.http.auth import settings_of
from molex_serve.http.problems import ClientGone, wrong_values
from molex_serve.http.schemas import Body

BodyT = TypeVar("BodyT", bound=Body)


class BodyTooLarge(ServeError):
    status, code = 413, "body_too_large"


class NotJson(ServeError):
    status, code = 415, "unsupported_media_type"


def parsed(schema: type[BodyT]) -> Callable[[Request], Awaitable[BodyT]]:
    """A dependency that is a request's body as `schema`."""

    async def parse(request: Request) -> BodyT:
        # a page of another origin can send text/plain without asking, and JSON only after the browser has asked us
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise NotJson(f"the body is {kind or 'of no type'}; send JSON, with Content-Type: application/json")
        text = await read_body(request, settings_of(request).body_bytes)
        try:
            return schema.model_validate_json(text)
        except ValidationError as error:
            raise wrong_values(error.errors(include_url=False, include_input=False)) from error

    return parse


async def read_body(request: Request, limit: int) -> bytes:
    """Raises BodyTooLarge without reading on where the length is announced or reached, and ClientGone."""
    _check_size(int(request.headers.get("content-length", 0)), limit)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            _check_size(size, limit)
            parts.append(part)
    except ClientDisconnect as error:
        raise ClientGone("the client left while it sent its body") from error
    return b"".join(parts)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BodyTooLarge(f"the body has {size} bytes or more, and at most {limit} are taken")
