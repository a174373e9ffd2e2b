"""Errors that a client of the server can cause, each with the HTTP status and the stable code it is answered with."""

from typing import ClassVar

from molex.errors import MolexError


class ServeError(MolexError):
    """The root. `retry_after` (seconds) where trying again later can help."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retry_after: int | None = None


class BadRequest(ServeError):
    """What was asked cannot be done, now or later: a wrong value, an over-long prompt."""

    status, code = 400, "bad_request"


class UnknownAdapter(ServeError):
    """No adapter and no model has this name."""

    status, code = 404, "unknown_adapter"


class Conflict(ServeError):
    """The alias has another generation than the caller expected, or is in use."""

    status, code = 409, "generation_conflict"


class BadAdapter(ServeError):
    """An adapter that is damaged, foreign, over a limit, or that does not bind to this base."""

    status, code = 422, "bad_adapter"


class Overloaded(ServeError):
    """The queue is full: try again."""

    status, code, retry_after = 429, "overloaded", 1


class LoadBusy(ServeError):
    """Another adapter is being loaded, or every slot is in use: try again."""

    status, code, retry_after = 429, "load_busy", 1


class Unavailable(ServeError):
    """The server is starting, stopping or broken."""

    status, code, retry_after = 503, "unavailable", 5
