"""Where adapters named over HTTP may come from: folders inside one root, of which nothing leads out.

Only safetensors and JSON files are ever read; a folder whose weights are in another format is refused here. Clients
must not be able to write into the root: what was checked is read afterwards.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from molex.checks import listed
from molex.errors import CheckpointError
from molex.io.files import read_json
from molex_serve.adapters.blend import BLEND_FILE
from molex_serve.errors import BadAdapter, BadRequest

WEIGHTS = ".safetensors"


def inside(root: str | Path | None, given: str) -> Path:
    """The folder that `given`, relative to the root or absolute, means. Raises BadRequest where it is outside, and
    BadAdapter where nothing is there, or what is there leads out or has no safetensors."""
    if root is None:
        raise BadRequest("no adapters are loaded over HTTP here: start the server with an adapter root")
    base = Path(root).resolve()
    folder = _checked(base, base / given, given)
    if (folder / BLEND_FILE).is_file():
        for member in _members(folder):
            _checked_weights(_checked(base, folder / member, member), member)
    else:
        _checked_weights(folder, given)
    return folder


def _checked(base: Path, path: Path, given: str) -> Path:
    """Where a path leads. Says the same of everything outside, whether it is there or not."""
    try:
        folder = path.resolve()
        is_inside = base in folder.parents
        is_folder = is_inside and folder.is_dir()
        outside = [file for file in _files(folder) if base not in file.resolve().parents] if is_inside else []
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"{given[:99]!r} is no path: too long, a loop of links, or unreadable") from error
    if not is_inside:
        raise BadRequest(f"{given!r} is not inside the adapter root; give a folder's path relative to it")
    if not is_folder:
        raise BadAdapter(f"{given!r} is no folder in the adapter root")
    if outside:
        names = sorted(str(file.relative_to(folder)) for file in outside)
        raise BadAdapter(f"{given!r} has links that lead out of the adapter root: {listed(names)}")
    return folder


def _files(folder: Path) -> Iterator[Path]:
    """Every file and link below a folder; links are not followed."""
    for parent, folders, files in os.walk(folder):
        for name in (*files, *folders):
            path = Path(parent, name)
            if name in files or path.is_symlink():
                yield path


def _checked_weights(folder: Path, given: str) -> None:
    if not any(path.suffix == WEIGHTS for path in folder.iterdir()):
        raise BadAdapter(
            f"{given!r} has no {WEIGHTS} file, and nothing else holds weights here: save it as safetensors"
        )


def _members(folder: Path) -> list[str]:
    """A blend's, by their paths seen from it."""
    try:
        members = read_json(folder / BLEND_FILE).get("adapters")
    except CheckpointError as error:
        raise BadAdapter(str(error)) from error
    return [*members] if isinstance(members, dict) else []
