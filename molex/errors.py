"""Every error a user can cause.

Each is a `MolexError` and the standard library's own kind, so that both `except molex.MolexError` and
`except ValueError` catch it. Messages say what was given, what is allowed, and what to do next.
Broken invariants inside molex are plain `assert`.
"""


class MolexError(Exception):
    """The root of all user errors."""


class ConfigError(MolexError, ValueError):
    """A configuration value that is unknown, out of range or contradicts another."""


class TargetError(MolexError, ValueError):
    """A module pattern that matches nothing, or something that cannot become a mixture."""


class StateError(MolexError, RuntimeError):
    """The right call at the wrong time: converting twice, a loss before any forward, missing task ids."""


class CheckpointError(MolexError, ValueError):
    """Files that are damaged, foreign, newer than this molex, or made for another base."""


class BackendError(MolexError, RuntimeError):
    """A backend asked for by name that cannot run here; the message says why."""
