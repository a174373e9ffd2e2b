"""What an adapter's files are, as one short name: the same files are the same generation, wherever they lie."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from molex_serve.errors import BadAdapter

READ = (".json", ".safetensors")
CHUNK = 1 << 20


def generation_of(folder: Path) -> str:
    """Twelve hexadecimal digits of the names and contents of a folder's files. Raises BadAdapter where it has none."""
    files = sorted(path for path in folder.iterdir() if path.suffix in READ and path.is_file())
    if not files:
        raise BadAdapter(f"{folder} holds no adapter: no file ends in {' or '.join(READ)}")
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    return found.hexdigest()[:12]


def generation_of_parts(parts: Iterable[tuple[str, float]]) -> str:
    """The same for a blend, of its members' generations and their shares."""
    text = "\n".join(f"{generation} {share!r}" for generation, share in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
