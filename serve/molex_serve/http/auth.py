"""Who may ask and who may administrate: keys in the header Authorization: Bearer, compared in constant time.

Health and metrics ask for no key; put a proxy before them where that matters.
"""

import hmac

from fastapi import Request

from molex_serve.errors import ServeError
from molex_serve.settings import ServerSettings


class Unauthorized(ServeError):
    status, code = 401, "invalid_api_key"


def settings_of(request: Request) -> ServerSettings:
    return request.app.state.settings


async def require_key(request: Request) -> None:
    """The API key, or the admin key, which may do everything. Raises Unauthorized."""
    settings = settings_of(request)
    if settings.api_key is not None:
        _require(request, (settings.api_key, settings.admin_key))


async def require_admin(request: Request) -> None:
    """The admin key, or the API key where there is no admin key. Raises Unauthorized."""
    settings = settings_of(request)
    key = settings.api_key if settings.admin_key is None else settings.admin_key
    if key is not None:
        _require(request, (key,))


def _require(request: Request, keys: tuple[str | None, ...]) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    sent = given.strip().encode("latin-1")  # the very bytes: headers are read as latin-1
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys if key is not None]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthorized("no valid key; send it in the header Authorization: Bearer KEY")
