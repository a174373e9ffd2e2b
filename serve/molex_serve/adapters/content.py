"""What an adapter's files are, as one short name: the same files are the same generation, wherever they lie."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from molex_serve.errors import BadAdapter

READ = (".json", ".safetensors")
CHUNK = 1 << 20


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Within, a folder is read and gets its name. Raises BadAdapter where its files changed meanwhile, so that the name
    may be another content's."""
    before = _stamps(folder)
    yield
    if _stamps(folder) != before:
        raise BadAdapter(f"{folder} changed while it was read: load it again once it is complete")


def generation_of(folder: Path) -> str:
    """Twelve hexadecimal digits of the names and contents of a folder's files. Raises BadAdapter where it has none."""
    files = _files(folder)
    if not files:
        raise BadAdapter(f"{folder} holds no adapter: no file ends in {' or '.join(READ)}")
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    return found.hexdigest()[:12]


def _files(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if path.suffix in READ and path.is_file())


def _stamps(folder: Path) -> list[tuple[str, int, int, int]]:
    found = [(path.name, path.stat()) for path in _files(folder)]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def generation_of_parts(parts: Iterable[tuple[str, float]]) -> str:
    """The same for a blend, of its members' generations and their shares."""
    text = "\n".join(f"{generation} {share!r}" for generation, share in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
