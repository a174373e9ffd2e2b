"""The releases of transformers that `bridge` is known to fit: it uses names that are not meant for others."""

from molex.errors import BackendError

FIRST, END = (5, 23), (5, 24)


def require_tested(version: str) -> None:
    """Raises BackendError for a transformers that tests/serve/engine/test_contract.py has not seen."""
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if not FIRST <= release < END:
        allowed = ".".join(map(str, FIRST))
        raise BackendError(
            f"continuous batching is tested with transformers {allowed} and this is {version}: install "
            f"'transformers=={allowed}.*', or use the static engine"
        )
